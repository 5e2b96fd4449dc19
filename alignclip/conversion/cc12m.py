"""Convert CC12M, or any image–caption pairs, to MDS shards with caption embeddings.

Inputs are img2dataset's or webdataset's tars, img2dataset's parquet files, CSV or TSV files of
paths and captions, or another MDS set. Each becomes a sub-folder of MDS shards that appears
complete or not at all, so that a run that was stopped goes on where it was when it is started
again. Columns: ``key`` (str), ``image`` (the file's bytes), ``caption`` (str) and ``semantic`` (the
sentence encoder's embedding of the caption, float16).
"""

from __future__ import annotations

from collections.abc import Sequence

from alignclip.config.command_line import read_options
from alignclip.conversion.dataset import convert_pairs
from alignclip.conversion.loading_rate import SummaryRows, loading_rate
from alignclip.conversion.next_step import next_step
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.conversion.report import REPORT, ways_out
from alignclip.conversion.wording import are_them, first_few, inputs_in_words
from alignclip.errors import one_line_errors
from alignclip.runtime import console
from alignclip.storage.staging import VAL, OutputFolder

CC12M_EXAMPLES = """examples:
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


def parse(arguments: Sequence[str] | None = None) -> ConvertOptions:
    """Read the command line."""
    return read_options(
        ConvertOptions,
        arguments,
        "convert/cc12m.py",
        "Convert image-caption pairs to MDS shards with caption embeddings.",
        CC12M_EXAMPLES,
    )


def summary(counts: Counts, options: ConvertOptions, loads: SummaryRows = ()) -> str:
    """Return the counts as a table, what is to be mended, and the command that comes next.

    Args:
        counts: of the whole set.
        options: of this conversion.
        loads: rows that say at which rate the set loads.
    """
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
    rows += loads
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
    console.prepare_output()
    options = parse(arguments)
    with one_line_errors(interrupted="interrupted; the same command goes on from here"):
        counts = convert_pairs(options)
        loads = loading_rate(options, counts) if options.next_step else []
    print(summary(counts, options, loads))
