"""Contradictions between settings; what one setting may be is in its own field (:mod:`.schema`)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from alignclip.config.metrics import KEEP_BEST_MODES, better, metrics_of, sets_of
from alignclip.config.model_checks import check_model, unused_sizes
from alignclip.config.plugged import TASKS
from alignclip.config.schema import (
    VOCABULARY,
    DataConfig,
    EvaluateConfig,
    EvaluatorConfig,
    ModelConfig,
    RunConfig,
)
from alignclip.config.setting import check_settings
from alignclip.config.yaml_text import as_float
from alignclip.errors import LEAST_SECRET, UserError, nearest, without_secrets

FILENAME_PARTS = (
    "run_name", "rank", "local_rank", "world_size", "local_world_size", "node_rank",
    "epoch", "batch", "batch_in_epoch", "sample", "sample_in_epoch", "token", "token_in_epoch",
    "total_wct", "epoch_wct", "batch_wct", "iteration", "epoch_in_iteration", "token_in_iteration",
)  # fmt: skip
LONGEST_RUN_NAME = 255  # bytes, on every common file system
_NO_BRACES = "may hold {run_name}, and no other braces"


def validate(config: RunConfig) -> None:
    """Refuse settings out of their range, and settings that exclude one another.

    Raises:
        UserError: the first contradiction found.
    """
    _check_each(config, unused_sizes(config.model.vision_cfg))
    _check_warmup(config)
    check_evaluators(config.evaluators)
    _check_keep_best(config)
    _check_data(config.data)
    _check_model(config.model)
    loss = config.loss
    _refuse(
        {
            "loss.rescale=false separates both sides always; set loss.separate_image and "
            "loss.separate_text to true": loss.beta
            and not loss.rescale
            and not (loss.separate_image and loss.separate_text),
            "algorithms.EMA averages in pieces under parallelism_config.fsdp2, and checkpoints "
            "would hold the first rank's alone; use one or the other": (
                config.parallelism_config.fsdp2 is not None and "EMA" in config.algorithms
            ),
            "non_finite=skip skips no step of algorithms.SAM, which is two; use one or the other": (
                config.non_finite == "skip" and "SAM" in config.algorithms
            ),
            f"run_name={config.run_name} must not hold a '/'": "/" in config.run_name,
            f"run_name={config.run_name!r} can't be the name of a folder": (
                config.run_name in (".", "..") or not config.run_name.isprintable()
            ),
            f"run_name={config.run_name} must not hold braces: Composer fills them in": (
                not {"{", "}"}.isdisjoint(config.run_name)
            ),
            f"run_name={config.run_name[:20]}… is too long for the name of a folder": (
                len(config.run_name.encode()) > LONGEST_RUN_NAME
            ),
            f"precision={config.precision} needs a GPU; with device=cpu use fp32 or amp_bf16": (
                config.device == "cpu" and config.precision not in ("fp32", "amp_bf16")
            ),
        }
    )
    _check_checkpoints(config)
    _check_start(config)


def validate_evaluation(config: EvaluateConfig) -> None:
    """Refuse what :func:`validate` refuses, for ``evaluate.py``.

    Raises:
        UserError: the first contradiction found.
    """
    _refuse(
        {
            "name what to evaluate: checkpoint=runs/first/latest-rank0.pt, or several as "
            "checkpoints.NAME=…, not both": bool(config.checkpoint) == bool(config.checkpoints),
            "evaluators is empty: name at least one, e.g. evaluators.coco.task=retrieval": (
                not config.evaluators
            ),
        }
    )
    _check_each(config, intervals(config))
    check_evaluators(config.evaluators)


def _check_each(config: RunConfig | EvaluateConfig, unused: Collection[str]) -> None:
    """Check every setting by itself."""
    texts = [*_texts_in(dataclasses.asdict(config))]
    _check_utf_8(texts)
    check_settings(config, unused=unused)
    _check_secrets(texts)


def _texts_in(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield all texts, at any depth: the keys above with dots, the name, and the text itself.

    The name of a list's item is its number.
    """
    for name, value in section.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): one for i, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _texts_in(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield prefix, name, value


def _check_utf_8(texts: Iterable[tuple[str, str, str]]) -> None:
    """Refuse bytes of a command line that are no UTF-8, and halves of surrogate pairs in a file.

    No file could hold such a setting, and PyTorch opens no checkpoint in such a folder.
    """
    for prefix, name, text in texts:
        try:
            f"{prefix}{name}={text}".encode()
        except UnicodeEncodeError:
            raise UserError(f"{prefix}{name}={text!a} is no UTF-8") from None


def _check_secrets(texts: Iterable[tuple[str, str, str]]) -> None:
    """Refuse passwords, keys and signed URLs: a configuration is written down and logged."""
    for prefix, name, text in texts:
        assigned = f"{name}={text.ljust(LEAST_SECRET, '*')}"
        if text and without_secrets(assigned) != assigned:
            raise UserError(
                f"{prefix}{name} holds a password, a key or a signed URL, which would stand in "
                "config.yaml and in logs; clients take these from the environment"
            )


def intervals(config: EvaluateConfig) -> set[str]:
    """Return the keys of the evaluators' intervals, which a training run alone has a use for."""
    return {f"evaluators.{name}.interval" for name in config.evaluators}


def check_evaluators(evaluators: dict[str, EvaluatorConfig]) -> None:
    """Refuse an evaluator without a task, or without a set that its task needs.

    Raises:
        UserError: the first one.
    """
    for name, evaluator in evaluators.items():
        where = f"evaluators.{name}"
        if "/" in name:
            raise UserError(f"{where}: a name must not hold a '/'")
        if not evaluator.task:
            close = nearest(name, [other for other, one in evaluators.items() if one.task])
            typo = f"; {close}" if close.startswith("did") else ""
            raise UserError(f"{where} has no task (valid: {', '.join(sorted(TASKS))}){typo}")
        if evaluator.task not in TASKS:
            raise UserError(f"{where}.task={evaluator.task}: {nearest(evaluator.task, TASKS)}")
        for key, one in sets_of(evaluator).items():
            if not (one.remote or one.local):
                is_file = " (sts reads a file: stsbenchmark/sts-test.csv)"
                file = is_file if evaluator.task == "sts" else ""
                place = f"{where}.{key}".rstrip(".")
                raise UserError(f"{place} has neither remote nor local{file}")


def _refuse(contradictions: dict[str, object]) -> None:
    """Raise the first message whose condition holds.

    Raises:
        UserError: the message.
    """
    for message, is_so in contradictions.items():
        if is_so:
            raise UserError(message)


def _check_warmup(config: RunConfig) -> None:
    """Refuse a warm-up longer than the run, as far as that is known without the data's size."""
    warmup, duration = config.scheduler.t_warmup, config.max_duration
    (least, unit), (most, other) = (
        (float(time[:-2]), time[-2:]) for time in (warmup.strip().lower(), duration.strip().lower())
    )
    subset = config.train_subset_num_batches
    if unit == "ba" and other == "ep":  # an epoch has no more batches than the run is told to take
        most *= subset if subset > 0 else math.inf
    if least >= most:  # an epoch has a batch at least
        raise UserError(
            f"scheduler.t_warmup={warmup} must be shorter than max_duration={duration}; 0ba is none"
        )


def _check_data(data: DataConfig) -> None:
    """Refuse crops of no size, and sets of which it is said in several ways how much is read."""
    for key, bounds in (("scale", data.scale), ("ratio", data.ratio)):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            words = "must be two numbers, 0 < smallest <= largest, not"
            raise UserError(f"data.{key} {words} {bounds}")
    if not data.streams:
        example = "data.streams.cc12m.remote=s3://bucket/cc12m"
        raise UserError(f"data.streams is empty: name at least one set, e.g. {example}")
    if data.cache_limit is not None and not _is_size(data.cache_limit):
        raise UserError(f"data.cache_limit={data.cache_limit} is no size: write e.g. 500gb")
    if data.num_workers and data.prefetch_factor < 1:
        raise UserError(f"data.prefetch_factor={data.prefetch_factor} must be at least 1")
    proportions = {name for name, stream in data.streams.items() if stream.proportion is not None}
    for name, stream in data.streams.items():
        where = f"data.streams.{name}"
        if not (stream.remote or stream.local):
            raise UserError(f"{where} has neither remote nor local")
        ways = ("proportion", "repeat", "choose")
        given = [key for key in ways if getattr(stream, key) is not None]
        if len(given) > 1:
            raise UserError(f"{where}: {' and '.join(given)} exclude one another; set one of them")
        if proportions and name not in proportions:
            other = f"data.streams.{min(proportions)}"
            raise UserError(f"{where} has no proportion, and {other} has; all or none")


def _is_size(text: str) -> bool:
    """Say whether a text is a number of bytes, or one of kb, mb and so on."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:[kmgtpezy]?b)?", text.strip().lower())
    number = as_float(found[1]) if found else None
    return number is not None and math.isfinite(number)


def _check_model(model: ModelConfig) -> None:
    check_model(model)
    if model.text_cfg.vocab_size < VOCABULARY:
        raise UserError(
            f"model.text_cfg.vocab_size={model.text_cfg.vocab_size}: CLIP's tokenizer has "
            f"{VOCABULARY} tokens"
        )


def _check_start(config: RunConfig) -> None:
    """Refuse two sources of weights, and locks that would do nothing, or lock random weights."""
    if config.pretrained == "":
        raise UserError("pretrained is empty: name a checkpoint, or leave it out (null)")
    if config.pretrained and config.load_path:
        raise UserError(
            "pretrained and load_path both say where the weights come from; set one of them"
        )
    for key, lock in (
        ("lock_image_unlocked_groups", "lock_image"),
        ("lock_text_unlocked_layers", "lock_text"),
        ("lock_image_freeze_bn_stats", "lock_image"),
    ):
        if (value := getattr(config, key)) and not getattr(config, lock):
            raise UserError(f"{key}={value} has no effect without {lock}=true")
    for lock in ("lock_image", "lock_text"):
        if getattr(config, lock) and not (config.pretrained or config.load_path):
            raise UserError(
                f"{lock}=true would lock random weights; set pretrained to what the tower shall be"
            )


def _placeholders(name: str | None) -> Iterable[str]:
    return re.findall(r"{([^{}:!]*)", name or "")


def _check_checkpoints(config: RunConfig) -> None:
    """Refuse names of checkpoints that a resumed run, or the rotation, would not find."""
    filename, latest = config.save_filename, config.save_latest_filename
    for key, name in (("save_filename", filename), ("save_latest_filename", latest)):
        for part in _placeholders(name):
            if part not in FILENAME_PARTS:
                hint = nearest(part, FILENAME_PARTS)
                raise UserError(f"{key}={name}: {{{part}}} is unknown; {hint}")
    folder = config.save_folder or ""
    try:
        folder.format(run_name=config.run_name)
    except (KeyError, IndexError, ValueError):
        raise UserError(f"save_folder={folder} {_NO_BRACES}") from None
    keep, resumes = config.save_num_checkpoints_to_keep, config.autoresume
    is_named = bool(folder and config.run_name and latest)
    _refuse(
        {
            f"save_num_checkpoints_to_keep={keep} knows checkpoints by names that start with "
            f"ep{{epoch}}-ba{{batch}}, and save_filename={filename} does not; keep all (-1) or "
            "rename": keep != -1 and not filename.startswith("ep{epoch}-ba{batch}"),
            f"save_latest_filename={latest} may hold {{run_name}} and {{rank}} only: it names one "
            "file": {*_placeholders(latest)} - {"run_name", "rank"},
            "save_folder needs a run_name, e.g. run_name=first": (
                folder and not config.run_name and (resumes or "{run_name}" in folder)
            ),
            f"save_filename={filename} must hold {{batch}}: a run that is killed while it writes a "
            "checkpoint over the last one has none": resumes and "{batch}" not in filename,
            "algorithms.SAM does not resume: Composer saves its optimizer under another name, and "
            "Adam's state is lost; set autoresume=false with it": (
                resumes and "SAM" in config.algorithms
            ),
            "save_weights_only and save_ignore_keys leave out what a resumed run needs; set "
            "autoresume=false with them": (
                resumes and (config.save_weights_only or config.save_ignore_keys)
            ),
            "autoresume=true needs run_name, save_folder and save_latest_filename (or set "
            "autoresume=false)": resumes and not is_named,
        }
    )


def _check_keep_best(config: RunConfig) -> None:
    """Refuse a metric that no evaluator has, or that is better neither way."""
    best = config.keep_best
    if best is None:
        return
    name, slash, metric = best.metric.partition("/")
    if name not in config.evaluators or not slash:
        valid = ", ".join(f"{evaluator}/…" for evaluator in config.evaluators) or "there are none"
        words = "must be an evaluator and its metric"
        raise UserError(f"keep_best.metric={best.metric} {words}: {valid}")
    task = config.evaluators[name].task
    if metric not in metrics_of(task):
        metrics = [f"{name}/{one}" for one in metrics_of(task)]
        ends = [one for one in metrics if metric and one.endswith(metric)]
        hint = f"did you mean '{ends[0]}'?" if ends else nearest(best.metric, metrics)
        raise UserError(f"keep_best.metric={best.metric} is no metric of {task}; {hint}")
    if (best.mode or KEEP_BEST_MODES[better(metric)]) is None:
        raise UserError(
            f"keep_best.metric={best.metric} is better neither way; name keep_best.mode: max or min"
        )
    if not config.save_folder:
        raise UserError("keep_best needs a save_folder")
