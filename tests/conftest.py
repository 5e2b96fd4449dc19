"""What every test may use: a real S3 server; ``gpu`` tests are skipped where there is no CUDA device."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator

import pytest
from s3 import S3Server

from alignclip.shared_memory import NOTE, SHM

# The models are tiny: threads of several processes would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests reach nothing outside this machine: a model that isn't there is an error at once, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokenizers' own threads warn in forked DataLoader workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each StreamingDataset keeps the memory of all others open until its process ends: more files than many shells allow.
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name, value in server.env.items():
            patch.setenv(name, value)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(autouse=True)
def shared_memory_goes_with_the_test() -> Iterator[None]:
    """What a test's datasets have left: each new one opens the memory of all that are there, and would for ever."""
    yield
    for note in SHM.glob(f"*_{NOTE}"):
        if json.loads(note.read_text() or "{}").get("pid") == os.getpid():
            for path in SHM.glob(f"{note.name.split('_')[0]}_*"):
                path.unlink(missing_ok=True)
