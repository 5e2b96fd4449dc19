"""What a run's trackers hold: how often each metric of each step, and with which values."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignclip.training.trackers import METRIC_LINE

Points = dict[tuple[str, int], list[float]]  # (metric, step) → all values


def steps_of(points: Points, name: str) -> list[int]:
    """The steps of a metric, each as often as it is there."""
    return sorted(step for (one, step), values in points.items() for _ in values if one == name)


def in_tensorboard(folder: Path) -> Points:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: Points = defaultdict(list)
    for name in accumulator.Tags()["scalars"]:
        for scalar in accumulator.Scalars(name):
            found[name, scalar.step].append(scalar.value)
    return found


def in_file(path: Path) -> Points:
    found: Points = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := METRIC_LINE.match(line):
            found[match[2], int(match[1])].append(float(line[match.end() :]))
    return found


def in_wandb(folder: Path) -> tuple[Points, set[tuple[str, str]]]:
    """The points of W&B's offline files, and project and id of their runs."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # as at the end of a process: a run that has finished may be in its file a moment later
    wandb.teardown()
    found: Points = defaultdict(list)
    ids = set()
    for file in folder.rglob("run-*.wandb"):
        for data in wandb_records(file):
            record = Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add((record.run.project, record.run.run_id))
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name in row.keys() - {"_step"}:
                found[name, row["_step"]].append(row[name])
    return found, ids


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of one of W&B's files; a file of a start that was killed is cut off."""
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    if file.stat().st_size == 0:
        return
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        yield data
