"""What every test may use: real S3 servers, the fuzz tests' seeds.

Where ``gpu`` and ``full`` tests run.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
from closed_memory import memory_let_go
from own_hub import own_hub
from refusing import RefusingS3, refusing_s3
from s3 import S3Server, point_at, share_descriptions

from alignclip.storage import patience

# The models are tiny: threads of several processes would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests reach nothing outside this machine: a model that isn't there is an error at once, not a
# download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokenizers' own threads warn in forked DataLoader workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


processes.fork_what_this_process_would_spawn()

BLOCKED = signal.pthread_sigmask(signal.SIG_BLOCK, ())
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all fuzz, and the tests marked full")
    parser.addoption("--seed", type=int, help="of the fuzz and the kills; new with --full, else 0")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several workers of pytest-xdist
        config.option.seed = config.workerinput["seed"]
        return
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(10**6) if config.option.full else 0
    if getattr(config.option, "numprocesses", None) and not config.option.collectonly:
        processes.warm_server()  # one for all workers


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand the seed to a worker of pytest-xdist, whose options are those of the command line."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        processes.remove_leftovers()


def pytest_report_header(config: pytest.Config) -> str:
    full = "--full " if config.option.full else ""
    return f"fuzz and kills: {full}--seed {config.option.seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.full:
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Do once what many tests would do.

    The imports have made a million objects, which nobody gives back. Looking through them takes
    the garbage collector half a second each time.
    """
    share_descriptions()
    os.fsync = lambda _: None  # no test takes the power from the disk
    if torch := sys.modules.get("torch"):
        # seconds that PyTorch waits for each worker of a loader that ends; five otherwise
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0
    writer: Any = sys.modules.get("streaming.base.format.base.writer")
    if writer:
        writer.sleep = lambda _: time.sleep(0.001)  # a second, for a thread to begin
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _let_go_of_trainers() -> Iterator[None]:
    """Composer keeps each Trainer that nobody closes, with its model, to the end of the process.

    The C library keeps what was freed: a process of a thousand tests would take several GB.
    """
    yield
    if engine := sys.modules.get("composer.core.engine"):
        atexit.unregister(engine.Engine._close)
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


@dataclass(frozen=True)
class Fuzz:
    """How much is fuzzed, and from which seed.

    Attributes:
        seed: of the session.
        is_full: whether everything is; a fifth of it otherwise.
    """

    seed: int
    is_full: bool

    def rng(self, number: int) -> random.Random:
        """A generator of a test's own."""
        return random.Random(1000 * self.seed + number)

    def count(self, everything: int) -> int:
        """How many of them to try."""
        return everything if self.is_full else everything // 5


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    option = request.config.option
    return Fuzz(option.seed, option.full)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image–text set of 64 pairs, which no test changes."""
    from runs import write_set

    folder = tmp_path_factory.mktemp("data") / "set"
    write_set(str(folder), 64)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, started for the first test that asks.

    ``os.environ`` points at it to the session's end.
    """
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        point_at(server, patch)
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Hugging Face Hub on this machine; the folder of its repositories, ``org/name``."""
    with own_hub(tmp_path, monkeypatch) as root:
        yield root


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """The configuration of a run whose set is not there."""
    from runs import write_config

    return write_config(tmp_path, "somewhere")


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of files, as ``ulimit -f`` sets it; Python has the signal ignored."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B offline, as a process of its own has it: the settings of the first run hold to the end of
    the process.
    """
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a store that is away asked again soon; nothing is said of it so far."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # boto3 doesn't wait
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "_outage", patience._Outage())


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A Trainer blocks SIGTERM, and what a later test starts would inherit that."""
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, BLOCKED)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _shared_memory_goes_with_the_test() -> Iterator[None]:
    with memory_let_go():
        yield
