"""A step's time by part, from the events of PyTorch's profiler, as a table that a person reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg

from alignclip.model.encoders import IMAGE_ENCODER, TEXT_ENCODER

DATA_WAIT, TO_DEVICE, FORWARD = "data wait", "to the device", "normalise, rest of forward"
LOSS, BACKWARD, OPTIMIZER = "gather and loss", "backward", "optimizer"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"
CALLBACK, CALLBACKS = "callback", "other callbacks, loggers"
PROFILER, REST = "the profiler itself", "the rest"
AGAIN = "encoders again, in chunks"  # inside of the backward pass
# the rows of the table; the larger callbacks have rows of their own, before the other callbacks
PARTS = (
    DATA_WAIT, TO_DEVICE, FORWARD, IMAGE_ENCODER, TEXT_ENCODER, LOSS, BACKWARD, AGAIN, OPTIMIZER,
    EVALUATION, CHECKPOINT,
)  # fmt: skip
LAST_ROWS = (CALLBACKS, PROFILER, REST)
SMALL_SHARE = 0.01  # of a step: callbacks that take less have one row
# PyTorch's own ranges, by how their names begin
OF_PYTORCH = {"ProfilerStep": REST, "Optimizer.": OPTIMIZER}
TOP = 10  # operators
NAME = 44  # characters of an operator's name


@dataclass(frozen=True)
class PartTime:
    """A row: milliseconds a step, of the host and of the device; without what is inside of it."""

    name: str
    host: float
    device: float


@dataclass(frozen=True)
class Operator:
    """An operator: calls and milliseconds a step, without the operators that it calls."""

    name: str
    calls: float
    milliseconds: float


@dataclass(frozen=True)
class StepTable:
    """A step's time, the mean of some.

    Attributes:
        steps: measured.
        milliseconds: of a step.
        parts: whose times of the host add up to a step.
        operators: that take the most time, on the device where there is one.
        busy: share of the time in which the device worked; None without a GPU.
        waits: how often a step the host waited for the device, and the milliseconds.
    """

    steps: int
    milliseconds: float
    parts: list[PartTime]
    operators: list[Operator]
    busy: float | None
    waits: tuple[float, float]

    def share(self, name: str) -> float:
        """Return the share of a part in the host's time."""
        return sum(part.host for part in self.parts if part.name == name) / self.milliseconds


def measure(
    events: Iterable[FunctionEvent], averages: Iterable[FunctionEventAvg]
) -> StepTable | None:
    """Read the table off a profiler's events.

    Args:
        events: of all steps. The last step is left out where there are several: Composer doesn't
            mark all of it.
        averages: the same, by operator.

    Returns:
        None where no step is whole.
    """
    known = list(events)
    all_steps = [one for one in known if one.name.startswith("ProfilerStep") and _is_host(one)]
    all_steps.sort(key=lambda one: one.time_range.start)
    steps = all_steps[:-1] or all_steps
    if not steps:
        return None
    first, last = steps[0].time_range.start, steps[-1].time_range.end
    inside = [one for one in known if first <= one.time_range.start < last]
    host, device = _by_part(inside)
    scale = 1e3 * len(steps)  # the events are in microseconds
    _join_small(host, device, SMALL_SHARE * (last - first))
    callbacks = [name for name in host.keys() | device.keys() if name.startswith(f"{CALLBACK} ")]
    callbacks.sort(key=lambda name: host[name], reverse=True)
    rows = (*PARTS, *callbacks, *LAST_ROWS)
    parts = [PartTime(name, host[name] / scale, device[name] / scale) for name in rows]
    kernels = [one.time_range for one in inside if _is_kernel(one)]
    waits = [one.time_range.elapsed_us() for one in inside if _is_wait(one)]
    return StepTable(
        steps=len(steps),
        milliseconds=(last - first) / scale,
        parts=[one for one in parts if one.host or one.device],
        operators=_top(averages, len(all_steps), bool(kernels)),
        busy=_union((one.start, one.end) for one in kernels) / (last - first) if kernels else None,
        waits=(len(waits) / len(steps), sum(waits) / scale),
    )


def part_of(event: FunctionEvent) -> str | None:
    """Return the part that an event is a range of; None for an operator."""
    if event.name in (*PARTS, *LAST_ROWS) or event.name.startswith(f"{CALLBACK} "):
        return str(event.name)
    found = (part for start, part in OF_PYTORCH.items() if event.name.startswith(start))
    return next(found, None)


def _by_part(events: Sequence[FunctionEvent]) -> tuple[dict[str, float], dict[str, float]]:
    """Add up the host's and the device's microseconds by part."""
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    for event in filter(_is_host, events):
        around = [part for one in _around(event) if (part := part_of(one))]
        if part := part_of(event):
            time = event.time_range.elapsed_us()
            host[_row_of(part, around)] += time
            if around:
                host[_row_of(around[0], around[1:])] -= time
        elif event.kernels:
            # what no range is around was started by the thread of the backward pass
            where = _row_of(around[0], around[1:]) if around else BACKWARD
            device[where] += sum(kernel.duration for kernel in event.kernels)
    return host, device


def _join_small(host: dict[str, float], device: dict[str, float], small: float) -> None:
    """Put callbacks that take less than so many microseconds together."""
    for name in [one for one in host if one.startswith(f"{CALLBACK} ") and host[one] < small]:
        for times in (host, device):
            times[CALLBACKS] += times.pop(name, 0.0)


def _row_of(part: str, around: Sequence[str]) -> str:
    """Return the row of a part: encoders that run inside of the backward pass have their own."""
    is_again = part in (IMAGE_ENCODER, TEXT_ENCODER) and BACKWARD in around
    return AGAIN if is_again else part


def _around(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Yield the events around an event, the nearest first."""
    outer = event.cpu_parent
    while outer is not None:
        yield outer
        outer = outer.cpu_parent


def _is_host(event: FunctionEvent) -> bool:
    return event.device_type == DeviceType.CPU and not event.is_async


def _is_kernel(event: FunctionEvent) -> bool:
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def _is_wait(event: FunctionEvent) -> bool:
    return _is_host(event) and event.name.startswith("cuda") and "Synchronize" in event.name


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what at least one interval covers."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _top(averages: Iterable[FunctionEventAvg], steps: int, on_device: bool) -> list[Operator]:
    """Return the operators that take the most time."""
    found = [
        Operator(
            str(one.key),
            one.count / steps,
            (one.self_device_time_total if on_device else one.self_cpu_time_total) / 1e3 / steps,
        )
        for one in averages
        if one.device_type == DeviceType.CPU and not one.is_user_annotation
    ]
    return sorted(found, key=lambda one: one.milliseconds, reverse=True)[:TOP]


def table_text(table: StepTable, title: str, advice: str) -> str:
    """Return the table as text, which is Markdown as well.

    Args:
        table: the step's time.
        title: what was measured where.
        advice: what limits, and what to change.
    """
    step = table.milliseconds
    on_device = table.busy is not None
    head = ["part of a step", "ms", "share", *(["GPU ms", "GPU share"] if on_device else [])]
    rows = [
        [one.name, *_cells(one.host, step), *(_cells(one.device, step) if on_device else [])]
        for one in table.parts
    ]
    device = sum(one.device for one in table.parts)
    rows.append(["all", *_cells(step, step), *(_cells(device, step) if on_device else [])])
    operators = [
        [_short(one.name), f"{one.calls:,.0f}", *_cells(one.milliseconds, step)]
        for one in table.operators
    ]
    where = "on the GPU" if on_device else "on all threads"
    lines = [
        f"# {title}",
        f"A step takes {step:,.1f} ms, the mean of {table.steps}; other steps are faster, because "
        "nothing measures them.",
        *([_of_gpu(table)] if on_device else []),
        f"{advice[:1].upper()}{advice[1:]}.",
        _aligned_table(head, rows),
        _aligned_table([f"operator, {where}", "calls", "ms", "share"], operators),
    ]
    return "\n\n".join(lines) + "\n"


def _of_gpu(table: StepTable) -> str:
    count, milliseconds = table.waits
    return (
        f"The GPU works {100 * float(table.busy or 0):.0f} % of the time; the host waits for it "
        f"{count:.1f} times a step, {milliseconds:,.1f} ms."
    )


def _cells(milliseconds: float, step: float) -> list[str]:
    return [f"{milliseconds:,.2f}", f"{100 * milliseconds / step:.1f} %"]


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _aligned_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, (head, rule, *rows)))
