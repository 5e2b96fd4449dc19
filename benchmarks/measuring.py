"""Time, CPU time and memory of a piece of work, in a process of its own, and the figures' JSON.

How a script measures, for instance ``loss.py``::

    numbers, quick = {"batch": (8192, "pairs")}, {"batch": 2048}
    options = parser_of("loss.py", …, numbers, quick).parse_args()
    figures = Figures("loss", options)
    seconds = in_turn(("ours", "plain"), options.repeats, measure)
    for name, runs in seconds.items():
        figures.add(f"{name}/time", runs, "s", "lower")
    figures.add_ratio("ours/time", "plain/time")
    figures.write()  # where --json PATH is given

``--quick`` takes the sizes of ``quick`` for whatever is not typed: two minutes on 2 cores, at most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from alignclip.device import processor_name
from alignclip.runtime.arguments import Parser
from alignclip.runtime.environment import PACKAGE, checkout, versions
from alignclip.runtime.threads import available_cores

Variant = TypeVar("Variant")
Found = TypeVar("Found")
Direction = Literal["higher", "lower"]  # of an improvement
CHECKOUT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20
Setting = str | int | float | bool | list[str] | list[int] | None


@dataclass(frozen=True)
class Timing:
    """The cost of a timed run.

    Attributes:
        seconds: by the clock.
        cpu: CPU seconds of all threads.
        peak: bytes that the work added to its process.
        result: without tensors, which would travel in shared memory.
    """

    seconds: float
    cpu: float
    peak: int
    result: Any = None


@dataclass(frozen=True)
class Figure:
    """A number that a script finds.

    Attributes:
        median: of the runs.
        unit: ``samples/s``, ``s``, ``MiB``, …; ``×`` for a ratio.
        better: the direction of an improvement.
        spread: half the distance between the lowest and the highest run, as a share of the median.
        compared: whether a baseline is held against it. What isn't ours is not compared, nor a
            figure with a ratio to something measured in the same run: the ratio says more.
    """

    median: float
    unit: str
    better: Direction
    spread: float
    compared: bool = True


@dataclass(frozen=True)
class Record:
    """The JSON of a script's run.

    Attributes:
        script: the name of the script, without its ending.
        hardware: a name for the processor and its cores, or for the GPU, that may be a file's.
        machine: the same for a reader.
        cores: that the process may use.
        versions: of Python and packages.
        load: of the machine at the start and at the end, over a minute.
        commit: of the code; with ``-dirty`` where files were changed, "" where it isn't known.
        date: UTC.
        settings: the script's options, without paths.
        figures: by name, ``what/quantity``.
    """

    script: str
    hardware: str
    machine: str
    cores: int
    versions: dict[str, str]
    load: tuple[float, float]
    commit: str
    date: str
    settings: dict[str, Setting]
    figures: dict[str, Figure]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Record:
        """Take a record from parsed JSON."""
        figures = {name: Figure(**figure) for name, figure in content["figures"].items()}
        return cls(**content | {"figures": figures, "load": tuple(content["load"])})


class Figures:
    """The figures of a script's run, which :meth:`write` turns into a :class:`Record`.

    Args:
        script: the name of the script, without its ending.
        options: the script's, from :func:`parser_of`.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, script: str, options: Namespace, device: str = "cpu") -> None:
        self.figures: dict[str, Figure] = {}
        self._script, self._options, self._device = script, options, device
        self._runs: dict[str, Sequence[float]] = {}
        self._load = os.getloadavg()[0]

    def add(
        self,
        name: str,
        runs: Sequence[float],
        unit: str,
        better: Direction,
        compared: bool = True,
    ) -> float:
        """Add a figure from what each run of it found, the first run first; return the median."""
        median = statistics.median(runs)
        self._runs[name] = runs
        self.figures[name] = Figure(_six(median), unit, better, _six(spread_of(runs)), compared)
        return median

    def add_ratio(self, name: str, beside: str) -> float:
        """Add the ratio of two figures, run by run; return the median of the ratios."""
        one, other = self.figures[name], self.figures[beside]
        if one.unit != other.unit:
            raise ValueError(f"{name} is in {one.unit}, {beside} in {other.unit}")
        pairs = zip(self._runs[name], self._runs[beside], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        for figure in (name, beside):
            self.figures[figure] = replace(self.figures[figure], compared=False)
        return self.add(f"{name} ÷ {beside}", ratios, "×", one.better)

    def record(self) -> Record:
        """Return the record of this run."""
        git = checkout(PACKAGE)
        settings = {
            name: value
            for name, value in vars(self._options).items()
            if name not in SHARED_FLAGS and not isinstance(value, Path)
        }
        return Record(
            script=self._script,
            hardware=hardware_name(self._device),
            machine=_hardware(self._device),
            cores=available_cores(),
            versions=versions(),
            load=(self._load, os.getloadavg()[0]),
            commit=f"{git.commit[:9]}{'-dirty' if git.dirty else ''}" if git else "",
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            settings=settings,
            figures=self.figures,
        )

    def write(self) -> None:
        """Write the record where ``--json`` says; nothing without it."""
        place: Path | None = self._options.json
        if place is None:
            return
        if place.is_dir():
            place = place / f"{self._script}.json"
        place.write_text(json_text(asdict(self.record())), encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Write JSON with a line for each object that holds no others."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    innermost = r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])"
    return re.sub(innermost, lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text) + "\n"


def spread_of(runs: Sequence[float]) -> float:
    """Return half the distance between the lowest and the highest run, in medians."""
    median = statistics.median(runs)
    return (max(runs) - min(runs)) / 2 / abs(median) if median else 0.0


def timed(work: Callable[[], Any], device: str = "cpu") -> Timing:
    """Run ``work``, and measure it."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:  # the highest so far is now what is resident
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = torch.cuda.memory_allocated() if cuda else highest_resident()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if cuda else highest_resident()
    return Timing(seconds, cpu, peak - before, result)


def highest_resident() -> int:
    """Bytes of resident memory, the highest so far; a new process inherits its ``ru_maxrss``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_a_process(function: Callable[..., Timing], *arguments: Any) -> Timing:
    """Call the function in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def in_turn(
    variants: Iterable[Variant], rounds: int, measure: Callable[[Variant], Found]
) -> dict[Variant, list[Found]]:
    """Measure the variants in turn: whatever else the machine does then hits all of them."""
    found: dict[Variant, list[Found]] = {variant: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant, done in found.items():
            done.append(measure(variant))
            print(f"{variant}, {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def this_machine(device: str = "cpu") -> str:
    """Name the processor, how many threads PyTorch has, and the load; or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name(device)
    load = f"load {os.getloadavg()[0]:.1f} before the start"
    return f"{_processor()}, {torch.get_num_threads()} threads, {load}"


def hardware_name(device: str = "cpu") -> str:
    """Return a name for the hardware that may be a file's: ``amd-epyc-7763-2-cores``."""
    words = re.sub(r"\((R|TM)\)|\b(\d+-Core|CPU|Processor)\b|@.*?(?=,|$)", " ", _hardware(device))
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _hardware(device: str) -> str:
    """Name the GPU, or the processor and how many of its cores this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name(device)
    cores = available_cores()
    return f"{_processor()}, {cores} {'core' if cores == 1 else 'cores'}"


def _processor() -> str:
    """Name the processor, or else its kind."""
    return processor_name() or platform.processor() or platform.machine()


def _six(number: float) -> float:
    """Round to six digits."""
    return float(f"{number:.6g}")


class BenchmarkParser(Parser):
    """A parser whose ``--quick`` replaces the sizes that are not typed."""

    quick: Mapping[str, Any]

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments."""
        options = super().parse_args(args)
        if options.quick:
            self.set_defaults(**{_attribute(name): size for name, size in self.quick.items()})
            options = super().parse_args(args)
        return options


SHARED_FLAGS = ("json", "quick")


def parser_of(
    script: str,
    description: str,
    examples: str,
    numbers: Mapping[str, tuple[int, str]],
    quick: Mapping[str, Any] | None = None,
) -> BenchmarkParser:
    """Make a parser with ``--json``, ``--quick`` and a flag for each of ``numbers``.

    Args:
        script: its file name.
        description: what it measures.
        examples: shown below the flags.
        numbers: name of a flag -> its default, and the words of its help.
        quick: flag, also one that the script adds itself -> its default where ``--quick`` is given.
    """
    parser = BenchmarkParser(f"python benchmarks/{script}", description, examples)
    parser.quick = quick or {}
    for name, (default, said) in numbers.items():
        text = f"{said} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=text)
    sizes = ", ".join(f"--{name} {_as_typed(size)}" for name, size in parser.quick.items())
    parser.add_argument("--quick", action="store_true", help=f"sizes for minutes: {sizes}")
    text = "write the figures there: a file, or a folder"
    parser.add_argument("--json", type=Path, metavar="PATH", help=text)
    return parser


def _as_typed(size: Any) -> str:
    """Write a flag's value as it is typed."""
    return " ".join(map(str, size)) if isinstance(size, list) else str(size)


def _attribute(flag: str) -> str:
    return flag.replace("-", "_")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
