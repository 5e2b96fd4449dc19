"""Composer's profiler, with the parts of a step in its traces, and a table of the parts."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from composer.core import Event, State, Timestamp
from composer.loggers import Logger
from composer.profiler import JSONTraceHandler, Profiler, TraceHandler, cyclic_schedule
from composer.profiler.torch_profiler import TorchProfiler
from torch.profiler import record_function

from alignclip.config.schema import ProfilerSettings
from alignclip.errors import one_line
from alignclip.ranks import rank
from alignclip.training.display import say
from alignclip.training.pace import Pace, one_of
from alignclip.training.step_table import (
    BACKWARD,
    CALLBACK,
    DATA_WAIT,
    FORWARD,
    LOSS,
    PROFILER,
    TO_DEVICE,
    measure,
    table_text,
)

# the part that begins behind the callbacks of an event; None: the Trainer's own work
BEGINS = {
    Event.BEFORE_DATALOADER: DATA_WAIT,
    Event.AFTER_DATALOADER: None,
    Event.BEFORE_TRAIN_BATCH: TO_DEVICE,
    Event.BEFORE_FORWARD: FORWARD,
    Event.AFTER_FORWARD: LOSS,
    Event.AFTER_LOSS: None,
    Event.BEFORE_BACKWARD: BACKWARD,
    Event.AFTER_BACKWARD: None,
}
PROFILERS = {"Profiler", "SystemProfiler", "JSONTraceHandler"}
# TorchProfiler begins and ends a step of the trace, and this class begins parts: no range is around
BETWEEN = {"TorchProfiler", "StepParts"}


def build_profiler(config: ProfilerSettings) -> Profiler:
    """Build Composer's profiler; Chrome reads its traces. A resumed run writes its own."""
    arguments = dataclasses.asdict(config)
    cycle = {
        key: arguments.pop(key) for key in ("skip_first", "wait", "warmup", "active", "repeat")
    }
    return Profiler(
        schedule=cyclic_schedule(**cycle),
        trace_handlers=[
            JSONTraceHandler(folder=f"{config.torch_prof_folder}/composer", overwrite=True),
            StepParts(),
        ],
        torch_prof_overwrite=True,
        torch_prof_remote_file_name=None,
        **arguments,
    )


class StepParts(TraceHandler):
    """Marks the parts of a step while a profiler records, and writes :mod:`.step_table`.

    Beside each trace lies its table, ``rank0.12.step.md``; rank 0 shows the table, too. Composer
    calls the handlers of traces behind all callbacks, and marks each callback.
    """

    def __init__(self) -> None:
        self._part: record_function | None = None
        self._marks: dict[str, record_function] = {}
        self._state: State | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Begin the next part."""
        self._state = state
        if event not in BEGINS:
            return
        if self._part is not None:
            self._part.__exit__(None, None, None)
        self._part = _begin(name) if (name := BEGINS[event]) else None

    def process_duration_event(
        self,
        name: str,
        categories: list[str] | tuple[str, ...],
        is_start: bool,
        timestamp: Timestamp,
        wall_clock_time_ns: int,
    ) -> None:
        """Mark a callback or an algorithm: ``callback/Console/event/batch_end``."""
        kind, who, *_ = name.split("/")
        if kind not in ("callback", "algorithm") or who in BETWEEN:
            return
        if is_start:
            self._marks[name] = _begin(PROFILER if who in PROFILERS else f"{CALLBACK} {who}")
        elif (mark := self._marks.pop(name, None)) is not None:  # Composer ends what never began
            mark.__exit__(None, None, None)

    def process_chrome_json_trace_file(self, filepath: Path) -> None:
        """Write the table of a trace, beside it. Trouble is a warning."""
        try:
            self._write(filepath.with_name(f"{filepath.name.split('.pt.')[0]}.step.md"))
        except Exception as error:  # of PyTorch's profiler, or the file system
            logging.getLogger(__name__).warning(f"no table of a step's time: {one_line(error)}")

    def _write(self, path: Path) -> None:
        state = self._state
        assert state is not None
        torch_profiler = one_of(state, TorchProfiler)
        assert torch_profiler is not None
        assert torch_profiler.profiler is not None
        profile = torch_profiler.profiler
        table = measure(profile.events(), profile.key_averages())
        if table is None:
            return
        pace = one_of(state, Pace)
        advice = pace.advice(table.share(DATA_WAIT), state) if pace is not None else ""
        last = state.timestamp.batch.value
        title = (
            f"Where a step's time goes: run {state.run_name}, rank {rank()}, up to batch {last:,}"
        )
        text = table_text(table, title, advice)
        path.write_text(text, encoding="utf-8")
        if rank() == 0:
            say(f"\n{text}\nthe trace and this table are in {path.parent}")


def _begin(name: str) -> record_function:
    began = record_function(name)
    began.__enter__()
    return began
