"""Convert CC12M, or any image–caption pairs, to MDS shards with caption embeddings.

Inputs are img2dataset's or webdataset's tars, img2dataset's parquet files, CSV or TSV files of
paths and captions, or another MDS set. Each becomes a sub-folder of MDS shards that appears
complete or not at all, so that a run that was stopped goes on where it was when it is started
again. Columns: ``key`` (str), ``image`` (the file's bytes), ``caption`` (str) and ``semantic`` (the
sentence encoder's embedding of the caption, float16).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from alignclip.conversion.captions import DEFAULT_ENCODER
from alignclip.conversion.dataset import convert
from alignclip.conversion.formats import in_words
from alignclip.conversion.images import CHECKS, ImageOptions
from alignclip.conversion.next_step import next_step
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.conversion.report import REPORT, ways_out
from alignclip.conversion.samples import Reading
from alignclip.conversion.wording import are_them, first_few, inputs_in_words
from alignclip.errors import one_line_errors
from alignclip.paths import option
from alignclip.runtime import console
from alignclip.runtime.arguments import Parser
from alignclip.storage.staging import VAL, OutputFolder

EXAMPLES = """examples:
  # 1243 tars of img2dataset into a bucket (S3_ENDPOINT_URL and the AWS variables as for Streaming)
  python convert/cc12m.py --inputs 'cc12m/{00000..01242}.tar' --out s3://bucket/cc12m --processes 8

  # tars in a bucket, a folder of tars, an encoder from a local folder; 1 % of the samples held out
  python convert/cc12m.py --inputs s3://raw/cc12m cc3m/ --out gs://bucket/pairs \\
    --encoder models/all-MiniLM-L6-v2 \\
    --held-out 0.01

  # without caption embeddings, for CLIP and SharedCLIP; images of 256 pixels, which decode faster
  python convert/cc12m.py --inputs mine.csv --out /data/mine --no-semantic --resize 256

  # caption embeddings added to a set that has none, images copied
  python convert/cc12m.py --inputs /data/mine/index.json --out /data/mine-semantic --check none

  # on a Dask cluster whose workers have alignclip installed and see the inputs
  python convert/cc12m.py --inputs s3://raw/cc12m --out s3://bucket/cc12m \\
    --scheduler tcp://head:8786

The same command again goes on where the last one stopped, and redoes inputs that were truncated
and fetched again.
"""


def _flag(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what :meth:`argparse.ArgumentParser.add_argument` takes."""
    return names, settings


# group -> its flags
FLAGS = {
    "input": [
        _flag(
            "--inputs",
            "--tars",
            type=option,
            nargs="+",
            required=True,
            metavar="PATH",
            help=f"{in_words()}, folders of them; paths or URLs; {{0..9}}, {{a,b}}, * and ? expand",
        ),
        _flag(
            "--caption-key",
            metavar="KEY",
            help="of the json members, or the table's column (default: txt, or caption)",
        ),
        _flag(
            "--encoding",
            metavar="NAME",
            help="of tables' text, as cp1252 (default: UTF-8, or by its mark)",
        ),
        _flag(
            "--image-key",
            metavar="KEY",
            help="the images' ending in tars, as input.jpg, or the table's column of images",
        ),
        _flag(
            "--last-dot",
            action="store_true",
            help="names in tars are cut at the last dot (default: the first)",
        ),
        _flag(
            "--unsorted", action="store_true", help="join image and caption that lie apart in a tar"
        ),
    ],
    "output": [
        _flag(
            "--out",
            type=option,
            required=True,
            metavar="FOLDER",
            help="local folder, or s3://, gs://, oci://, azure:// …",
        ),
        _flag(
            "--held-out",
            type=float,
            default=0.0,
            metavar="SHARE",
            help=f"of the samples, by a hash of the key: split {VAL}",
        ),
        _flag(
            "--size-limit", default="32mb", metavar="SIZE", help="of a shard (default: %(default)s)"
        ),
        _flag(
            "--compression",
            metavar="ALGO",
            help="Streaming's, as zstd:7; JPEGs hardly shrink (default: none)",
        ),
        _flag(
            "--hashes",
            nargs="*",
            default=["xxh64"],
            metavar="ALGO",
            help="of the shards (default: xxh64, which is checked)",
        ),
    ],
    "caption embeddings": [
        _flag(
            "--encoder",
            type=option,
            default=DEFAULT_ENCODER,
            metavar="NAME",
            help="hub name or local folder (default: %(default)s); all-MiniLM-L6-v2 needs no hub",
        ),
        _flag("--no-semantic", dest="semantic", action="store_false", help="write none"),
    ],
    "images": [
        _flag(
            "--check",
            default="decode",
            metavar="HOW",
            help=f"{', '.join(CHECKS)}: leave out bad ones (default: %(default)s)",
        ),
        _flag(
            "--min-side",
            type=int,
            default=16,
            metavar="PIXELS",
            help="smaller are bad (default: %(default)s)",
        ),
        _flag(
            "--resize",
            type=int,
            metavar="PIXELS",
            help="shorter side of larger ones (default: untouched)",
        ),
        _flag(
            "--quality",
            type=int,
            default=90,
            metavar="N",
            help="of resized JPEGs (default: %(default)s)",
        ),
        _flag(
            "--max-bad",
            type=float,
            default=0.5,
            metavar="SHARE",
            help="bad samples at which to fail (default: %(default)s)",
        ),
    ],
    "workers": [
        _flag(
            "--processes",
            type=int,
            default=os.cpu_count(),
            metavar="N",
            help="default: %(default)s",
        ),
        _flag(
            "--scheduler",
            metavar="ADDRESS",
            help="a Dask cluster's, instead of processes: tcp://host:8786",
        ),
        # the quickstart's own
        _flag("--no-next", dest="next_step", action="store_false", help=argparse.SUPPRESS),
    ],
}


def parse(arguments: Sequence[str] | None = None) -> ConvertOptions:
    """Read the command line."""
    parser = Parser(
        "convert/cc12m.py",
        "Convert image-caption pairs to MDS shards with caption embeddings.",
        EXAMPLES,
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for names, settings in flags:
            group.add_argument(*names, **settings)
    values = vars(parser.parse_args(arguments))
    for name, kind in (("images", ImageOptions), ("reading", Reading)):
        values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
    return ConvertOptions(**values)


def summary(counts: Counts, options: ConvertOptions) -> str:
    """Return the counts as a table, what is to be mended, and the command that comes next."""
    out = OutputFolder(options.out).out
    new = counts.written - counts.resumed
    rows = [("written", f"{counts.written:,} samples")]
    if options.held_out:
        rows += [("  held out", f"{counts.held_out:,}, the split {VAL}")]
    if counts.resumed and new:
        rows += [("  there before", f"{counts.resumed:,}"), ("  added", f"{new:,}")]
    for title, numbers, unit in (
        ("skipped", counts.skipped, ""),
        ("mended or unusual", counts.noted, ""),
        ("no part of a pair", counts.ignored, " files"),
    ):
        if numbers or title == "skipped":
            rows += [(title, f"{numbers.total():,}{unit}")]
            rows += [(f"  {what}", f"{number:,}") for what, number in sorted(numbers.items())]
    if counts.bad or counts.noted or counts.ignored:
        rows += [("examples", f"{out}/{REPORT}")]
    rows += [("size", f"{counts.bytes / 2**20:,.1f} MiB"), ("where", out)]
    rate = f", {new / counts.seconds:,.0f} samples/s" if new else ""
    this_run = f"{new:,} samples in {counts.seconds:,.0f} s{rate}"
    if not counts.converted:
        one = counts.inputs == 1
        inputs = "the input was" if one else f"all {counts.inputs:,} inputs were"
        this_run = f"{inputs} complete already"
    rows += [("this run", this_run)]
    width = max(36, *(len(name) + 2 for name, _ in rows))
    text = "\n".join(f"{name:<{width}}{value}" for name, value in rows)
    text += "".join(f"\n\n{way} (into another --out)" for way in ways_out(counts.skipped))
    if counts.broken:
        are, them = are_them(len(counts.broken))
        text += (
            f"\n\n{inputs_in_words(len(counts.broken))} {are} truncated "
            f"({first_few(counts.broken, 10)}): fetch {them} again and repeat this command"
        )
    return f"{text}\n\nnext: {next_step(out, counts, options)}" if options.next_step else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary; exit status 2 with one line for what the user can mend."""
    console.prepare()
    options = parse(arguments)
    try:
        with one_line_errors():
            counts = convert(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary(counts, options))
