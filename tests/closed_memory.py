"""Shared memory in this process: what a piece of work has opened is closed behind the work."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def memory_let_go() -> Iterator[None]:
    """Close what datasets open in the block: Streaming keeps it to the end of the process."""
    if "streaming" not in sys.modules:
        yield
        return
    from streaming.base.shared import SharedMemory

    from alignclip.data.streaming_memory import install_patches

    install_patches()  # which wraps the same method
    opened: list[SharedMemory] = []
    initialise = SharedMemory.__init__

    def remember(self: Any, *args: object, **options: object) -> None:
        initialise(self, *args, **options)
        opened.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMemory, "__init__", remember)
        try:
            yield
        finally:
            for memory in opened:
                memory.cleanup()
                atexit.unregister(memory.cleanup)
