"""The times of a configuration: numbers with a unit, which must go together."""

from __future__ import annotations

import math
import re

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError

# The schedule counts batches; Composer's intervals can be more. Without a unit Composer would take seconds or epochs.
_SCHEDULE_UNITS = {"ep": "epochs", "ba": "batches"}
_INTERVAL_UNITS = _SCHEDULE_UNITS | {"sp": "samples", "sec": "seconds", "dur": "a share of the run"}


def check_times(config: RunConfig) -> None:
    """Every time has a number and a unit that it may have, and the warm-up ends before the run.

    Raises:
        UserError: the first that doesn't.
    """
    schedule = {
        "max_duration": config.max_duration,
        "scheduler.t_warmup": config.scheduler.t_warmup,
    }
    intervals = {
        "save_interval": config.save_interval,
        "console_log_interval": config.console_log_interval,
    }
    intervals |= {
        f"evaluators.{name}.interval": e.interval for name, e in config.evaluators.items()
    }
    for times, units in ((schedule, _SCHEDULE_UNITS), (intervals, _INTERVAL_UNITS)):
        for key, text in times.items():
            found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([a-z]*)", text.strip().lower())
            number = _number(found[1]) if found else None
            if found is None or number is None or found[2] not in ("", *units):
                names = ", ".join(f"{unit} ({name})" for unit, name in units.items())
                raise UserError(f"{key}={text} is no time: write a number and a unit, {names}")
            if not found[2]:
                raise UserError(
                    f"{key}={text} has no unit: {text}ep (epochs) or {text}ba (batches)?"
                )
            if found[2] != "dur" and number != int(number):
                raise UserError(f"{key}={text}: the number before {found[2]} must be whole")
            if number <= 0 and key != "scheduler.t_warmup":
                raise UserError(f"{key}={text} must be positive")
    _check_warmup(config)


def _check_warmup(config: RunConfig) -> None:
    """The warm-up is shorter than the run, as far as that is known without the data's size."""
    warmup, duration = config.scheduler.t_warmup, config.max_duration
    (least, unit), (most, other) = _number_and_unit(warmup), _number_and_unit(duration)
    subset = config.train_subset_num_batches
    if unit == "ba" and other == "ep":  # an epoch has no more batches than the run is told to take
        most *= subset if subset > 0 else math.inf
    if least >= most:  # an epoch has a batch at least
        raise UserError(
            f"scheduler.t_warmup={warmup} must be shorter than max_duration={duration}; 0ba is none"
        )


def _number_and_unit(time: str) -> tuple[float, str]:
    text = time.strip().lower()
    return float(text[:-2]), text[-2:]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
