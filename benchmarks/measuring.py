"""Time, CPU time and memory of a piece of work, in a process of its own."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from alignclip.runtime.arguments import Parser

Variant, Figure = TypeVar("Variant"), TypeVar("Figure")


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


def timed(work: Callable[[], Any], device: str = "cpu") -> Timing:
    """Run ``work``, and measure it."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:  # the highest so far is now what is resident
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = torch.cuda.memory_allocated() if cuda else _highest_resident()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if cuda else _highest_resident()
    return Timing(seconds, cpu, peak - before, result)


def _highest_resident() -> int:
    """Bytes of resident memory, the highest so far; a new process inherits its ``ru_maxrss``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_a_process(function: Callable[..., Timing], *arguments: Any) -> Timing:
    """Call the function in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def in_turn(
    variants: Iterable[Variant], rounds: int, measure: Callable[[Variant], Figure]
) -> dict[Variant, list[Figure]]:
    """Measure the variants in turn: whatever else the machine does then hits all of them."""
    found: dict[Variant, list[Figure]] = {variant: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant, done in found.items():
            done.append(measure(variant))
            print(f"{variant}, {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def this_machine(device: str = "cpu") -> str:
    """Name the processor, how many threads PyTorch has, and the load."""
    if device == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(": ")[1] for line in info if line.startswith("model name")]
    name, load = (names or [platform.processor()])[0], os.getloadavg()[0]
    return f"{name}, {torch.get_num_threads()} threads, load {load:.1f} before the start"


def parser_of(
    script: str, description: str, examples: str, numbers: Mapping[str, tuple[int, str]]
) -> Parser:
    """Make a parser with a flag for each of ``numbers``: its default, and the words of its help."""
    parser = Parser(f"python benchmarks/{script}", description, examples)
    for name, (default, said) in numbers.items():
        text = f"{said} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=text)
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
