"""The command ``composer pretrain.py config.yaml key.sub=value …``, and its exit status."""

from __future__ import annotations

from collections.abc import Sequence

from alignclip.config.reading import load
from alignclip.errors import one_line_errors
from alignclip.runtime import console, launcher
from alignclip.runtime.arguments import read_arguments
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage import leaving_nothing
from alignclip.weights import early

PRETRAIN_EXAMPLES = """examples:
  composer pretrain.py yamls/alignclip.yaml run_name=first \\
    data.streams.cc12m.remote=s3://my-bucket/cc12m
  composer -n 2 pretrain.py yamls/quickstart.yaml run_name=small save_folder=runs/{run_name} \\
    data.streams.scenes=null data.streams.mine.local=/data/mine
  composer pretrain.py yamls/alignclip.yaml save_interval=1000ba \\
    save_folder=s3://my-bucket/runs/{run_name}
  composer pretrain.py yamls/alignclip.yaml \\
    data.streams.cc12m=null data.streams.mine.local=/data/mine
  composer pretrain.py s3://my-bucket/runs/first/config.yaml run_name=again  # another run's
  composer pretrain.py yamls/alignclip.yaml run_name=first --dry-run=3  # what will it take?
the same command goes on with a run that was stopped or killed"""


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say.

    Returns:
        the exit status: 0 finished, 2 bad input, 3 numbers that are not finite, 4 a checkpoint that
        could not be saved, 5 data that can't be read any more, 6 a rank or a data worker was lost,
        143 stopped by a signal with everything saved.
    """
    console.prepare_output()
    asked = read_arguments(
        arguments,
        "composer pretrain.py",
        "Pretrain CLIP, SharedCLIP or AlignCLIP.",
        PRETRAIN_EXAMPLES,
        has_dry_run=True,
    )
    with one_line_errors():
        launcher.settle()
        launcher.end_with_launcher()
        settings = load(asked.config, asked.overrides)
        with stand_ins():
            # Composer's import takes seconds, and a wrong place should be told at once
            early.check_run(settings)
            console.loading("PyTorch and Composer")
            from alignclip.data import workers
            from alignclip.runtime import attendance
            from alignclip.training.dry_run import dry_run
            from alignclip.training.run import run

        with (
            leaving_nothing(early.save_folder(settings)),
            attendance.failures_told(),
            workers.killed_by_a_failure(),
        ):
            status = run(settings) if asked.dry_run is None else dry_run(settings, asked.dry_run)
            attendance.end()
    return status
