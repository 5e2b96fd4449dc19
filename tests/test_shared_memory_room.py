"""Room in shared memory: the estimate against what loaders really use, and what is said where
there is too little.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_set
from torch.utils.data import DataLoader, Dataset, default_collate

from alignclip.data import shared_memory_room as room
from alignclip.errors import UserError

SIZE, LENGTH, DIMENSION, BATCH, WORKERS, PREFETCH = 96, 16, 8, 32, 2, 3
PAGE = 4096


class Samples(Dataset[dict[str, torch.Tensor]]):
    """What a training sample holds."""

    def __len__(self) -> int:
        return 40 * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "image": torch.zeros(3, SIZE, SIZE, dtype=torch.uint8),
            "text": torch.zeros(LENGTH, dtype=torch.int64),
            "sample": torch.tensor(index),
            "semantic": torch.zeros(DIMENSION, dtype=torch.float16),
        }


def shared_bytes() -> int:
    """Bytes of the batches of this process's family: files of PyTorch's that are mapped or open,
    by inode.
    """
    me = os.getpid()
    family = [
        me,
        *(
            int(p)
            for p in Path(f"/proc/{me}/task/{me}/children").read_text(encoding="utf-8").split()
        ),
    ]
    found = {}
    for process in family:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                if "/dev/shm/torch_" in str(descriptor.readlink()):
                    stat = descriptor.stat()
                    found[stat.st_ino] = stat.st_blocks * 512
            except OSError:
                continue
    for line in Path(f"/proc/{me}/maps").read_text(encoding="utf-8").splitlines():
        if "/dev/shm/torch_" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.setdefault(int(line.split()[4]), end - begin)
    return sum(found.values())


def arrived(batches: Any) -> int:
    """How many batches wait: in the queue, and beside it those that came before their turn."""
    early = sum(len(task) > 1 for task in batches._task_info.values())
    return int(batches._data_queue.qsize()) + early


@pytest.mark.slow
@pytest.mark.skipif(not room.SHM.is_dir(), reason="shared memory is no folder here")
def test_the_estimate_holds_for_a_loader_whose_workers_run_ahead() -> None:
    import time

    batch = room.batch_bytes(BATCH, SIZE, LENGTH, DIMENSION)
    loader = DataLoader(
        Samples(),
        BATCH,
        num_workers=WORKERS,
        prefetch_factor=PREFETCH,
        collate_fn=default_collate,
        drop_last=True,
    )
    batches, most, held = iter(loader), 0, None
    for step in range(6):
        held = next(batches)
        deadline = time.monotonic() + 30
        while arrived(batches) < WORKERS * PREFETCH - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        most = max(most, shared_bytes())
        assert step < 6
    del held, batches
    estimate = room.loader_bytes(batch, WORKERS, PREFETCH)
    assert (WORKERS * PREFETCH - 2) * batch < most <= estimate  # enough, and not by far too much


def test_numbers() -> None:
    assert room.batch_bytes(256, 224) == 256 * 3 * 224**2 + PAGE
    assert room.loader_bytes(100, 0, 2) == 0
    assert room.loader_bytes(100, 8, 2) == 1800


@pytest.mark.parametrize(("free", "fits"), [(64, False), (2048, True)])
def test_containers(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of a Docker container has 64 MB.

    2 GB are enough for the defaults on one GPU with a batch of 512.
    """
    monkeypatch.setattr(room, "free_bytes", lambda: free * 2**20)
    batch = room.batch_bytes(512, 224, 77, 768)
    needed = room.loader_bytes(batch, 8, 2)
    if fits:
        room.check_room(needed, 1, 10_000_000, 8)
        return
    with pytest.raises(UserError) as error:
        room.check_room(needed, 1, 0, 8)
    text = str(error.value)
    assert text.startswith(
        "/dev/shm has 67 MB free on this machine, and the loaders of its 1 process need 1,4"
    )
    assert "docker run --shm-size=8g" in text
    assert "data.num_workers (0 needs none) or data.prefetch_factor" in text
    room.check_room(0, 1, 1_000_000, 0)  # without workers there is room


def test_ranks_and_the_order_of_an_epoch_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 64 * 2**20)
    room.check_room(20_000_000, 2, 0, 2)
    with pytest.raises(UserError, match="its 4 processes need 82 MB"):
        room.check_room(20_000_000, 4, 0, 2)
    with pytest.raises(
        UserError, match=r"need 82 MB of shared memory; .* or lower data\.epoch_size"
    ):
        room.check_room(0, 1, 10_030_127, 0)


def test_an_evaluation_goes_on_without_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 9_000_000)
    assert room.affordable_workers(4, 1_000_000, 100) == 0
    assert (
        "/dev/shm has 9 MB free, and 4 workers of this evaluation need 10 MB"
        in capsys.readouterr().err
    )
    assert room.affordable_workers(3, 1_000_000, 100) == 3
    assert room.affordable_workers(4, 1_000_000, 5) == 4  # a small set
    assert not capsys.readouterr().err
    monkeypatch.setattr(room, "free_bytes", lambda: None)
    assert room.affordable_workers(4, 10**12, 100) == 4


def test_training_looks_before_its_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.devices import DeviceCPU

    from alignclip.config.schema import DataConfig, RunConfig, StreamConfig
    from alignclip.training.build import build_data

    write_set(str(tmp_path / "set"), 64)
    streams = {"a": StreamConfig(local=str(tmp_path / "set"))}
    config = RunConfig(
        data=DataConfig(streams=streams, num_workers=2, num_canonical_nodes=1),
        global_train_batch_size=32,
    )
    monkeypatch.setattr(room, "free_bytes", lambda: 2**24)
    with pytest.raises(UserError, match=r"/dev/shm has 17 MB free on this machine"):
        build_data(config, DeviceCPU())
    config.data.num_workers = 0
    build_data(config, DeviceCPU()).dataset._locals_shm.cleanup()  # type: ignore[attr-defined]
