"""Convert CC12M, or any img2dataset or webdataset tars of image–caption pairs, to MDS shards with caption embeddings.

Each tar becomes a sub-folder of MDS shards that appears complete or not at all, so that a run that was stopped goes on
where it was when it is started again. Columns: ``key`` (str), ``image`` (the file's bytes, untouched), ``caption``
(str) and ``semantic`` (the sentence encoder's embedding of the caption, float16).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, check_place, nearest, one_line_errors
from convert import tars
from convert.captions import DEFAULT_ENCODER, load_encoder
from convert.shards import ConvertOptions, Counts, convert_all, is_current, mds_writer
from convert.storage import COUNTS, INDEX, Store

OPTIONS = "convert.json"  # at the root, written first: what a later run must agree with
DATASET = "dataset.json"  # at the root, written last but for the index: what the set is
SMALL = 100_000  # samples: below, the recipe's warmup and canonical nodes would be most of the run
ROOT = Path(__file__).resolve().parents[1]

EXAMPLES = """examples:
  # 1243 tars of img2dataset into a bucket (S3_ENDPOINT_URL and the AWS variables as for Streaming)
  python convert/cc12m.py --tars 'cc12m/{00000..01242}.tar' --out s3://bucket/cc12m --processes 8

  # tars in a bucket, a folder of tars, a sentence encoder from a local folder
  python convert/cc12m.py --tars s3://raw/cc12m cc3m/ --out gs://bucket/pairs --encoder models/all-MiniLM-L6-v2

  # without caption embeddings, for training CLIP and SharedCLIP only
  python convert/cc12m.py --tars 'cc12m/*.tar' --out /data/cc12m --no-semantic

The same command again goes on where the last one stopped, and redoes tars that were truncated and fetched again.
"""


def convert(options: ConvertOptions) -> Counts:
    """Convert tars to MDS and return the counts of the whole set in ``options.out``, earlier runs' parts included.

    Raises:
        UserError: an input, the encoder or the output is not there; ``out`` was begun with other options or from other
            tars of the same names; no sample was written.
    """
    for what, places in (("--out", [options.out]), ("--tars", options.tars)):
        for place in places:
            check_place(what, place)
    names = _unique_names(tars.expand(options.tars))
    store = Store(options.out)
    listing = store.listing()
    columns = _check(options)
    complete = _begin(store, listing, options, names)
    for name, tar in names.items():
        if name in complete and complete[name]["written"] and complete[name]["source"] != tar:
            raise UserError(
                f"{store.out}/{name} was made from {complete[name]['source']}, not from {tar}; choose another --out"
            )
    again = {name for name, tar in names.items() if name in complete and not is_current(tar, complete[name])}
    done = {name: _counts(kept) for name, kept in complete.items() if name not in again}
    todo = {name: tar for name, tar in names.items() if name not in done}
    if INDEX in listing and any(complete[name]["written"] for name in again):
        # Their shards will be replaced, under the same names. Were this run killed, the set is smaller but consistent.
        _publish(store, done, columns, options)
    start = time.monotonic()
    done.update(convert_all(todo, columns, options))
    seconds = time.monotonic() - start
    total = _total(done)
    if not total.written:
        raise UserError(_why_nothing(total, len(done), options))
    _publish(store, done, columns, options)
    truncated = sorted(name for name, counts in done.items() if tars.TRUNCATED_TAR in counts.skipped)
    return replace(total, tars=len(names), converted=len(todo), truncated=truncated, seconds=seconds)


def _unique_names(inputs: Sequence[str]) -> dict[str, str]:
    """Sub-folder name -> tar: the file name up to its first dot, of which there may be one each."""
    names: dict[str, str] = {}
    for tar in inputs:
        name = tar.rsplit("/", 1)[1].split(".")[0]
        if name in names:
            raise UserError(
                f"{names[name]} and {tar} would both become '{name}'; give each folder of tars an --out of its own "
                "(training takes several streams)"
            )
        names[name] = tar
    return names


def _check(options: ConvertOptions) -> dict[str, str]:
    """Try the options that would otherwise fail in the first worker; return the MDS columns."""
    if options.processes < 1:
        raise UserError(f"--processes must be at least 1, not {options.processes}")
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    if options.semantic:
        columns["semantic"] = f"ndarray:float16:{load_encoder(options.encoder).dimension}"
    _check_compression(options.compression)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mds_writer(columns, Path(folder) / "empty", options).finish()
        except ValueError as error:
            raise UserError(f"--size-limit {options.size_limit}: {error}") from None
    return columns


def _check_compression(name: str | None) -> None:
    from streaming.base.compression import get_compressions

    if name is None or name in get_compressions():
        return
    levels: dict[str, list[int]] = {}
    for algorithm, _, level in (valid.partition(":") for valid in sorted(get_compressions())):
        levels.setdefault(algorithm, []).extend([int(level)] if level else [])
    valid = (f"{key}[:{min(found)}-{max(found)}]" if found else key for key, found in levels.items())
    raise UserError(f"--compression {name} is not one of Streaming's; valid: {', '.join(valid)}")


def _begin(store: Store, listing: set[str], options: ConvertOptions, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Write the options into ``out``, or compare them with those there; return what sub-folders are complete.

    While nothing has been written, for instance because of a wrong caption key, other options take their place.
    """
    if OPTIONS not in listing:
        # a tar's sub-folder is replaced as a whole, and must not be somebody else's
        foreign = [name for name in ("", *names) if f"{name}/{INDEX}".lstrip("/") in listing]
        if foreign:
            place = f"{store.out}/{foreign[0]}".rstrip("/")
            raise UserError(f"{place} already holds a data set that is not this converter's; choose another --out")
        complete: dict[str, dict[str, Any]] = {}
        different = list(options.fixed())
    else:
        parts = sorted(file.split("/")[0] for file in listing if file.endswith(f"/{INDEX}"))
        parts = [name for name in parts if f"{name}/{COUNTS}" in listing]
        before, *kept = store.read_json([OPTIONS, *(f"{name}/{COUNTS}" for name in parts)])
        complete = dict(zip(parts, kept, strict=True))
        different = [key for key, value in options.fixed().items() if before.get(key) != value]
    if not different:
        return complete
    if any(kept["written"] for kept in complete.values()):
        key = different[0]
        raise UserError(
            f"{store.out} was begun with {_flag(key, before.get(key))}, this run has "
            f"{_flag(key, options.fixed()[key])}: finish it with the same options, choose another --out or delete "
            f"{store.out} to start again"
        )
    with store.staged() as folder:
        (folder / OPTIONS).write_text(json.dumps(options.fixed(), indent=2))
    return {}


def _flag(key: str, value: Any) -> str:
    """A fixed option as it is given on the command line."""
    if key == "encoder" and value is None:
        return "--no-semantic"
    if key == "decode_check":
        return "the decode check" if value else "--no-decode-check"
    flag = f"--{key.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _counts(kept: dict[str, Any]) -> Counts:
    return Counts(kept["written"], kept["skipped"], kept["bytes"], resumed=kept["written"])


def _total(done: dict[str, Counts]) -> Counts:
    total = Counts()
    for part in done.values():
        total.add(part)
    return total


def _why_nothing(total: Counts, number: int, options: ConvertOptions) -> str:
    """The message of a run that has not written one sample: what was skipped, and what the captions may be called."""
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(total.skipped.items()))
    message = f"no sample was written from {_tars(number)}; skipped: {skipped or 'nothing'}"
    if tars.MISSING_CAPTION not in total.skipped:
        return message
    key, texts = options.caption_key, sorted(total.texts)
    if not texts:
        return f"{message}. There are no texts in json members" + ("" if key else ", and there are no txt members")
    they_have = f"they have: {', '.join(texts)}"
    if key is None:
        return f"{message}. There are no txt members, and no 'caption' in json members; {they_have} (--caption-key)"
    hint = nearest(key, texts)
    they_have += f"; {hint}" if hint.startswith("did you") else ""
    return f"{message}. --caption-key '{key}' is no text in the json members; {they_have}"


def _tars(number: int) -> str:
    return "1 tar" if number == 1 else f"{number:,} tars"


def _publish(store: Store, done: dict[str, Counts], columns: dict[str, str], options: ConvertOptions) -> None:
    """Write ``dataset.json`` and the index of these sub-folders."""
    total = _total(done)
    # Streaming's merge_index opens a connection for each sub-folder and takes every .json in them for an index
    names = sorted(done)
    shards = []
    for name, index in zip(names, store.read_json([f"{name}/{INDEX}" for name in names]), strict=True):
        for shard in index["shards"]:
            if not shard["samples"]:  # MDSWriter begins with an empty one where the first sample exceeds the size limit
                continue
            for file in (shard["raw_data"], shard["zip_data"]):
                if file:
                    file["basename"] = f"{name}/{file['basename']}"
            shards.append(shard)
    packages = ["alignclip", "mosaicml-streaming", "pillow"]
    packages += ["sentence-transformers", "transformers", "torch"] if options.semantic else []
    dataset = {
        "encoder": options.encoder if options.semantic else None,
        "dimension": int(columns["semantic"].rsplit(":", 1)[1]) if options.semantic else None,
        "source": list(options.tars),
        "tars": len(done),
        "samples": total.written,
        "skipped": total.skipped,
        "bytes": total.bytes,
        "options": options.fixed(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    with store.staged() as folder:
        (folder / DATASET).write_text(json.dumps(dataset, indent=2))
        (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}))


def parse(arguments: Sequence[str] | None = None) -> ConvertOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert/cc12m.py",
        description="Convert img2dataset or webdataset tars to MDS shards with caption embeddings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tars", nargs="+", required=True, metavar="TAR", help="paths, folders, URLs; {0..9}, {a,b}, * and ? expand")
    add("--out", required=True, metavar="FOLDER", help="local folder, or s3://, gs://, oci://, azure:// …")
    add("--encoder", default=DEFAULT_ENCODER, metavar="NAME", help="hub name or local folder (default: %(default)s)")
    add("--no-semantic", dest="semantic", action="store_false", help="write no caption embeddings")
    add(
        "--caption-key",
        metavar="KEY",
        help="take captions from this entry of the json members (default: txt)",
    )
    add(
        "--no-decode-check",
        dest="decode_check",
        action="store_false",
        help="don't look whether images are whole",
    )
    add("--size-limit", default="64mb", metavar="SIZE", help="of a shard before compression (default: %(default)s)")
    add("--compression", metavar="ALGO", help="Streaming's, e.g. zstd or zstd:7; JPEGs hardly shrink (default: none)")
    add("--processes", type=int, default=os.cpu_count(), metavar="N", help="tars at a time (default: %(default)s)")
    add("--no-next", dest="next_step", action="store_false", help=argparse.SUPPRESS)  # the quickstart has its own
    return ConvertOptions(**vars(parser.parse_args(arguments)))


def summary(counts: Counts, options: ConvertOptions) -> str:
    """The counts as a small table, what is to be mended, and the command that comes next."""
    out = Store(options.out).out
    new = counts.written - counts.resumed
    rows = [("written", f"{counts.written:,} samples"), ("skipped", f"{sum(counts.skipped.values()):,}")]
    rows += [(f"  {reason}", f"{number:,}") for reason, number in sorted(counts.skipped.items())]
    rows += [("size", f"{counts.bytes / 2**20:,.1f} MiB"), ("where", out)]
    rate = f", {new / counts.seconds:,.0f} samples/s" if new else ""
    this_run = f"{new:,} samples in {counts.seconds:,.0f} s{rate}"
    if not counts.converted:
        this_run = f"{'the tar was' if counts.tars == 1 else f'all {_tars(counts.tars)} were'} complete already"
    rows += [("this run", this_run)]
    text = "\n".join(f"{name:<22}{value}" for name, value in rows)
    if broken := counts.truncated:
        names = ", ".join([*broken[:10], *(["…"] if len(broken) > 10 else [])])
        are, them = ("is", "it") if len(broken) == 1 else ("are", "them")
        text += f"\n\n{_tars(len(broken))} {are} truncated ({names}): fetch {them} again and repeat this command"
    return f"{text}\n\nnext: {_next_command(out, counts, options)}" if options.next_step else text


def _next_command(out: str, counts: Counts, options: ConvertOptions) -> str:
    """The command that trains on the set, as it can be pasted where this one was started."""
    recipe = "alignclip" if options.semantic else "sharedclip"
    composer = Path(sys.executable).with_name("composer")
    words = [str(_from_here(composer)) if composer.exists() else "composer"]
    words += [str(_from_here(path)) for path in (ROOT / "pretrain.py", ROOT / "yamls" / f"{recipe}.yaml")]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", out.rpartition("/")[2]).strip("-") or "mine"
    words += [f"run_name={name}"]
    if name != "cc12m":  # the recipe's own
        words += ["data.streams.cc12m=null"]
    if "://" in out:
        words += [f"data.streams.{name}.remote={out}", f"data.streams.{name}.local=/tmp/{name}"]
    else:
        words += [f"data.streams.{name}.local={out}"]
    if counts.written < SMALL:
        words += ["data.num_canonical_nodes=1", "scheduler.t_warmup=100ba"]
    return shlex.join(words)


def _from_here(path: Path) -> Path:
    """Relative to the working directory where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary; exit status 2 with one line for what the user can mend."""
    options = parse(arguments)
    try:
        with one_line_errors():
            counts = convert(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary(counts, options))


if __name__ == "__main__":
    main()
