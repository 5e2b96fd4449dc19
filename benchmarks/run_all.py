"""Run every benchmark at its quick sizes, and compare the figures with this hardware's baseline.

The tables go to the standard output, and progress to the standard error. Exit status 1: a figure
fell by more than a tenth, or a script failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from comparison import BASELINES, compare, comparison_lines, read_baseline, save_baseline
from measuring import Record

from alignclip.runtime.arguments import Parser

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ("start", "step", "loss", "conversion", "loader", "evaluation", "threads", "memory")
SECONDS_OF_A_SCRIPT = 600.0  # at most, on a machine with other work
PACKAGE_MISSING = "is not installed"
RUN_ALL_EXAMPLES = """examples:
  python benchmarks/run_all.py                       # make bench
  python benchmarks/run_all.py --save                # make bench ARGS=--save
  python benchmarks/run_all.py --only loss conversion"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare.

    Returns:
        1 where a figure fell or a script failed; else 0.
    """
    parser = Parser("python benchmarks/run_all.py", __doc__, RUN_ALL_EXAMPLES)
    text = "make the figures the baseline of this hardware"
    parser.add_argument("--save", action="store_true", help=text)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="of them")
    options = parser.parse_args(arguments)
    records, failures = [], []
    for number, script in enumerate(options.only, 1):
        print(f"{script}, {number} of {len(options.only)}", file=sys.stderr, flush=True)
        print(f"\n== {script}", flush=True)
        start = time.monotonic()
        record, why = run_script(FOLDER / f"{script}.py")
        print(f"{why or 'ran'}, {time.monotonic() - start:.0f} s", flush=True)
        records += [record] if record else []
        failures += [f"{script}: {why}"] if why else []
    print()
    fell = show_comparison(records)
    for line in failures:
        print(line)
    if options.save:
        for path in save_baseline(records, BASELINES):
            print(f"saved: {os.path.relpath(path)}")
    return 1 if fell or any(PACKAGE_MISSING not in line for line in failures) else 0


def run_script(path: Path, seconds: float = SECONDS_OF_A_SCRIPT) -> tuple[Record | None, str]:
    """Run a script at its quick sizes.

    Returns:
        its record, None where it wrote none; and what went wrong, "" where nothing did.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "record.json")
        status, last = _run([sys.executable, str(path), "--quick", "--json", str(place)], seconds)
        record = None
        if place.is_file():
            record = Record.parse(json.loads(place.read_text(encoding="utf-8")))
    if record:
        return record, "" if status == 0 else f"status {status}: a figure is not as it should be"
    if missing := re.search(r"ModuleNotFoundError: No module named '(\w+)", last):
        return None, f"the package {missing[1]} {PACKAGE_MISSING}"
    if status == -signal.SIGKILL:
        return None, f"failed: it was killed, or took more than {seconds:g} s"
    return None, f"failed with status {status}: {last or 'it said nothing'}"


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command for so long at most; return its exit status and its last line of errors."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    assert process.stderr is not None
    timer = threading.Timer(seconds, _kill_group, [process.pid])
    timer.start()
    try:
        last = deque((_shown(line) for line in process.stderr), maxlen=1)
        return process.wait(), (last or [""])[0].strip()
    finally:
        timer.cancel()
        _kill_group(process.pid)  # what an interrupted script has left


def _shown(line: str) -> str:
    """Pass a line on to the standard error."""
    sys.stderr.write(line)
    sys.stderr.flush()
    return line


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def show_comparison(records: Sequence[Record]) -> bool:
    """Print the figures that changed; return whether one fell."""
    fell = False
    for hardware in dict.fromkeys(record.hardware for record in records):
        path = BASELINES / f"{hardware}.json"
        baseline = read_baseline(path)
        mine = [record for record in records if record.hardware == hardware]
        if not baseline:
            print(f"{hardware} has no baseline to compare with; make bench ARGS=--save writes one")
            continue
        print(f"beside the baseline {os.path.relpath(path)}:")
        for record in mine:
            if record.script not in baseline:
                print(f"{record.script}: not in the baseline; make bench ARGS=--save adds it")
                continue
            found = compare(baseline[record.script], record)
            fell = fell or bool(found.fell)
            for line in comparison_lines(record.script, found):
                print(line)
    return fell


if __name__ == "__main__":
    sys.exit(main())
