"""Seconds from a command to its first line and its first trained batch; the same after a kill.

The run is ``yamls/debug.yaml``, whose model and data take no time. Every figure is a command of its
own, the commands in turn; the table has medians over the rounds. The runs that are killed come
first, and bring what is imported into the system's memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from measuring import CHECKOUT, Figures, in_turn, parser_of, this_machine

START_EXAMPLES = """\
  python benchmarks/start.py
  git worktree add ../before COMMIT && python benchmarks/start.py --beside ../before
  python benchmarks/start.py --ranks 2 --repeats 5
  python benchmarks/start.py --quick --json figures/
"""
TRAINED_BATCH = re.compile(r"batch[ =](\d+)/")  # a line of the log, once a batch is trained
BEFORE = "before"  # names the rows of the other checkout
SECONDS_OF_A_COMMAND = 300.0  # at most
LAUNCHERS = ("composer", "torchrun", "python")
BIN = Path(sys.executable).parent
RUN_SETTINGS = (
    f"data.streams.scenes.local={CHECKOUT}/tests/fixtures/debug/mds",
    "save_interval=1ba",
    "max_duration=64ba",
    "log_to_console=true",
    "console_log_interval=1ba",
    "progress_bar=false",
)
TORCH = "import torch"
# commands that end by themselves
SHORT_COMMANDS = {
    TORCH: ("-c", "import torch"),
    "import alignclip": ("-c", "import alignclip"),
    "alignclip.load": ("-c", "import alignclip; alignclip.load"),
    "pretrain.py --help": ("pretrain.py", "--help"),
    "evaluate.py --help": ("evaluate.py", "--help"),
    "convert/cc12m.py --help": ("convert/cc12m.py", "--help"),
}


@dataclass(frozen=True)
class Seconds:
    """The seconds that a command took.

    Attributes:
        line: until its first line, of a run.
        batch: until the first batch of this start is trained, of a run.
        end: until its end, of a command that ends by itself.
    """

    line: float | None = None
    batch: float | None = None
    end: float | None = None


def launcher_of(name: str, ranks: int) -> list[str]:
    """Return the words before the name of the script."""
    return {
        "composer": [str(BIN / "composer"), "-n", str(ranks)],
        "torchrun": [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"],
        "python": [sys.executable],
    }[name]


@contextlib.contextmanager
def started(command: list[str], checkout: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a checkout, and kill it and all its processes when the block ends."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a checkout's own modules are compiled once
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(SECONDS_OF_A_COMMAND, _kill, [process.pid])
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        _kill(process.pid)
        process.wait()


def _kill(pid: int) -> None:
    """Kill a process and all that it has started; torchrun's are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def train_and_kill(launcher: list[str], checkout: Path, folder: Path, batches: int = 1) -> Seconds:
    """Start a run, or go on with it, and kill it when so many batches more are trained."""
    config = str(CHECKOUT / "yamls" / "debug.yaml")
    command = [*launcher, "pretrain.py", config, f"save_folder={folder}", *RUN_SETTINGS]
    begin, line, said = time.perf_counter(), 0.0, list[str]()
    with started(command, checkout) as process:
        assert process.stdout is not None
        first = 0
        for text in process.stdout:
            now = time.perf_counter() - begin
            line = line or now
            said.append(text)
            if found := TRAINED_BATCH.search(text):
                first = first or int(found[1])
                if int(found[1]) - first + 1 >= batches:
                    return Seconds(line, now)
    raise SystemExit(f"{' '.join(command)} ended:\n{''.join(said[-20:])}")


def start_new(launcher: list[str], checkout: Path) -> Seconds:
    """Start a run that is new."""
    with tempfile.TemporaryDirectory(prefix="alignclip-start-") as folder:
        return train_and_kill(launcher, checkout, Path(folder, "run"))


def go_on(launcher: list[str], checkout: Path, killed: Path) -> Seconds:
    """Go on with a copy of a run that was killed."""
    with tempfile.TemporaryDirectory(prefix="alignclip-start-") as folder:
        shutil.copytree(killed, Path(folder, "run"), symlinks=True)
        return train_and_kill(launcher, checkout, Path(folder, "run"))


def run_to_end(words: tuple[str, ...], checkout: Path) -> Seconds:
    """Run a command that ends by itself."""
    begin = time.perf_counter()
    with started([sys.executable, *words], checkout) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        if process.wait():
            raise SystemExit(f"{' '.join(words)} failed:\n{said}")
    return Seconds(end=time.perf_counter() - begin)


def commands(
    names: Sequence[str], ranks: int, checkouts: dict[str, Path], folder: Path
) -> dict[str, Callable[[], Seconds]]:
    """Return how each command is run, by the name of its row; make runs that are killed."""
    rows: dict[str, Callable[[], Seconds]] = {}
    for mark, checkout in checkouts.items():
        for name in names:
            launcher = launcher_of(name, ranks)
            killed = folder / str(len(rows))  # a name that no version reads as YAML
            train_and_kill(launcher, checkout, killed, batches=3)
            rows[f"{mark}{name} pretrain.py"] = partial(start_new, launcher, checkout)
            rows[f"{mark}{name} pretrain.py, after a kill"] = partial(
                go_on, launcher, checkout, killed
            )
        for name, words in SHORT_COMMANDS.items():
            rows[f"{mark}{name}"] = partial(run_to_end, words, checkout)
    return rows


def main() -> None:
    """Measure and print a table."""
    numbers = {"ranks": (1, "processes of a run; python starts one"), "repeats": (3, "of each")}
    parser = parser_of(
        "start.py", str(__doc__), START_EXAMPLES, numbers, {"launchers": ["python"], "repeats": 2}
    )
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=[*LAUNCHERS])
    text = "a checkout of another commit, whose figures stand beside ours"
    parser.add_argument("--beside", type=Path, metavar="PATH", help=text)
    options = parser.parse_args()
    if options.ranks > 1:
        options.launchers = [name for name in options.launchers if name != "python"]
    checkouts = {"": CHECKOUT}
    if options.beside is not None:
        checkouts[f"{BEFORE}: "] = options.beside.resolve()
        options.beside = str(options.beside)
    figures = Figures("start", options)
    print(f"{this_machine()}; {options.ranks} {'process' if options.ranks == 1 else 'processes'}")
    with tempfile.TemporaryDirectory(prefix="alignclip-start-") as folder:
        rows = commands(options.launchers, options.ranks, checkouts, Path(folder))
        found = in_turn(rows, options.repeats, lambda row: rows[row]())
    print(f"{'seconds until':44}{'first line':>12}{'first batch':>12}{'end':>12}")
    for row, starts in found.items():
        cells = [show(figures, row, starts, what) for what in ("line", "batch", "end")]
        print(f"{row:44}" + "".join(f"{cell:>12}" for cell in cells))
    for name in [name for name in figures.figures if not name.startswith((TORCH, BEFORE))]:
        figures.add_ratio(name, f"{TORCH}/end")
    figures.write()


def show(figures: Figures, row: str, starts: list[Seconds], what: str) -> str:
    """Add a figure of a row, and return its cell of the table; "" where the row has none."""
    runs = [seconds for one in starts if (seconds := getattr(one, what)) is not None]
    if not runs:
        return ""
    name = f"{row}/{what if what == 'end' else f'first {what}'}"
    return f"{figures.add(name, runs, 's', 'lower', compared=not row.startswith(BEFORE)):.1f}"


if __name__ == "__main__":
    main()
