"""The weights that a new run starts from, which of them are locked, and their licence."""

from __future__ import annotations

from alignclip.config.schema import RunConfig
from alignclip.model.encoders import CLIP
from alignclip.ranks import local_rank_zero_first, run_on_rank_zero
from alignclip.training.display import print_once
from alignclip.training.locking import lock_towers
from alignclip.training.resume import StartingPoint
from alignclip.training.run_record import record_card
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.licenses import card_of_run, named_license
from alignclip.weights.locate import CARD, text_beside
from alignclip.weights.start_from import load_pretrained


def load_starting_weights(
    config: RunConfig, encoders: CLIP, folder: SaveFolder | None, start: StartingPoint
) -> None:
    """Load the weights that a new run starts from, on every rank; then lock towers, new run or not.

    A run that goes on has its checkpoint: ``pretrained`` may be gone by then.

    Raises:
        UserError: see :func:`alignclip.weights.start_from.load_pretrained` and
            :func:`alignclip.training.locking.lock_towers`.
    """
    report = None
    if config.pretrained and not start.goes_on:
        place, shared_from = config.pretrained, config.pretrained_shared_from
        report = local_rank_zero_first(
            lambda: load_pretrained(encoders, place, shared_from, config.model)
        )
        print_once(report.text)
        run_on_rank_zero(lambda: keep_license(config, folder, place, report.license))
    if config.load_path and not start.goes_on:
        path = config.load_path
        run_on_rank_zero(
            lambda: keep_license(config, folder, path, named_license(text_beside(path, CARD)))
        )
    lock_towers(encoders, config, report)


def keep_license(
    config: RunConfig, folder: SaveFolder | None, place: str, license: str | None
) -> None:
    """Leave the licence of the starting weights beside the run's checkpoints for exports."""
    if folder is not None and license:
        record_card(folder, card_of_run(config.run_name, license, place))
