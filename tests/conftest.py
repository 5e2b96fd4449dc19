"""What every test may use: a real S3 server; ``gpu`` tests are skipped where there is no CUDA device."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator

import pytest
from refusing import RefusingS3, refusing_s3
from s3 import S3Server
from streaming.base.shared import SharedMemory

# The models are tiny: threads of several processes would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests reach nothing outside this machine: a model that isn't there is an error at once, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokenizers' own threads warn in forked DataLoader workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, started for the first test that asks; ``os.environ`` points at it to the session's end."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        # credentials of the person who runs the tests would be mixed with the server's
        for name in (
            "AWS_SESSION_TOKEN",
            "AWS_PROFILE",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_REGION",
        ):
            patch.delenv(name, raising=False)
        for name, value in server.env.items():
            patch.setenv(name, value)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def refusing() -> Iterator[RefusingS3]:
    """An S3 server in memory that refuses what a test tells it to; ``os.environ`` points at it."""
    with refusing_s3() as server:
        yield server


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B offline, as a process of its own has it: the settings of the first run hold to the end of the process."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture(autouse=True)
def shared_memory_goes_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's datasets open is closed with them: Streaming keeps it to the end of the process."""
    opened: list[SharedMemory] = []
    initialise = SharedMemory.__init__

    def remember(self: SharedMemory, *args: object, **options: object) -> None:
        initialise(self, *args, **options)  # type: ignore[arg-type]
        opened.append(self)

    monkeypatch.setattr(SharedMemory, "__init__", remember)
    yield
    for memory in opened:
        memory.cleanup()
        atexit.unregister(memory.cleanup)
