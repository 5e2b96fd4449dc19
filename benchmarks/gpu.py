"""Measure one GPU in eight minutes: ceilings, exactness, loader, steps, a whole run.

Each step is a process of its own with a limit of its own, and the next step begins whatever becomes
of it. The last lines have a step each: its name, seconds, and what it found or why it failed. The
machine needs no network: pictures, captions and embeddings are drawn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from measuring import Figure, Figures, Record, parser_of

# Shared memory is where the set of drawn pictures is read from: no disk is measured.
MEMORY = Path("/dev/shm")
EXAMPLES = """examples:
  python benchmarks/gpu.py --json gpu.json
  python benchmarks/gpu.py --only ceilings eager
  python benchmarks/gpu.py --cpu                     # does it run? everything at tiny sizes"""


@dataclass(frozen=True)
class Step:
    """A part of the measurement.

    Attributes:
        module: is imported only where the step runs, because Composer takes seconds.
        function: takes a :class:`gpu_work.Work`, and returns what it found in words.
        seconds: that it may take.
    """

    module: str
    function: str
    seconds: float


# what is needed most comes first
STEPS = {
    "ceilings": Step("gpu_ceilings", "ceilings", 40),
    "exactness": Step("gpu_exactness", "exactness", 90),
    "eager": Step("gpu_steps", "eager", 120),
    "regional": Step("gpu_steps", "regional", 100),
    "set": Step("gpu_loading", "draw_set", 90),
    "train": Step("gpu_loading", "train", 100),
    "train_regional": Step("gpu_loading", "train_regional", 110),
    "loader": Step("gpu_loading", "loader", 100),
    "loss": Step("gpu_ceilings", "loss_alone", 60),
    "beside": Step("gpu_steps", "beside", 60),
    "waits": Step("gpu_steps", "waits", 60),
    "chunked": Step("gpu_steps", "chunked", 60),
    "compiled": Step("gpu_steps", "compiled", 150),
    "profile": Step("gpu_steps", "profile", 90),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps.

    Returns:
        1 where a step failed; else 0.
    """
    numbers = {"seconds": (480, "of all steps together")}
    parser = parser_of("gpu.py", str(__doc__), EXAMPLES, numbers)
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps")
    text = "where the drawn set goes, and steps' figures (default: a new one in memory)"
    parser.add_argument("--folder", type=Path, help=text)
    parser.add_argument("--step", choices=list(STEPS), help="run this step in this process")
    options = parser.parse_args(arguments)
    if options.step:
        return run_here(options)
    if not options.cpu and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use; --cpu runs tiny sizes")
    place = str(MEMORY) if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="alignclip-gpu-") as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        return run_all(options)


def run_here(options: Namespace) -> int:
    """Run one step in this process, and write its figures; a failure is the last line of errors."""
    from gpu_work import LARGE, TINY, Failed, Work

    device = "cpu" if options.cpu else "cuda"
    figures = Figures("gpu", options, device)
    try:
        step = STEPS[options.step]
        run = getattr(import_module(step.module), step.function)
        said = run(
            Work(torch.device(device), TINY if options.cpu else LARGE, options.folder, figures)
        )
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        figures.write()
    print(said)
    return 0


def run_all(options: Namespace) -> int:
    """Run each step in a process, print a line a step, and write all figures."""
    figures = Figures("gpu", options, "cpu" if options.cpu else "cuda")
    end, lines, failed = time.monotonic() + options.seconds, [], False
    for name in options.only:
        start = time.monotonic()
        limit = min(STEPS[name].seconds, end - start)
        is_good, said = run_step(name, options, limit)
        failed |= not is_good
        lines.append(f"{name:10}{time.monotonic() - start:6.1f} s  {'ok' if is_good else 'FAILED'}")
        lines[-1] += f"  {said}"
        print(lines[-1], file=sys.stderr, flush=True)
        figures.figures |= figures_of(options.folder, name)
        figures.write()  # after each step: whatever ends this process, they are there
    print("\n".join(lines), flush=True)
    return 1 if failed else 0


def run_step(name: str, options: Namespace, limit: float) -> tuple[bool, str]:
    """Run a step in a process; say whether it was well, and its last line."""
    if limit < 1:
        return False, "no time was left"
    command = [sys.executable, __file__, "--step", name, "--folder", str(options.folder)]
    command += ["--json", str(options.folder / f"{name}.json"), *(["--cpu"] if options.cpu else [])]
    alone = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        env=alone | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _, errors = end_group(process)
        print(errors[-4000:], file=sys.stderr)
        return False, f"more than {limit:.0f} s"
    text = said if process.returncode == 0 else errors
    if process.returncode:
        print(errors[-4000:], file=sys.stderr)
    for line in said.splitlines()[:-1]:
        print(f"  {line}", flush=True)
    last = text.strip().rpartition("\n")[2]
    return process.returncode == 0, last or f"exit status {process.returncode}"


def end_group(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process and what it has started, and return what they printed."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=10)
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def figures_of(folder: Path, name: str) -> dict[str, Figure]:
    """Return the figures that a step has written."""
    place = folder / f"{name}.json"
    if not place.is_file():
        return {}
    return Record.parse(json.loads(place.read_text(encoding="utf-8"))).figures


if __name__ == "__main__":
    sys.exit(main())
