"""The cost of waiting threads where cores are shared: a step of a small ViT beside busy processes.

libgomp's threads spin while they wait; ``OMP_WAIT_POLICY=PASSIVE``, which the commands set, has
them sleep. Every figure is a process of its own, the variants in turn; what is shown are medians
over the rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from measuring import Figures, in_turn, parser_of, this_machine

from alignclip.runtime.threads import available_cores

PLAIN, OURS = "libgomp's default", "OMP_WAIT_POLICY=PASSIVE"
WAIT_POLICIES: dict[str, dict[str, str]] = {  # name -> variables
    PLAIN: {},
    OURS: {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
THREADS_EXAMPLES = """examples:
  python benchmarks/threads.py                 # alone, and beside 2 busy processes a core
  python benchmarks/threads.py --busy 0 4 16 --rounds 5"""
STEP = """
import time, statistics, torch
from open_clip.transformer import VisionTransformer
torch.manual_seed(0)
model = VisionTransformer(64, 8, 192, 4, 3, 4, output_dim=192)
images, seconds = torch.randn(64, 3, 64, 64), []
for _ in range(6):
    start = time.perf_counter()
    model(images).sum().backward()
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds[1:]))
"""


def main() -> None:
    """Measure and print a table."""
    cores = available_cores()
    numbers = {"rounds": (3, "of each variant")}
    quick = {"rounds": 1, "busy": [cores]}
    parser = parser_of("threads.py", str(__doc__), THREADS_EXAMPLES, numbers, quick)
    text = "busy processes beside the step (default: %(default)s)"
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2 * cores], help=text)
    options = parser.parse_args()
    figures = Figures("threads", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    print(f"{'seconds a step':26}" + "".join(f"{f'{busy} busy':>12}" for busy in options.busy))
    shown: dict[str, list[float]] = {name: [] for name in WAIT_POLICIES}
    for busy in options.busy:
        spinning = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)
        ]
        try:
            found = in_turn(WAIT_POLICIES, options.rounds, step)
        finally:
            for process in spinning:
                process.kill()
                process.wait()
        names = {name: f"{name}, {busy} busy/time" for name in found}
        for name, seconds in found.items():
            shown[name].append(figures.add(names[name], seconds, "s", "lower"))
        figures.add_ratio(names[OURS], names[PLAIN])
    for name, medians in shown.items():
        print(f"{name:26}" + "".join(f"{seconds:12.2f}" for seconds in medians))
    figures.write()


def step(policy: str) -> float:
    """Return the median seconds of a step in a process with the policy's variables."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    command = [sys.executable, "-c", STEP]
    done = subprocess.run(
        command, env=plain | WAIT_POLICIES[policy], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
