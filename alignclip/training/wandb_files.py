"""Read what W&B's files on this machine hold of a run, by private names of W&B.

W&B keeps a run's records in its own process, and writes them in blocks of 32 kB. A node that dies
leaves a file without the last of them, or an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

BLOCK = 2**15  # bytes that W&B keeps unwritten, at most
LoggedStep = tuple[int, frozenset[str]]  # and the metrics of this step
NOTHING: LoggedStep = (-1, frozenset())


def newest_step(folder: Path, run_id: str) -> LoggedStep:
    """Find the newest step of a run in W&B's files of all starts on this machine.

    Several starts may have logged metrics of one step.

    Args:
        folder: that W&B keeps its files in.
        run_id: of W&B.
    """
    found = NOTHING
    for file in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for step, names in logged_steps(file):
            if step > found[0]:
                found = step, names
            elif step == found[0]:
                found = step, found[1] | names
    return found


def logged_steps(file: Path) -> Iterator[LoggedStep]:
    """Yield the steps of a file of W&B, as far as the file is whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records_of(file):
        record = Record()
        record.ParseFromString(data)
        names = {item.key or "/".join(item.nested_key) for item in record.history.item}
        if names:
            yield record.history.step.num, frozenset(names)


def _records_of(file: Path) -> Iterator[bytes]:
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    try:
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            yield data
    except (AssertionError, OSError):  # cut off, or empty
        return
    finally:
        store.close()
