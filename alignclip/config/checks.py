"""What types can't say of a configuration: ranges, units of time, settings that exclude one another."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from alignclip.config.metrics import MODES, better, metrics_of
from alignclip.config.model_checks import check_model
from alignclip.config.plugged import TASKS
from alignclip.config.schema import (
    DataConfig,
    EvaluateConfig,
    EvaluatorConfig,
    RunConfig,
    SetConfig,
)
from alignclip.config.time_checks import check_times
from alignclip.errors import UserError, check_place, nearest

VOCABULARY = 49408  # of CLIP's byte pairs
SHARED_FROM = ("text", "vision")
# What a setting may be where Composer or torch would say so late, or with a stack trace
CHOICES = {
    "device": ("cpu", "gpu", "mps"),
    "precision": ("fp32", "amp_fp16", "amp_bf16", "amp_fp8"),
    "ddp_sync_strategy": ("single_auto_sync", "multi_auto_sync", "forced_sync"),
    "python_log_level": ("debug", "info", "warning", "error", "critical"),
    "data.sampling_method": ("balanced", "fixed"),
    "data.batching_method": ("random", "stratified", "per_stream", "device_per_stream"),
    "compile_config.mode": (
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
    "parallelism_config.fsdp2.mixed_precision": ("FULL", "DEFAULT", "PURE"),
}
FILENAME_PARTS = (
    "run_name", "rank", "local_rank", "world_size", "local_world_size", "node_rank", "epoch", "batch",
    "batch_in_epoch", "sample", "sample_in_epoch", "token", "token_in_epoch", "total_wct", "epoch_wct", "batch_wct",
    "iteration", "epoch_in_iteration", "token_in_iteration",
)  # fmt: skip
_EVALUATION_PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")


def validate(config: RunConfig) -> None:
    """What types can't say: ranges, and settings that exclude one another.

    Raises:
        UserError: the first contradiction found.
    """
    model, loss, data = config.model, config.loss, config.data
    _check_finite(config, "")
    check_times(config)
    _check_places(config)
    check_evaluators(config.evaluators)
    _check_keep_best(config)
    _check_signs(config)
    if loss.beta and not loss.rescale and not (loss.separate_image and loss.separate_text):
        raise UserError(
            "loss.rescale=false separates both sides always; set loss.separate_image and loss.separate_text to true"
        )
    for key in ("scale", "ratio"):
        bounds = getattr(data, key)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise UserError(
                f"data.{key} must be two numbers, 0 < smallest <= largest, not {bounds}"
            )
    if not data.streams:
        raise UserError(
            "data.streams is empty: name at least one set, e.g. data.streams.cc12m.remote=s3://bucket/cc12m"
        )
    _check_weights(data)
    check_model(model)
    if model.text_cfg.vocab_size < VOCABULARY:
        raise UserError(
            f"model.text_cfg.vocab_size={model.text_cfg.vocab_size}: CLIP's tokenizer has {VOCABULARY} tokens"
        )
    if not 0 <= model.vision_cfg.patch_dropout < 1:
        raise UserError(
            f"model.vision_cfg.patch_dropout={model.vision_cfg.patch_dropout} must lie in [0, 1)"
        )
    if config.parallelism_config.fsdp2 is not None and "EMA" in config.algorithms:
        raise UserError(
            "algorithms.EMA averages in pieces under parallelism_config.fsdp2, and checkpoints would hold the "
            "first rank's alone; use one or the other"
        )
    if "/" in config.run_name:
        raise UserError(f"run_name={config.run_name} must not hold a '/'")
    if config.run_name in (".", "..") or not config.run_name.isprintable():
        raise UserError(f"run_name={config.run_name!r} can't be the name of a folder")
    _check_choices(config)
    _check_checkpoints(config)
    _check_start(config)


def _check_choice(key: str, value: str | None, choices: Sequence[str]) -> None:
    """A setting is one of a few; nothing is said of one that isn't set."""
    if value is not None and (value.lower() if key == "python_log_level" else value) not in choices:
        raise UserError(f"{key}={value}: {nearest(value, choices)}")


def _check_choices(config: RunConfig) -> None:
    """Settings of which there are a few, and those that only make sense in a range."""
    for key, choices in CHOICES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        _check_choice(key, value, choices)
    if config.device == "cpu" and config.precision not in ("fp32", "amp_bf16"):
        raise UserError(
            f"precision={config.precision} needs a GPU; with device=cpu use fp32 or amp_bf16"
        )
    batches = config.train_subset_num_batches
    if batches != -1 and batches < 1:
        raise UserError(f"train_subset_num_batches={batches} must be -1 (all) or at least 1")
    if config.data.num_workers and config.data.prefetch_factor < 1:
        raise UserError(f"data.prefetch_factor={config.data.prefetch_factor} must be at least 1")
    if abs(config.model.init_logit_scale) > 20:
        raise UserError(
            f"model.init_logit_scale={config.model.init_logit_scale} must lie in [-20, 20]: it is the logarithm of the "
            f"scale, which training keeps in [0, {math.log(100):.4f}]"
        )


def _check_weights(data: DataConfig) -> None:
    """How much of each set is read is said in one way, and of all sets in a way that goes together."""
    proportions = {name for name, stream in data.streams.items() if stream.proportion is not None}
    for name, stream in data.streams.items():
        where = f"data.streams.{name}"
        if not (stream.remote or stream.local):
            raise UserError(f"{where} has neither remote nor local")
        given = {key: getattr(stream, key) for key in ("proportion", "repeat", "choose")}
        given = {key: value for key, value in given.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"{where}: {' and '.join(given)} exclude one another; set one of them")
        for key, value in given.items():
            if value < 0:
                raise UserError(f"{where}.{key} must not be negative, but is {value}")
        if proportions and name not in proportions:
            raise UserError(
                f"{where} has no proportion, and data.streams.{min(proportions)} has; all or none"
            )


def _check_start(config: RunConfig) -> None:
    """What the run starts from, and what of it is locked."""
    if config.pretrained is not None and not config.pretrained:
        raise UserError("pretrained is empty: name a checkpoint, or leave it out (null)")
    if config.pretrained and config.load_path:
        raise UserError(
            "pretrained and load_path both say where the weights come from; set one of them"
        )
    if config.pretrained_shared_from not in SHARED_FROM:
        hint = nearest(config.pretrained_shared_from, SHARED_FROM)
        raise UserError(f"pretrained_shared_from={config.pretrained_shared_from}: {hint}")
    for key, lock in (
        ("lock_image_unlocked_groups", "lock_image"),
        ("lock_text_unlocked_layers", "lock_text"),
        ("lock_image_freeze_bn_stats", "lock_image"),
    ):
        value = getattr(config, key)
        if value < 0:
            raise UserError(f"{key} must not be negative, but is {value}")
        if value and not getattr(config, lock):
            raise UserError(f"{key}={value} has no effect without {lock}=true")
    for lock in ("lock_image", "lock_text"):
        if getattr(config, lock) and not (config.pretrained or config.load_path):
            raise UserError(
                f"{lock}=true would lock random weights; set pretrained to what the tower shall be"
            )
    if wrong := [beta for beta in config.optimizer.betas if not 0 <= beta < 1]:
        raise UserError(f"optimizer.betas must lie in [0, 1), not {wrong[0]}")
    decay = config.optimizer.layer_decay
    if decay is not None and not 0 < decay <= 1:
        raise UserError(f"optimizer.layer_decay={decay} must lie in (0, 1], or be null")


def _check_signs(config: RunConfig) -> None:
    """Numbers that must be positive, or not negative."""
    model, loss, data = config.model, config.loss, config.data
    positive = {
        "global_train_batch_size": config.global_train_batch_size,
        "data.num_canonical_nodes": data.num_canonical_nodes,
        "data.download_retry": data.download_retry,
        "data.sampling_granularity": data.sampling_granularity,
        "optimizer.lr": config.optimizer.lr,
        "dist_timeout": config.dist_timeout,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"{key} must be positive, not {value}")
    not_negative = {
        "model.encode_chunk_size": model.encode_chunk_size,
        "loss.alpha": loss.alpha,
        "loss.beta": loss.beta,
        "seed": config.seed,
        "data.num_workers": data.num_workers,
        "data.shuffle_seed": data.shuffle_seed,
        "data.predownload": data.predownload or 0,
        "data.download_timeout": data.download_timeout,
        "optimizer.eps": config.optimizer.eps,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "scheduler.alpha_f": config.scheduler.alpha_f,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UserError(f"{key} must not be negative, but is {value}")


def _check_checkpoints(config: RunConfig) -> None:
    """What is saved is what a resumed run, and the rotation, will look for."""
    keep = config.save_num_checkpoints_to_keep
    if keep != -1 and keep < 1:
        raise UserError(f"save_num_checkpoints_to_keep={keep} must be -1 (all) or at least 1")
    if keep != -1 and not config.save_filename.startswith("ep{epoch}-ba{batch}"):
        raise UserError(
            f"save_num_checkpoints_to_keep={keep} knows checkpoints by names that start with ep{{epoch}}-ba{{batch}}, "
            f"and save_filename={config.save_filename} does not; keep all (-1) or rename"
        )
    for key in ("save_filename", "save_latest_filename"):
        name = getattr(config, key) or ""
        for part in re.findall(r"{([^{}:!]*)", name):
            if part not in FILENAME_PARTS:
                raise UserError(
                    f"{key}={name}: {{{part}}} is unknown; {nearest(part, FILENAME_PARTS)}"
                )
    if (latest := config.save_latest_filename) and set(re.findall(r"{([^{}:!]*)", latest)) - {
        "run_name",
        "rank",
    }:
        raise UserError(
            f"save_latest_filename={latest} may hold {{run_name}} and {{rank}} only: it names one file"
        )
    try:
        (config.save_folder or "").format(run_name=config.run_name)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"save_folder={config.save_folder} may hold {{run_name}}, and no other braces"
        ) from None
    if (
        config.save_folder
        and not config.run_name
        and (config.autoresume or "{run_name}" in config.save_folder)
    ):
        raise UserError("save_folder needs a run_name, e.g. run_name=first")
    if config.autoresume and "{batch}" not in config.save_filename:
        raise UserError(
            f"save_filename={config.save_filename} must hold {{batch}}: a run that is killed while it writes a "
            "checkpoint over the last one has none"
        )
    if config.autoresume and "SAM" in config.algorithms:
        raise UserError(
            "algorithms.SAM does not resume: Composer saves its optimizer under another name, and Adam's state is "
            "lost; set autoresume=false with it"
        )
    if config.autoresume and (config.save_weights_only or config.save_ignore_keys):
        raise UserError(
            "save_weights_only and save_ignore_keys leave out what a resumed run needs; set autoresume=false with them"
        )
    if config.autoresume and not (
        config.save_folder and config.run_name and config.save_latest_filename
    ):
        raise UserError(
            "autoresume=true needs run_name, save_folder and save_latest_filename (or set autoresume=false)"
        )


def _check_finite(section: Any, prefix: str) -> None:
    """No setting is NaN or infinite."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{f.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{f.name} must be a finite number, not {value}")


def _check_places(config: RunConfig) -> None:
    """Folders and URLs look like what they are."""
    places = {"save_folder": config.save_folder, "load_path": config.load_path}
    places |= {"pretrained": config.pretrained}
    for name, stream in config.data.streams.items():
        places |= {
            f"data.streams.{name}.remote": stream.remote,
            f"data.streams.{name}.local": stream.local,
        }
    for key, place in places.items():
        if place:
            check_place(key, place)


def validate_evaluation(config: EvaluateConfig) -> None:
    """As :func:`validate`, for ``evaluate.py``.

    Raises:
        UserError: the first contradiction found.
    """
    if bool(config.checkpoint) == bool(config.checkpoints):
        raise UserError(
            "name what to evaluate: checkpoint=runs/first/latest-rank0.pt, or several as checkpoints.NAME=…, not both"
        )
    _check_choice("precision", config.precision, _EVALUATION_PRECISIONS)
    _check_choice("device", config.device, CHOICES["device"])
    if not config.evaluators:
        raise UserError(
            "evaluators is empty: name at least one, e.g. evaluators.coco.task=retrieval"
        )
    check_evaluators(config.evaluators)


def check_evaluators(evaluators: dict[str, EvaluatorConfig]) -> None:
    """Each has a task, and what that needs."""
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
        sets: dict[str, SetConfig | None] = {where: evaluator}
        for key, task in (("train", "linear_probe"), ("outliers", "out_of_distribution")):
            part = getattr(evaluator, key)
            if (part is not None) != (evaluator.task == task):
                verb = "needs" if part is None else "has no use for"
                raise UserError(f"{where}: {evaluator.task} {verb} {key}, a set of its own")
            sets[f"{where}.{key}"] = part
        for key, part in sets.items():
            if part is not None:
                if not (part.remote or part.local):
                    file = (
                        " (sts reads a file: stsbenchmark/sts-test.csv)"
                        if evaluator.task == "sts"
                        else ""
                    )
                    raise UserError(f"{key} has neither remote nor local{file}")
                check_place(f"{key}.remote", part.remote or "")
        for key in ("batch_size", "num_workers"):
            if getattr(evaluator, key) < (key == "batch_size"):
                raise UserError(f"{where}.{key}={getattr(evaluator, key)} is too small")


def _check_keep_best(config: RunConfig) -> None:
    best = config.keep_best
    if best is None:
        return
    name = best.metric.partition("/")[0]
    if name not in config.evaluators or "/" not in best.metric:
        valid = ", ".join(f"{evaluator}/…" for evaluator in config.evaluators) or "there are none"
        raise UserError(
            f"keep_best.metric={best.metric} must be an evaluator and its metric: {valid}"
        )
    task, metric = config.evaluators[name].task, best.metric.partition("/")[2]
    if metric not in metrics_of(task):
        metrics = [f"{name}/{one}" for one in metrics_of(task)]
        ends = [one for one in metrics if metric and one.endswith(metric)]
        hint = f"did you mean '{ends[0]}'?" if ends else nearest(best.metric, metrics)
        raise UserError(f"keep_best.metric={best.metric} is no metric of {task}; {hint}")
    if best.mode not in ("max", "min", None):
        raise UserError(f"keep_best.mode={best.mode}: valid: max, min")
    if (best.mode or MODES[better(metric)]) is None:
        raise UserError(
            f"keep_best.metric={best.metric} is better neither way; name keep_best.mode: max or min"
        )
    if not config.save_folder:
        raise UserError("keep_best needs a save_folder")
