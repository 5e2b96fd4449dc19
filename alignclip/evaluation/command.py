"""The command ``composer evaluate.py config.yaml key.sub=value …``: checkpoints × evaluators."""

from __future__ import annotations

import os
from collections.abc import Sequence

from alignclip.config.plugged import TASKS
from alignclip.config.reading import load_evaluation
from alignclip.errors import one_line_errors
from alignclip.runtime import console, launcher
from alignclip.runtime.arguments import read_arguments
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage import leaving_nothing
from alignclip.weights import early

DESCRIPTION = f"Evaluate checkpoints: {', '.join(TASKS)}."
EVALUATE_EXAMPLES = """examples:
  composer evaluate.py yamls/evaluate.yaml checkpoint=runs/first \\
    evaluators=null evaluators.coco.task=retrieval evaluators.coco.remote=s3://my-bucket/eval/coco
  composer -n 8 evaluate.py yamls/evaluate.yaml checkpoint=s3://my-bucket/runs/first/latest-rank0.pt
  composer evaluate.py yamls/evaluate.yaml checkpoints.clip=runs/clip \\
    checkpoints.alignclip=runs/alignclip
an evaluator of the file that you don't want: evaluators.NAME=null"""


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say.

    Returns:
        the exit status: 0 done, 1 some evaluators could not be run, 2 bad input, 6 a rank was
        lost.
    """
    console.prepare_output()
    said = (DESCRIPTION, EVALUATE_EXAMPLES)
    asked = read_arguments(arguments, "composer evaluate.py", *said)
    with one_line_errors():
        launcher.settle()
        launcher.end_with_launcher()
        settings = load_evaluation(asked.config, asked.overrides)
        with stand_ins():
            known = early.check_evaluation(settings)
            console.loading("PyTorch and Streaming")
            from alignclip.data import workers
            from alignclip.evaluation.comparison import run
            from alignclip.runtime import attendance

        with (
            leaving_nothing(settings.out),
            attendance.failures_told(),
            workers.deaths_explained(),
        ):
            failed = run(settings, known)
            attendance.end()
    if not failed or os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    # the launcher ends all others when one fails: they are done, and say so first
    launcher.wait_until_others_end()
    return 1
