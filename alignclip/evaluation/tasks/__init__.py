"""The evaluation tasks, a file each, found by :data:`alignclip.config.plugged.TASKS`.

A task's module declares ``Settings``, ``COLUMN`` and ``METRICS``, as
:mod:`alignclip.config.plugged` says, and has

- a docstring whose first line says in ``docs/evaluation.md`` what the task measures;
- ``run(evaluator) -> TaskResult``: encode the sets on all ranks, and compute the metrics;
- where it needs one, ``prepare(evaluator) -> Any``: look at the sets before any model is there. The
  evaluator keeps what the function returns as ``prepared``.

:class:`alignclip.evaluation.evaluator.Evaluator` opens the sets and has the features.
"""
