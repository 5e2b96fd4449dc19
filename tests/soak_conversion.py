"""A round of the soak in which a set is converted."""

from __future__ import annotations

from conversions import Command, Undisturbed, download, said
from soak_troubles import (
    PASSING,
    Round,
    Trouble,
    freeze_store,
    interrupt,
    kill_all,
    kill_child,
    stop_store,
    strike,
    terminate,
)

TARS, SAMPLES = 12, 12
LATEST_STRIKE = 5.0  # seconds
MOST_STRIKES = 6
TROUBLES: list[Trouble] = [kill_all, kill_all, kill_child, terminate, interrupt]


def convert_round(here: Round) -> None:
    """Convert through troubles, and compare the set with that of a conversion without any.

    Raises:
        AssertionError: something was lost, or a command hung.
    """
    rng = here.rng
    if "tars" not in here.shared:
        here.shared["tars"] = Undisturbed(here.folder.parent / "tars", TARS, SAMPLES)
    undisturbed: Undisturbed = here.shared["tars"]
    in_bucket, processes = rng.random() < 0.5, rng.choice((1, 2, 3))
    out = f"{here.bucket()}/set" if in_bucket else str(here.folder / "set")
    here.what = f"{'bucket' if in_bucket else 'folder'}, {processes} processes"
    troubles = TROUBLES + ([stop_store, freeze_store] if in_bucket else [])
    while not _is_done(here, undisturbed, out, processes, troubles):
        assert here.starts <= 2 * MOST_STRIKES, "the conversion doesn't come to its end"
    where = here.folder / "set"
    undisturbed.assert_same(download(here.server, out, where) if in_bucket else where)


def _is_done(
    here: Round, undisturbed: Undisturbed, out: str, processes: int, troubles: list[Trouble]
) -> bool:
    here.starts += 1
    before = len(here.struck)
    folder = here.folder / f"start-{here.starts}"
    with Command(folder, undisturbed.tars, out, processes=processes) as command:
        status: int | None = None
        while status is None and len(here.struck) < MOST_STRIKES and here.rng.random() < 0.8:
            status = strike(command.driver, here, troubles, LATEST_STRIKE)
        if status is None:
            command.finish()
            return True
        if status:
            struck, errors = here.struck[before:], command.errors
            assert struck, f"ended with {status} by itself: {errors}"
            assert "Traceback" not in errors, errors
            if struck[-1] in {one.__name__ for one in PASSING}:
                # a start says at once that it can't reach the store; a conversion at work waits
                assert said(errors)[-1].startswith("error: cannot reach"), errors
        return status == 0
