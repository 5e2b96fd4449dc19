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
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, one_line_errors
from convert import tars
from convert.captions import DEFAULT_ENCODER, load_encoder
from convert.shards import COUNTS, ConvertOptions, Counts, convert_all, mds_writer
from convert.storage import INDEX, Store

OPTIONS = "convert.json"  # at the root, written first: what a later run must agree with
DATASET = "dataset.json"  # at the root, written last but for the index: what the set is

EXAMPLES = """examples:
  # 1243 tars of img2dataset into a bucket (S3_ENDPOINT_URL and the AWS variables as for Streaming)
  python convert/cc12m.py --tars 'cc12m/{00000..01242}.tar' --out s3://bucket/cc12m --processes 8

  # tars in a bucket, a folder of tars, a sentence encoder from a local folder
  python convert/cc12m.py --tars s3://raw/cc12m cc3m/ --out gs://bucket/pairs --encoder models/all-MiniLM-L6-v2

  # without caption embeddings, for training CLIP and SharedCLIP only
  python convert/cc12m.py --tars 'cc12m/*.tar' --out /data/cc12m --no-semantic

The same command again goes on where the last one stopped.
"""


def convert(options: ConvertOptions) -> Counts:
    """Convert tars to MDS and return the counts of the whole set in ``options.out``, earlier runs' parts included.

    Raises:
        UserError: an input, the encoder or the output is not there; ``out`` was begun with other options or from other
            tars of the same names; no sample was written.
    """
    names = _unique_names(tars.expand(options.tars))
    store = Store(options.out)
    listing = store.listing()
    columns = _check(options)
    counts = _begin(store, listing, options)
    for name, tar in names.items():
        if name in counts and counts[name]["source"] != tar:
            raise UserError(
                f"{store.out}/{name} was made from {counts[name]['source']}, not from {tar}; choose another --out"
            )
    todo = {name: tar for name, tar in names.items() if name not in counts}
    done = {name: _counts(entry) for name, entry in counts.items()}
    start = time.monotonic()
    done.update(convert_all(todo, columns, options))
    seconds = time.monotonic() - start
    return replace(_finish(store, done, columns, options), seconds=seconds)


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
    with tempfile.TemporaryDirectory() as folder:
        try:
            mds_writer(columns, Path(folder) / "empty", options).finish()
        except ValueError as error:
            raise UserError(f"--size-limit {options.size_limit} --compression {options.compression}: {error}") from None
    return columns


def _begin(store: Store, listing: set[str], options: ConvertOptions) -> dict[str, dict[str, Any]]:
    """Write the options into ``out``, or compare them with those there; return what sub-folders are complete."""
    if OPTIONS in listing:
        (before,) = store.read_json([OPTIONS])
        for key, value in options.fixed().items():
            if before.get(key) != value:
                raise UserError(
                    f"{store.out} was begun with {key}={before.get(key)!r}, this run has {key}={value!r}: "
                    "finish it with the same options or choose another --out"
                )
    elif INDEX in listing:
        raise UserError(f"{store.out} already holds a data set that is not this converter's; choose another --out")
    else:
        with store.staged() as folder:
            (folder / OPTIONS).write_text(json.dumps(options.fixed(), indent=2))
    parts = sorted(file.split("/")[0] for file in listing if file.endswith(f"/{INDEX}"))
    parts = [name for name in parts if f"{name}/{COUNTS}" in listing]
    return dict(zip(parts, store.read_json([f"{name}/{COUNTS}" for name in parts]), strict=True))


def _counts(entry: dict[str, Any]) -> Counts:
    return Counts(entry["written"], entry["skipped"], entry["bytes"], resumed=entry["written"])


def _finish(store: Store, done: dict[str, Counts], columns: dict[str, str], options: ConvertOptions) -> Counts:
    """Write ``dataset.json`` and the index of all sub-folders; return the sum of their counts."""
    total = Counts()
    for part in done.values():
        total.add(part)
    if not total.written:
        raise UserError(f"no sample was written from {len(done)} tars; skipped: {total.skipped or 'nothing'}")
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
    return total


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
    return ConvertOptions(**vars(parser.parse_args(arguments)))


def summary(counts: Counts, options: ConvertOptions) -> str:
    """The counts as a small table, and the command that comes next."""
    out = Store(options.out).out
    new = counts.written - counts.resumed
    rows = [("written", f"{counts.written:,} samples"), ("skipped", f"{sum(counts.skipped.values()):,}")]
    rows += [(f"  {reason}", f"{number:,}") for reason, number in sorted(counts.skipped.items())]
    rows += [("size", f"{counts.bytes / 2**20:,.1f} MiB"), ("where", out)]
    rate = f", {new / counts.seconds:,.0f} samples/s" if new else ""
    rows += [("this run", f"{new:,} samples in {counts.seconds:,.0f} s{rate}")]
    recipe = "alignclip" if options.semantic else "sharedclip"
    stream = f"data.streams.cc12m.local={shlex.quote(out)}"
    if "://" in out:
        stream = f"data.streams.cc12m.remote={shlex.quote(out)} data.streams.cc12m.local=/tmp/cc12m"
    table = "\n".join(f"{name:<22}{value}" for name, value in rows)
    return f"{table}\n\nnext: composer pretrain.py yamls/{recipe}.yaml {stream}"


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
