"""The progress bar of a conversion, and the numbers that its workers count up."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from tqdm import tqdm

from alignclip.conversion.records import Counts, total_of


def progress_bar(is_shown: bool = True, **settings: Any) -> tqdm:
    """Make a bar that writes few lines into a log file."""
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(mininterval=seconds, disable=not is_shown, **settings)


class Progress:
    """Numbers that the workers on this machine count up and the parent shows.

    Attributes:
        outage: how long storage has been away, for :mod:`alignclip.storage.patience`.
    """

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.outage: Synchronized[int] = spawn.Value("q", 0)
        self._written: Synchronized[int] = spawn.Value("q", 0)
        self._skipped: Synchronized[int] = spawn.Value("q", 0)

    def add(self, written: int, skipped: int) -> None:
        """Count so many more."""
        for number, counter in ((written, self._written), (skipped, self._skipped)):
            if number:
                with counter.get_lock():
                    counter.value += number

    @contextmanager
    def bar(self, finished: dict[str, Counts], inputs: int, is_shown: bool) -> Iterator[None]:
        """Show a bar, which a thread keeps up to date: the main thread may be converting.

        Args:
            finished: sub-folder -> counts; other threads add to it.
            inputs: number of all.
            is_shown: whether there is a bar.
        """
        if not is_shown:
            yield
            return
        bar = progress_bar(unit=" samples", smoothing=0.05, desc="converting")
        end = threading.Event()

        def keep() -> None:
            while not end.wait(0.5):
                self._show(bar, finished, inputs)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self._show(bar, finished, inputs)
            bar.close()

    def _show(self, bar: tqdm, finished: dict[str, Counts], inputs: int) -> None:
        """Update the bar; what is left is reckoned from the inputs that are finished."""
        now = total_of(list(finished.values()))
        # A cluster's workers only say what they have finished. No lock: a killed worker may have
        # it.
        written = max(now.written, self._written.get_obj().value)
        skipped = max(now.bad, self._skipped.get_obj().value)
        if finished:
            bar.total = max(written, round(now.written / len(finished) * inputs))
        often = [f"{reason} {number}" for reason, number in now.skipped.most_common(3)]
        reasons = f" ({', '.join(often)})" if often else ""
        shown = f"inputs {len(finished)}/{inputs}, skipped {skipped}{reasons}"
        bar.set_postfix_str(shown, refresh=False)
        bar.update(written - bar.n)
