"""A comparison: checkpoints × evaluators, on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alignclip.config.schema import EvaluateConfig
from alignclip.data import shared_memory
from alignclip.device import autocast_dtype, choose_device
from alignclip.errors import UserError
from alignclip.evaluation import bars, plots
from alignclip.evaluation.curves import draw_curves, gap_curves
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.evaluator import Evaluator
from alignclip.evaluation.history import history_beside
from alignclip.evaluation.plots import PairFeatures
from alignclip.evaluation.report import (
    RESULTS,
    Compared,
    ComparisonReport,
    checkpoint_places,
    table,
)
from alignclip.evaluation.sets import OpenSets
from alignclip.model.encoders import CLIP
from alignclip.ranks import (
    errors_on_all_ranks,
    gather_objects,
    local_rank,
    rank,
    run_on_rank_zero,
    wait_for_all_ranks,
)
from alignclip.runtime.distributed import join_ranks
from alignclip.storage import check_folder_writable
from alignclip.weights.digest import weights_digest
from alignclip.weights.load import open_encoders


def run(config: EvaluateConfig, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Evaluate every checkpoint by every evaluator, on all ranks; rank 0 writes the results.

    An evaluator that can't be run is told before any other one runs, and again at the end; the
    others are run.

    Args:
        config: what is evaluated.
        known: why evaluators can't be run, as rank 0 has found out and told already.

    Returns:
        why evaluators could not be run, by their names.

    Raises:
        UserError: a checkpoint is not there, or not what it should be; ``out`` can't be written; no
            evaluator could be run.
    """
    device = choose_device(config.device)
    join_ranks("nccl" if device.type == "cuda" else "gloo", config.dist_timeout)
    if local_rank() == 0:
        shared_memory.remove_stale()
    run_on_rank_zero(lambda: _check_writable(config.out))
    models, compared = read_checkpoints(checkpoint_places(config))
    report = ComparisonReport(config, compared)
    told = gather_objects(list((known or {}).items()))
    report.failed |= {name: without_name(name, why) for name, why in told}
    evaluators = _open_evaluators(config, report.failed)
    pairs: dict[str, PairFeatures] = {}
    for name in compared:
        model = models.pop(name).to(device)
        encoder = Encoder(model, device, autocast_dtype(config.precision))
        for evaluator in evaluators:
            result = None
            of_several = name if len(compared) > 1 else None
            with _without_failing(report.failed, evaluator.name, of_several):
                result = evaluator(encoder)
            if result is None or rank() != 0:
                continue
            if result.pairs is not None:
                images, texts = result.pairs
                pairs[f"{name} · {evaluator.name}"] = (images.cpu(), texts.cpu())
            report.add(name, evaluator.name, result.metrics, result.chance, result.note)
        del model, encoder  # one checkpoint at a time is on the device
    run_on_rank_zero(lambda: finish(report, pairs))
    wait_for_all_ranks()
    return report.failed


def read_checkpoints(
    places: Mapping[str, str],
) -> tuple[dict[str, CLIP], dict[str, Compared]]:
    """Read the checkpoints that are compared, each once, at the beginning.

    A checkpoint that is not there should not be found out after hours with the others. A run may
    write over its latest checkpoint, or remove an old one, while others are evaluated: the models
    therefore wait in the CPU's memory, and digests and results are of the same weights.

    Returns:
        The models, and what rank 0 reports of them, by name.

    Raises:
        UserError: one is not there, or is no checkpoint of a CLIP.
    """
    models: dict[str, CLIP] = {}
    compared: dict[str, Compared] = {}
    for name, place in places.items():
        found = open_encoders(place)
        models[name] = found.model
        compared[name] = Compared(place, "", found.batch)
        if rank() == 0:
            compared[name].digest = weights_digest(found.model)
            compared[name].history = history_beside(place)
        # Python 3.12 may keep this function's frame for a while: an error in history_beside has it
        del found
    return models, compared


def _open_evaluators(config: EvaluateConfig, failed: dict[str, str]) -> list[Evaluator]:
    """Open the evaluators that can be run, and tell what is wrong with the others."""
    opened = OpenSets()
    ready: list[Evaluator] = []
    for name, evaluator in config.evaluators.items():
        if name not in failed:
            with _without_failing(failed, name):
                ready.append(Evaluator(name, evaluator, opened))
    return ready


@contextmanager
def _without_failing(
    failed: dict[str, str], name: str, checkpoint: str | None = None
) -> Iterator[None]:
    """Go on, on all ranks, without an evaluator that can't be run on one of them.

    ``checkpoint``: which of several it could not be run on.
    """

    try:
        with errors_on_all_ranks():
            yield
    except UserError as error:
        what = f"{checkpoint} · {name}" if checkpoint else name
        failed[what] = without_name(name, str(error))
        if rank() == 0:
            said = f"error: {what}: {failed[what]}; without it: evaluators.{name}=null"
            print(said, file=sys.stderr, flush=True)


def without_name(name: str, why: str) -> str:
    """Return what is wrong with an evaluator, for a line that begins with its name."""
    rest = why.removeprefix(f"evaluators.{name}")
    return rest.lstrip(":. ") if rest[:1] in (":", ".", " ") else why


def _check_writable(out: str) -> None:
    """See that the folder of the results can be written: better known now than after hours."""
    try:
        if "://" in out:
            raise UserError("results are written to a folder of this machine; copy them from there")
        check_folder_writable(Path(out))
    except UserError as error:
        raise UserError(f"out={out}: {error}") from None


def finish(report: ComparisonReport, pairs: Mapping[str, PairFeatures]) -> None:
    """Print the table, and write ``results.json`` and the plots of a comparison into its folder.

    Raises:
        UserError: no evaluator could be run.
    """
    if not any(report.results.values()):
        name, why = next(iter(report.failed.items()))
        raise UserError(f"nothing was evaluated: {name}: {why}")
    print(f"\n{table(report)}\n")
    report.write(complete=True)
    written = [RESULTS]
    for name, draw in _drawings(report, pairs).items():
        try:
            draw(report.out / f"{name}.png")
            written.append(f"{name}.png")
        except (ValueError, UserError) as error:  # the numbers are what counts, and are written
            print(f"{name}.png could not be drawn: {error}")
    print(f"written to {report.out}: {', '.join(written)}")
    for key, why in report.failed.items():
        print(f"not evaluated: {key}: {why}", flush=True)


def _drawings(
    report: ComparisonReport, pairs: Mapping[str, PairFeatures]
) -> dict[str, Callable[[Path], None]]:
    """Choose the plots of what was measured, by their names."""
    results, chance = report.results, report.chance
    measured = {name for _, _, metrics in report.measured() for name in metrics}
    curves = gap_curves(report)
    drawings: dict[str, Callable[[Path], None]] = {}
    if pairs:
        drawings["cosines"] = partial(plots.cosine_histograms, pairs)
        drawings["embeddings"] = partial(plots.embedding_maps, pairs)
        drawings["spectra"] = partial(plots.spectra, pairs)
    if "image_retrieval_recall@1" in measured:
        drawings["recall"] = partial(bars.recall_bars, results, chance=chance)
    if bars.PER_CLASS in measured:
        drawings["classes"] = partial(bars.accuracy_bars, results, chance=chance)
    if any(len({point.batch for point in points}) > 1 for points in curves.values()):
        drawings["gap"] = partial(draw_curves, curves)
    return drawings
