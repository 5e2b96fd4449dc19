"""Kill runs and conversions at random for hours, and see that nothing is lost: ``make soak``.

A round draws a command (ranks, DDP or FSDP2, workers, EMA, evaluators, the best checkpoint,
rotation; or a conversion) and gives it troubles: SIGKILL to all of it, to a rank, to a data worker;
SIGTERM; a store that is stopped or frozen; a checkpoint that is cut off. The command is repeated
until it is done. Its curve must be that of a run which nothing disturbed, to the last bit, and its
set must have the same bytes.

A round's number and seed say all that was drawn: ``--seed 7 --round 12`` repeats it.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes
import pytest
from closed_memory import memory_let_go
from recorder import DRAWS
from s3 import S3Server, point_at
from soak_conversion import convert_round
from soak_training import train_round
from soak_troubles import Round

from alignclip.runtime.arguments import Parser

KINDS: dict[str, Callable[[Round], None]] = {"training": train_round, "conversion": convert_round}
SHARE_OF_TRAINING = 0.75  # of the rounds
SOAK_EXAMPLES = """examples:
  make soak                                    # two hours
  make soak ARGS='--hours 8 --seed 7'
  python tests/soak.py --seed 7 --round 12     # one of its rounds again"""


@dataclass
class Tally:
    """What the rounds have come to."""

    rounds: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the table."""
        kinds = ", ".join(f"{count} of {kind}" for kind, count in self.rounds.items())
        lines = [
            f"rounds: {self.rounds.total()} ({kinds}), {self.starts} starts, "
            f"{self.troubles.total()} troubles, {len(self.failed)} failed",
            "",
            "| trouble | times |",
            "|---|--:|",
            *(f"| {name} | {count} |" for name, count in sorted(self.troubles.items())),
        ]
        return "\n".join([*lines, *(f"failed: {line}" for line in self.failed)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Go round until the time is up.

    Returns:
        1 where a round failed, else 0.
    """
    parser = Parser("python tests/soak.py", str(__doc__), SOAK_EXAMPLES)
    parser.add_argument("--hours", type=float, default=2.0, help="default: 2")
    parser.add_argument("--seed", type=int, help="of all that is drawn; new by default, printed")
    parser.add_argument("--round", type=int, help="only this round")
    parser.add_argument("--only", choices=KINDS, help="only rounds of this kind")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        server = S3Server(Path(folder, "s3"))
        point_at(server, patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv(DRAWS, "1")
        try:
            tally = _rounds(Path(folder), server, seed, options)
        finally:
            server.stop()
            processes.remove_leftovers()
    print(f"\nseed {seed}\n{tally.text()}", flush=True)
    return 1 if tally.failed else 0


def _rounds(folder: Path, server: S3Server, seed: int, options: Any) -> Tally:
    tally, shared = Tally(), dict[str, Any]()
    end = time.monotonic() + 3600 * options.hours
    number = options.round or 1
    while time.monotonic() < end:
        rng = random.Random(f"{seed}-{number}")
        kind = "training" if rng.random() < SHARE_OF_TRAINING else "conversion"
        kind = options.only or kind
        here = Round(folder / f"round-{number}", rng, server, shared)
        began = time.monotonic()
        try:
            with memory_let_go():
                KINDS[kind](here)
            outcome = "as undisturbed"
        except Exception as error:  # whatever a round meets is what is looked for
            outcome = f"FAILED: {' '.join(str(error).split())[:300]}"
            tally.failed.append(f"--seed {seed} --round {number}: {outcome}")
            _keep(here, traceback.format_exc())
        here.mend()
        tally.rounds[kind] += 1
        tally.starts += here.starts
        tally.troubles.update(here.struck)
        said = ", ".join(here.struck) or "none"
        print(
            f"{number} {kind} ({here.what}): {here.starts} starts, {said}: {outcome}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        here.remove()
        if options.round:
            break
        number += 1
    return tally


def _keep(here: Round, trace: str) -> None:
    """Leave what a failed round has written in the working directory."""
    kept = Path(f"soak-failed-{here.folder.name}")
    with suppress(OSError):
        shutil.move(here.folder, kept)
        here.folder = kept
        here.is_kept = True
        (kept / "trace.txt").write_text(trace, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
