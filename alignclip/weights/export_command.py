"""The command line of ``convert/checkpoint.py``; :mod:`alignclip.weights.export` does its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignclip.config.command_line import read_options
from alignclip.config.setting import check_settings, setting
from alignclip.errors import UserError, few, one_line_errors
from alignclip.near import did_you_mean
from alignclip.runtime import console
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage import StorageError, open_store
from alignclip.weights import early
from alignclip.weights.figures import read_figures
from alignclip.weights.formats import FORMATS, format_named

# PyTorch is imported where a model is read: that takes seconds, and a wrong place should be told
# before.

EXPORT_EXAMPLES = """examples:
  # the latest checkpoint of a run → open_clip, with its metrics in the model card
  python convert/checkpoint.py s3://bucket/runs/first --to open_clip --out exports/first \\
    --metrics evaluation/results.json --license apache-2.0

  # one checkpoint → transformers' CLIPModel, and both encoders as ONNX
  python convert/checkpoint.py runs/first/ep30-ba5000-rank0.pt --to huggingface --onnx \\
    --out exports/first-hf

  # the authors' weights → a checkpoint to train on from
  python convert/checkpoint.py AlignCLIP.pt --to composer --out exports/published

  # an open_clip model from the Hub → ONNX and open_clip files in a bucket
  python convert/checkpoint.py hf-hub:org/name --to open_clip --onnx --out s3://bucket/exports/name
"""


@dataclass
class ExportOptions:
    """The settings of one conversion.

    Attributes:
        source: anything that :func:`alignclip.load` takes.
        to: one of the names in :data:`alignclip.weights.formats.FORMATS`.
        out: a folder, local or in object storage, that doesn't exist yet.
        onnx: also write both encoders as ONNX.
        metrics: ``results.json`` of ``evaluate.py``, for the model card; of these weights.
        license: of the export; null takes the source's.
        model_config: a YAML file with a ``model`` section, where nothing beside the source says
            what model it is.
    """

    source: str = setting(
        flags=("source",),
        place=True,
        help="a run's folder or checkpoint, an authors' release, an open_clip or Hugging Face "
        "export: a path, a URL or hf-hub:ORG/NAME",
    )
    to: str = setting(choices=tuple(FORMATS), help="format to write")
    out: str = setting(place=True, metavar="FOLDER", help="a new folder, or s3://, gs://, oci:// …")
    onnx: bool = setting(False, help="write both encoders as ONNX graphs as well")
    metrics: str | None = setting(
        None,
        place=True,
        metavar="FILE",
        help="results.json of evaluate.py on this model, for its card",
    )
    license: str | None = setting(
        None,
        metavar="ID",
        help="as the Hub writes it, e.g. apache-2.0 (default: the source's)",
    )
    model_config: str | None = setting(
        None,
        place=True,
        metavar="YAML",
        help="a file with the model section, for sources without one",
    )


def parse(arguments: Sequence[str] | None = None) -> ExportOptions:
    """Read the command line."""
    return read_options(
        ExportOptions,
        arguments,
        "convert/checkpoint.py",
        "Convert a trained model to another format, and check the result.",
        EXPORT_EXAMPLES,
    )


def check_options(options: ExportOptions) -> None:
    """Look at what is read and written, as far as that is known without reading a model.

    Raises:
        UserError: no such source or file, or ``out`` is there already or can't be written.
    """
    check_settings(options)
    _check_out(options.out)
    for flag, file in (("--metrics", options.metrics), ("--model-config", options.model_config)):
        if file and not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file{did_you_mean(file)}")
    if options.metrics:
        read_figures(options.metrics)
    early.check_weights("source", options.source)


def _check_out(out: str) -> None:
    """See that the export has a new place.

    Raises:
        UserError: it can't be reached or written, or there is something.
    """
    store = open_store(out)
    if not store.is_remote and Path(store.place).exists():
        raise UserError(f"--out {out} is there already; choose another or remove it")
    try:
        there = store.names()
        store.check_writable()
    except StorageError as error:
        raise UserError(f"cannot write to {out}: {error.why}") from error
    if there:
        raise UserError(
            f"--out {out} holds files already ({few(sorted(there))}); remove them, or choose "
            "another"
        )


def run_export(options: ExportOptions) -> float:
    """Check the options, then read, write, read again and compare.

    Returns:
        the largest difference of a feature, see :func:`alignclip.weights.export.export_model`.
    """
    check_options(options)
    console.loading("PyTorch")
    with stand_ins():
        from alignclip.weights.export import export_model

    return export_model(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say how far the export is from the original and how it is loaded."""
    console.prepare_output()
    options = parse(arguments)
    with one_line_errors():
        worst = run_export(options)
    print(f"{options.out}: read again, the features differ by at most {worst:.1e}")
    usage = format_named(options.to).usage_at(options.out.rstrip("/"))
    print("\n".join(["next:", *(f"  {line}" for line in usage.splitlines() if line)]))
