"""Loss terms and evaluation tasks: a file of code each, found by the name that it has in a YAML.

CONTRIBUTING.md shows how to add one. A module has a dataclass ``Settings``: the keys that a YAML
may hold, with defaults, and by :func:`alignclip.config.setting.setting` with ranges and choices.
The reader (:mod:`alignclip.config.reading`) takes these keys as strictly as all others. The module
imports PyTorch, Composer and NumPy inside of functions only: reading a YAML imports the module, and
a typo shall be told within a second.

- A loss term is a mapping below ``loss`` by the term's name: ``loss: {alpha: 1, cyclip: {}}``. The
  term's ``Settings`` are ``config.loss.terms["cyclip"]``. A term that no file names, or that is
  null, is off and not in ``terms``.
- A task's keys stand beside the keys that every evaluator has: ``evaluators: {probe: {task:
  linear_probe, remote: …, train: {remote: …}}}``. The task's ``Settings`` are
  ``config.evaluators["probe"].settings``. A field without a default is a key that the task needs.
  The module also has ``METRICS`` (:class:`alignclip.config.metrics.Metric`) and ``COLUMN``, the
  column of its sets besides ``image``; None where ``remote`` or ``local`` is no set but a file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from alignclip.errors import UserError, nearest

# the name in a YAML → the module
LOSS_TERMS: dict[str, str] = {
    "cyclip": "alignclip.losses.cyclip",
}
TASKS: dict[str, str] = {
    "zero_shot": "alignclip.evaluation.tasks.zero_shot",
    "out_of_distribution": "alignclip.evaluation.tasks.out_of_distribution",
    "linear_probe": "alignclip.evaluation.tasks.linear_probe",
    "clustering": "alignclip.evaluation.tasks.clustering",
    "retrieval": "alignclip.evaluation.tasks.retrieval",
    "gap": "alignclip.evaluation.tasks.gap",
    "sts": "alignclip.evaluation.tasks.sts",
}


def plugged(table: Mapping[str, str], name: str, where: str) -> ModuleType:
    """Import the module of a loss term or task.

    Args:
        table: :data:`LOSS_TERMS` or :data:`TASKS`.
        name: the name in the YAML.
        where: the key that holds the name, for messages.

    Raises:
        UserError: there is no such name; says which one is the nearest.
    """
    if name not in table:
        raise UserError(f"{where}={name}: {nearest(name, table)}")
    return importlib.import_module(table[name])


def plugged_settings(table: Mapping[str, str], name: str, where: str) -> type:
    """Return the ``Settings`` of a loss term or task.

    Raises:
        UserError: there is no such name.
    """
    found: type = plugged(table, name, where).Settings
    return found
