"""The command ``composer evaluate.py config.yaml key.sub=value …``: checkpoints × evaluators → table, JSON, plots."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignclip.command import read_arguments
from alignclip.config import EvaluateConfig
from alignclip.config_file import load_evaluation
from alignclip.environment import versions
from alignclip.errors import UserError, one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """examples:
  composer evaluate.py yamls/evaluate.yaml checkpoint=runs/first evaluators.coco.remote=s3://my-bucket/eval/coco
  composer -n 8 evaluate.py yamls/evaluate.yaml checkpoint=s3://my-bucket/runs/first/latest-rank0.pt
  composer evaluate.py yamls/evaluate.yaml checkpoints.clip=runs/clip checkpoints.alignclip=runs/alignclip
an evaluator of the file that you don't want: evaluators.NAME=null"""

PLOTS = ("cosines", "embeddings", "spectra", "recall", "gap")
Metrics = dict[str, float]
Results = dict[str, dict[str, Metrics]]  # checkpoint → evaluator → metric → value
Pairs = tuple["Tensor", "Tensor"]


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say.

    Returns:
        the exit status: 0 done, 1 some evaluators could not be run, 2 bad input.
    """
    description = "Evaluate checkpoints: zero-shot, retrieval, linear probe, text similarity, modality gap."
    config, overrides = read_arguments(arguments, "composer evaluate.py", description, EXAMPLES)
    with one_line_errors():
        failed = run(load_evaluation(config, overrides))
    if not failed or os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    time.sleep(5)  # the launcher ends all others when one fails: they are done, and get the time to say so
    return 1


def run(config: EvaluateConfig) -> dict[str, str]:
    """Evaluate every checkpoint by every evaluator, on all ranks together; rank 0 writes what was found.

    An evaluator that can't be run is told at once, and again at the end; the others are.

    Returns:
        why evaluators could not be run, by their names.

    Raises:
        UserError: a checkpoint is not there, or not what it should be; ``out`` can't be written; no evaluator could be
            run.
    """
    from composer.utils import dist

    from alignclip import shared_memory
    from alignclip.evaluation.encoding import Encoder
    from alignclip.evaluation.ranks import agree
    from alignclip.evaluation.sets import OpenSets
    from alignclip.evaluation.tasks import Evaluator
    from alignclip.loading import load_encoders
    from alignclip.preflight import choose_device
    from alignclip.trainer_arguments import autocast_dtype

    device = choose_device(config.device)
    dist.initialize_dist(device, timeout=config.dist_timeout)
    if dist.get_local_rank() == 0:
        shared_memory.remove_stale()
    dist.barrier()
    agree(_make(Path(config.out)) if dist.get_global_rank() == 0 else None)
    results: Results = {}
    failed: dict[str, str] = {}
    pairs = {}
    opened = OpenSets()
    evaluators: dict[int, list[Evaluator]] = {}  # by image size
    places = _checkpoints(config)
    # all of them first: one that is not there should not be found out after hours with the others
    for name, model in {name: load_encoders(place) for name, place in places.items()}.items():
        device.module_to_device(model)
        encoder = Encoder(model, next(model.parameters()).device, autocast_dtype(config.precision))
        size = encoder.image_size
        if size not in evaluators:
            evaluators[size] = []
            for key, evaluator_config in config.evaluators.items():
                with _told(failed, key):
                    evaluators[size].append(Evaluator(key, evaluator_config, size, opened))
        results[name] = {}
        for evaluator in evaluators[size]:
            encoder.batch_size = evaluator.config.batch_size
            result = None
            with _told(failed, evaluator.name, name if len(places) > 1 else None):
                result = evaluator(encoder)
            if result is None:
                continue
            results[name][evaluator.name] = result.metrics
            if dist.get_global_rank() == 0:
                if result.pairs is not None:
                    pairs[f"{name} · {evaluator.name}"] = (result.pairs[0].cpu(), result.pairs[1].cpu())
                write_results(config, results, failed, complete=False)  # what is found is not lost with the rest
        model.cpu()
    if not any(results.values()):
        raise UserError(f"nothing was evaluated: {next(iter(failed.values()))}")
    if dist.get_global_rank() == 0:
        print(f"\n{table(results)}\n")
        write(config, results, pairs, failed)
        for key, why in failed.items():
            print(f"not evaluated: {key}: {why}", flush=True)
    dist.barrier()
    return failed


@contextmanager
def _told(failed: dict[str, str], name: str, checkpoint: str | None = None) -> Iterator[None]:
    """Go on without an evaluator that can't be run, on all ranks: a set on one of them alone is no set.

    ``checkpoint``: which of several it could not be run on.
    """
    from alignclip.evaluation.ranks import agree, rank

    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    try:
        agree(failure)
    except UserError as error:
        what = f"{checkpoint} · {name}" if checkpoint else name
        failed[what] = str(error)
        if rank() == 0:
            print(f"error: {what}: {error}; without it: evaluators.{name}=null", file=sys.stderr, flush=True)


def _make(out: Path) -> UserError | None:
    """The folder for what is found: better known to be unwritable now than after hours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        return UserError(f"out={out}: {error.strerror}")
    return None


def table(results: Results) -> str:
    """Metrics in rows, checkpoints in columns."""
    names = list(results)
    rows = [["", *names]]
    metrics = {key: found for one in results.values() for key, found in one.items()}  # one may lack what another has
    for evaluator in metrics:
        rows.append([evaluator, *[""] * len(names)])
        for metric in metrics[evaluator]:
            rows.append([f"  {metric}", *(_number(results[name].get(evaluator, {}).get(metric)) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:g}"


def write(config: EvaluateConfig, results: Results, pairs: dict[str, Pairs], failed: dict[str, str]) -> None:
    """``results.json`` and the plots, into ``config.out``."""
    from alignclip.evaluation import plots

    out = Path(config.out)
    write_results(config, results, failed, complete=True)
    checkpoints = _checkpoints(config)
    drawings: dict[str, Callable[[Path], None]] = {}
    if pairs:
        drawings["cosines"] = lambda path: plots.cosine_histograms(pairs, path)
        drawings["embeddings"] = lambda path: plots.embedding_maps(pairs, path)
        drawings["spectra"] = lambda path: plots.spectra(pairs, path)
    if any("image_retrieval_recall@1" in metrics for one in results.values() for metrics in one.values()):
        drawings["recall"] = lambda path: plots.recall_bars(results, path)
    points = list(gap_points(checkpoints, results))
    if len({batch for _, batch, _ in points}) > 1:
        drawings["gap"] = lambda path: plots.gap_against_step(points, path)
    written = ["results.json"]
    for name in PLOTS:  # of an earlier evaluation: they belong to other results
        (out / f"{name}.png").unlink(missing_ok=True)
    for name, draw in drawings.items():
        try:
            draw(out / f"{name}.png")
            written.append(f"{name}.png")
        except (ValueError, UserError) as error:  # the numbers are what counts, and they are written
            print(f"{name}.png could not be drawn: {error}")
    print(f"written to {out}: {', '.join(written)}")


def write_results(config: EvaluateConfig, results: Results, failed: dict[str, str], complete: bool) -> None:
    """``results.json``; a number that is none is null there. ``complete``: whether nothing will be added."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "complete": complete,
        "checkpoints": _checkpoints(config),
        "precision": config.precision,
        "results": {
            checkpoint: {
                evaluator: {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                for evaluator, metrics in found.items()
            }
            for checkpoint, found in results.items()
        },
        "failed": failed,
        "versions": versions(),
    }
    partial = out / ".results.json.partial"
    partial.write_text(json.dumps(content, indent=2, allow_nan=False))
    partial.replace(out / "results.json")


def _checkpoints(config: EvaluateConfig) -> dict[str, str]:
    return {"model": config.checkpoint} if config.checkpoint else config.checkpoints


def gap_points(checkpoints: dict[str, str], results: Results) -> Iterator[tuple[str, int, Metrics]]:
    """(run, batch, gap metrics) of the checkpoints whose file names tell their batch (``ep1-ba200-rank0.pt``)."""
    found = {name: re.match(r"(?:(.*)/)?ep\d+-ba(\d+)[^/]*$", place) for name, place in checkpoints.items()}
    folders = {one[1] or "run" for one in found.values() if one}
    short = {folder: folder.rpartition("/")[2] for folder in folders}
    if len(set(short.values())) < len(folders):  # runs of one name in several places
        short = {folder: folder for folder in folders}
    for name, one in found.items():
        for evaluator, metrics in results[name].items():
            if one and "centroid_distance" in metrics:
                yield f"{short[one[1] or 'run']} · {evaluator}", int(one[2]), metrics
