"""The command ``composer evaluate.py config.yaml key.sub=value …``: checkpoints × evaluators → table, JSON, plots."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignclip.config.reading import load_evaluation
from alignclip.config.schema import EvaluateConfig
from alignclip.errors import UserError, one_line_errors
from alignclip.evaluation.history import Record, first_before, history_beside, run_folder
from alignclip.evaluation.report import RESULTS, Report, places, table
from alignclip.runtime import console, launcher
from alignclip.storage import check_folder_writable, leaving_nothing
from alignclip.training.command import read_arguments
from alignclip.weights import early

if TYPE_CHECKING:
    from torch import Tensor

    from alignclip.evaluation.curves import Point
    from alignclip.evaluation.evaluator import Evaluator

EXAMPLES = """examples:
  composer evaluate.py yamls/evaluate.yaml checkpoint=runs/first evaluators.coco.remote=s3://my-bucket/eval/coco
  composer -n 8 evaluate.py yamls/evaluate.yaml checkpoint=s3://my-bucket/runs/first/latest-rank0.pt
  composer evaluate.py yamls/evaluate.yaml checkpoints.clip=runs/clip checkpoints.alignclip=runs/alignclip
an evaluator of the file that you don't want: evaluators.NAME=null"""

Pairs = tuple["Tensor", "Tensor"]


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say.

    Returns:
        the exit status: 0 done, 1 some evaluators could not be run, 2 bad input.
    """
    console.prepare()
    description = (
        "Evaluate checkpoints: zero-shot, retrieval, linear probe, text similarity, modality gap."
    )
    config, overrides = read_arguments(arguments, "composer evaluate.py", description, EXAMPLES)
    with one_line_errors():
        launcher.settle()
        settings = load_evaluation(config, overrides)
        known = early.check_evaluation(settings)
        console.loading("PyTorch and Composer")
        with leaving_nothing(settings.out):
            failed = run(settings, known)
    if not failed or os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    # the launcher ends all others when one fails: they are done, and get the time to say so
    launcher.wait_until_others_end()
    return 1


def run(config: EvaluateConfig, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Evaluate every checkpoint by every evaluator, on all ranks together; rank 0 writes what was found.

    An evaluator that can't be run is told before any other one runs, and again at the end; the others are run.

    Args:
        config: what is evaluated.
        known: why evaluators can't be run, as rank 0 has found out and told already.

    Returns:
        why evaluators could not be run, by their names.

    Raises:
        UserError: a checkpoint is not there, or not what it should be; ``out`` can't be written; no evaluator could be
            run.
    """
    import torch
    from composer.utils import dist

    from alignclip.data import shared_memory
    from alignclip.evaluation.encoding import Encoder
    from alignclip.ranks import gather_objects, raise_on_all_ranks
    from alignclip.runtime.distributed import join_ranks
    from alignclip.training.preflight import choose_device
    from alignclip.training.trainer_arguments import autocast_dtype
    from alignclip.weights.digest import weights_digest
    from alignclip.weights.load import open_encoders

    device = choose_device(config.device)
    join_ranks(device.dist_backend, config.dist_timeout)
    if dist.get_local_rank() == 0:
        shared_memory.remove_stale()
    dist.barrier()
    first = dist.get_global_rank() == 0
    raise_on_all_ranks(_unwritable(config.out) if first else None)
    # all of them first: one that is not there should not be found out after hours with the others
    loaded = {name: open_encoders(place) for name, place in places(config).items()}
    models = {name: found.model for name, found in loaded.items()}
    batches = {name: found.batch for name, found in loaded.items()}
    digests = {name: weights_digest(model) if first else "" for name, model in models.items()}
    report = Report(config, digests, _past(config, batches), batches)
    report.failed |= dict(gather_objects(list((known or {}).items())))
    evaluators = _open_evaluators(
        config, {Encoder(m, torch.device("cpu")).image_size for m in models.values()}, report
    )
    pairs: dict[str, Pairs] = {}
    for name, model in models.items():
        device.module_to_device(model)
        encoder = Encoder(model, next(model.parameters()).device, autocast_dtype(config.precision))
        for evaluator in evaluators[encoder.image_size]:
            encoder.batch_size = evaluator.config.batch_size
            result = None
            with _told(report.failed, evaluator.name, name if len(models) > 1 else None):
                result = evaluator(encoder)
            if result is None or not first:
                continue
            if result.pairs is not None:
                pairs[f"{name} · {evaluator.name}"] = (result.pairs[0].cpu(), result.pairs[1].cpu())
            report.add(name, evaluator.name, result.metrics, result.chance, result.note)
        model.cpu()
    raise_on_all_ranks(_nothing(report) if first else None)
    if first:
        print(f"\n{table(report)}\n")
        finish(report, pairs)
        for key, why in report.failed.items():
            print(f"not evaluated: {key}: {why}", flush=True)
    dist.barrier()
    return report.failed


def _open_evaluators(
    config: EvaluateConfig, sizes: Iterable[int], report: Report
) -> dict[int, list[Evaluator]]:
    """The evaluators that can be run, by image size: what is wrong with one is told before another one runs."""
    from alignclip.evaluation.evaluator import Evaluator
    from alignclip.evaluation.sets import OpenSets

    opened = OpenSets()
    evaluators: dict[int, list[Evaluator]] = {size: [] for size in sizes}
    for name, evaluator in config.evaluators.items():
        for size, ready in evaluators.items():
            if name not in report.failed:
                with _told(report.failed, name):
                    ready.append(Evaluator(name, evaluator, size, opened))
    return evaluators


def _past(
    config: EvaluateConfig, batches: Mapping[str, int | None]
) -> dict[str, dict[str, Record]]:
    """Of each checkpoint the first evaluations of its run before it, which its figures are compared with."""
    return {
        name: first_before(history_beside(place), batches[name])
        for name, place in places(config).items()
    }


def _nothing(report: Report) -> UserError | None:
    if any(report.results.values()):
        return None
    name, why = next(iter(report.failed.items()))
    return UserError(f"nothing was evaluated: {name}: {why}")


@contextmanager
def _told(failed: dict[str, str], name: str, checkpoint: str | None = None) -> Iterator[None]:
    """Go on without an evaluator that can't be run, on all ranks: a set on one of them alone is no set.

    ``checkpoint``: which of several it could not be run on.
    """
    from alignclip.ranks import raise_on_all_ranks, rank

    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    try:
        raise_on_all_ranks(failure)
    except UserError as error:
        what = f"{checkpoint} · {name}" if checkpoint else name
        failed[what] = early.without_name(name, str(error))
        if rank() == 0:
            print(
                f"error: {what}: {failed[what]}; without it: evaluators.{name}=null",
                file=sys.stderr,
                flush=True,
            )


def _unwritable(out: str) -> UserError | None:
    """Why the folder of the results can't be written: better known now than after hours."""
    try:
        if "://" in out:
            raise UserError("results are written to a folder of this machine; copy them from there")
        check_folder_writable(Path(out))
    except UserError as error:
        return UserError(f"out={out}: {error}")
    return None


def finish(report: Report, pairs: dict[str, Pairs]) -> None:
    """``results.json`` and the plots of a comparison, into its folder."""
    from alignclip.evaluation import bars, plots
    from alignclip.evaluation.curves import draw_curves

    report.write(complete=True)
    drawings: dict[str, Callable[[Path], None]] = {}
    if pairs:
        drawings["cosines"] = lambda path: plots.cosine_histograms(pairs, path)
        drawings["embeddings"] = lambda path: plots.embedding_maps(pairs, path)
        drawings["spectra"] = lambda path: plots.spectra(pairs, path)
    measured = {
        name for found in report.results.values() for metrics in found.values() for name in metrics
    }
    if "image_retrieval_recall@1" in measured:
        drawings["recall"] = lambda path: bars.recall_bars(report.results, path, report.chance)
    if bars.CLASSES in measured:
        drawings["classes"] = lambda path: bars.accuracy_bars(report.results, path, report.chance)
    curves = gap_curves(report)
    if any(len({point.batch for point in points}) > 1 for points in curves.values()):
        drawings["gap"] = lambda path: draw_curves(curves, path)
    written = [RESULTS]
    for name, draw in drawings.items():
        try:
            draw(report.out / f"{name}.png")
            written.append(f"{name}.png")
        except (
            ValueError,
            UserError,
        ) as error:  # the numbers are what counts, and they are written
            print(f"{name}.png could not be drawn: {error}")
    print(f"written to {report.out}: {', '.join(written)}")


def gap_curves(report: Report) -> dict[str, list[Point]]:
    """The evaluations made in training of the runs whose checkpoints are compared, and these checkpoints' own.

    Each of several checkpoints is there, and called as in the table: as a point of its run's curve, or, where its batch
    is not known, as a level.
    """
    from alignclip.evaluation.curves import curves_of, levels_of, records_of

    compared = places(report.config)
    runs: dict[str, list[Record]] = {}
    names: dict[str, list[str]] = {}
    found: dict[str, dict[str, list[Point]]] = {}  # by the checkpoint that is compared first
    for name, place in compared.items():
        results = report.results.get(name, {})
        own = list(records_of(place, results, report.chance, report.batches.get(name)))
        past = history_beside(place)
        if own or past:
            folder = run_folder(place)
            names.setdefault(folder, []).append(name)
            runs[folder] = [*runs.get(folder, past), *own]
        if not own and len(compared) > 1:
            found[name] = levels_of(results, report.chance, name)
    for folder, records in runs.items():
        called = _called(folder, names, list(runs)) if len(compared) > 1 else ""
        found[names[folder][0]] = found.get(names[folder][0], {}) | curves_of(records, called)
    return {curve: points for name in compared for curve, points in found.get(name, {}).items()}


def _called(folder: str, names: Mapping[str, Sequence[str]], folders: Sequence[str]) -> str:
    """A run by its folder, with the name of its checkpoint before it, where there is but one."""
    short = [one.rpartition("/")[2] for one in folders]
    run = (
        folder.rpartition("/")[2] if len(set(short)) == len(short) else folder
    )  # runs of one name in several places
    (first, *others) = names[folder]
    return run if others or first == run else f"{first} ({run})"
