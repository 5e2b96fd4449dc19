"""Every setting of a run: typed dataclasses, one YAML file over them, ``key.sub=value`` over that.

Keys are the argument names of Composer's Trainer, of Streaming's StreamingDataset and of open_clip's model
configuration wherever these have one. An unknown key or a wrong type is an error that names the place.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import omegaconf
from omegaconf import DictConfig, OmegaConf

from alignclip.errors import UserError, nearest

# OmegaConf reads annotations at run time, and on Python 3.10 it knows Optional[X] better than X | None.
# ruff: noqa: UP045


@dataclass
class VisionConfig:
    """Image tower, in open_clip's ``vision_cfg`` names. ``timm_model_name`` replaces the ViT by a timm tower."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_dropout: float = 0.0
    timm_model_name: Optional[str] = None
    timm_pool: str = "avg"
    timm_proj: str = "linear"


@dataclass
class TextConfig:
    """Text tower, in open_clip's ``text_cfg`` names."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


@dataclass
class SharedConfig:
    """Which modules are one and the same for both modalities. Nothing shared is CLIP, everything is SharedCLIP."""

    blocks: int = 0  # the last n transformer blocks; -1: all of them
    ln_final: bool = False  # the LayerNorm behind the blocks
    projection: bool = False  # the projection into the embedding


@dataclass
class ModelConfig:
    """The encoders. ``encode_chunk_size`` > 0 encodes a rank's batch in recomputed chunks, with the same gradients."""

    embed_dim: int = 512
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    shared: SharedConfig = field(default_factory=SharedConfig)
    init_logit_scale: float = math.log(1 / 0.07)
    encode_chunk_size: int = 0


@dataclass
class LossConfig:
    """alpha · L_clip + beta · L_sep; see :class:`alignclip.losses.AlignCLIPLoss`."""

    alpha: float = 1.0
    beta: float = 0.0
    separate_image: bool = True
    separate_text: bool = True
    rescale: bool = True

    @property
    def needs_semantic(self) -> bool:
        """Whether the loss reads the caption embeddings (the ``semantic`` column)."""
        return self.beta != 0 and self.rescale and (self.separate_image or self.separate_text)


@dataclass
class StreamConfig:
    """One MDS set, in :class:`streaming.Stream`'s argument names."""

    remote: Optional[str] = None
    local: Optional[str] = None
    split: Optional[str] = None
    proportion: Optional[float] = None
    repeat: Optional[float] = None
    choose: Optional[int] = None


@dataclass
class DataConfig:
    """What is read and how: StreamingDataset's arguments, the training crop, and DataLoader's arguments."""

    streams: dict[str, StreamConfig] = field(default_factory=dict)
    # StreamingDataset
    shuffle: bool = True
    shuffle_algo: str = "py1e"
    shuffle_seed: int = 17
    shuffle_block_size: Optional[int] = None
    # fixed, because the order of samples depends on it: a run goes on the same on any number of nodes that
    # divides it (or is a multiple of it). Small sets want 1: each canonical node's share is filled up with repeats.
    num_canonical_nodes: int = 64
    predownload: Optional[int] = None
    cache_limit: Optional[str] = None
    download_retry: int = 8  # attempts; they sleep 2^i s between, so 8 last through two minutes of outage
    download_timeout: float = 60.0
    validate_hash: Optional[str] = "xxh64"
    keep_zip: bool = False
    epoch_size: Optional[str] = None
    sampling_method: str = "balanced"
    sampling_granularity: int = 1
    partition_algo: str = "relaxed"
    batching_method: str = "random"
    # the training crop: RandomResizedCrop(scale, ratio), bicubic
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    # DataLoader
    num_workers: int = 8
    prefetch_factor: int = 2
    persistent_workers: bool = True
    pin_memory: bool = True


@dataclass
class OptimizerConfig:
    """``opt`` is any optimizer name of timm; the rest are its arguments. 1-D parameters are not decayed."""

    opt: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.1


@dataclass
class SchedulerConfig:
    """lr · (t + 1) / t_warmup while warming up, then a cosine to lr · alpha_f at the end of the run."""

    t_warmup: str = "10000ba"
    alpha_f: float = 0.0


@dataclass
class FSDP2Settings:
    """The settable fields of :class:`composer.utils.parallelism.FSDP2Config`."""

    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    activation_cpu_offload: bool = False
    state_dict_type: str = "full"
    # FULL: parameters stay fp32 and autocast works as under DDP; DEFAULT casts all of them, logit_scale too
    mixed_precision: str = "FULL"
    verbose: bool = False


@dataclass
class ParallelismSettings:
    """How the model is spread: nothing here is DDP."""

    fsdp2: Optional[FSDP2Settings] = None


@dataclass
class TrainerConfig:
    """The arguments of :class:`composer.Trainer` that a YAML can hold, under their own names."""

    max_duration: str = "30ep"
    run_name: str = ""
    seed: int = 17
    precision: str = "amp_bf16"
    precision_config: Optional[dict[str, Any]] = None
    device: Optional[str] = None
    parallelism_config: ParallelismSettings = field(default_factory=ParallelismSettings)
    ddp_sync_strategy: Optional[str] = None
    dist_timeout: float = 600.0
    deterministic_mode: bool = False
    compile_config: Optional[dict[str, Any]] = None
    train_subset_num_batches: int = -1
    spin_dataloaders: bool = True
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: str = "1ba"
    log_traces: bool = False
    auto_log_hparams: bool = False
    python_log_level: Optional[str] = None
    # checkpoints
    save_folder: Optional[str] = None
    save_interval: str = "1ep"
    save_filename: str = "ep{epoch}-ba{batch}-rank{rank}.pt"
    save_latest_filename: Optional[str] = "latest-rank{rank}.pt"
    save_overwrite: bool = True  # with false a resumed run could not save again what its killed self had saved
    save_weights_only: bool = False
    save_ignore_keys: Optional[list[str]] = None
    save_num_checkpoints_to_keep: int = -1  # here also in object storage, not only on the local disk
    save_metrics: bool = False
    autoresume: bool = True
    load_path: Optional[str] = None
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_progress_bar: bool = True
    load_ignore_keys: Optional[list[str]] = None
    load_exclude_algorithms: Optional[list[str]] = None


@dataclass
class RunConfig(TrainerConfig):
    """A pretraining run: what is trained, on what, how; and, at the top level, the Trainer's own arguments."""

    global_train_batch_size: int = 512
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    # Composer class name -> its arguments; checked against the class's signature (alignclip.plugins)
    algorithms: dict[str, Optional[dict[str, Any]]] = field(default_factory=dict)
    callbacks: dict[str, Optional[dict[str, Any]]] = field(default_factory=dict)
    loggers: dict[str, Optional[dict[str, Any]]] = field(default_factory=dict)


VOCABULARY = 49408  # of CLIP's byte pairs

# Settings that exist in Composer, Streaming or open_clip and would change what is trained without a word.
REFUSED = {
    "device_train_microbatch_size": "microbatches would shrink the set of negatives of a contrastive loss; set "
    "model.encode_chunk_size instead: chunks of that size are encoded and recomputed, the loss sees the whole batch",
    "accumulate_train_batch_on_tokens": "a contrastive loss sees the whole batch at once; set model.encode_chunk_size",
    "eval_interval": "evaluation is not part of pretraining yet; evaluate the saved checkpoints",
    "scale_schedule_ratio": "the schedule follows max_duration and scheduler.t_warmup; change these",
    "data.batch_size": "set global_train_batch_size, the batch over all ranks",
    "data.local": "name the set under data.streams, e.g. data.streams.cc12m.local=/tmp/cc12m",
    "data.remote": "name the set under data.streams, e.g. data.streams.cc12m.remote=s3://bucket/cc12m",
    "parallelism_config.fsdp2.load_monolith_rank0_only": "under FSDP2 the other ranks would keep their random weights; "
    "full checkpoints are read on every rank",
    "parallelism_config.fsdp": "FSDP1 needs a module to run once a step, which shared blocks do not; use "
    "parallelism_config.fsdp2",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, lay ``key.sub=value`` overrides over it and check both against :class:`RunConfig`.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest one), a wrong type or range.
    """
    try:
        from_file = OmegaConf.load(path)
    except FileNotFoundError:
        yamls = [str(p) for p in Path(path).parent.glob("*.yaml")]
        raise UserError(
            f"no config file '{path}': {nearest(str(path), yamls) if yamls else 'no YAML lies there'}"
        ) from None
    except Exception as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(from_file, DictConfig):
        raise UserError(f"{path} does not hold keys and values")
    for item in overrides:
        if "=" not in item:
            raise UserError(f"override '{item}' is not of the form key.sub=value")
    try:
        from_line = OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise UserError(f"overrides {list(overrides)}: {' '.join(str(error).split())}") from None
    for where, layer in ((str(path), from_file), ("the command line", from_line)):
        _check_keys(OmegaConf.to_container(layer), RunConfig, "", where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), from_file, from_line)
        config = OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{path}: {key}{str(error).splitlines()[0]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, every default spelled out; :func:`load` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_keys(values: Any, schema: Any, prefix: str, where: str) -> None:
    """Walk a plain dict beside the dataclass it is meant for and refuse the first key that the dataclass lacks."""
    if not isinstance(values, dict):
        if values is not None and prefix:
            raise UserError(f"{where}: '{prefix[:-1]}' is a section with keys of its own, not the value {values!r}")
        return
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in REFUSED:
            raise UserError(f"{where}: '{full}' is refused: {REFUSED[full]}")
        if key not in hints:
            raise UserError(f"{where}: unknown key '{full}'; {nearest(str(key), hints)}")
        inner = _dataclass_in(hints[key])
        if inner is None:
            continue
        if typing.get_origin(hints[key]) is dict:
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{where}: '{full}' holds names with settings below each, not {value!r}")
            for name, entry in (value or {}).items():
                _check_keys(entry, inner, f"{full}.{name}.", where)
        else:
            _check_keys(value, inner, f"{full}.", where)


def _check_finite(section: Any, prefix: str) -> None:
    """No setting is NaN or infinite."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{f.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{f.name} must be a finite number, not {value}")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that an annotation (X, Optional[X] or dict[str, X]) holds, if it holds one."""
    candidates = (hint, *typing.get_args(hint))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def validate(config: RunConfig) -> None:
    """What types can't say: ranges, and settings that exclude one another.

    Raises:
        UserError: the first contradiction found.
    """
    model, loss, data = config.model, config.loss, config.data
    _check_finite(config, "")
    positive = {
        "global_train_batch_size": config.global_train_batch_size,
        "model.embed_dim": model.embed_dim,
        "model.vision_cfg.image_size": model.vision_cfg.image_size,
        "model.vision_cfg.patch_size": model.vision_cfg.patch_size,
        "model.vision_cfg.layers": model.vision_cfg.layers,
        "model.vision_cfg.head_width": model.vision_cfg.head_width,
        "model.text_cfg.context_length": model.text_cfg.context_length,
        "model.text_cfg.layers": model.text_cfg.layers,
        "model.text_cfg.heads": model.text_cfg.heads,
        "data.num_canonical_nodes": data.num_canonical_nodes,
        "data.download_retry": data.download_retry,
        "optimizer.lr": config.optimizer.lr,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"{key} must be positive, not {value}")
    not_negative = {
        "model.encode_chunk_size": model.encode_chunk_size,
        "loss.alpha": loss.alpha,
        "loss.beta": loss.beta,
        "data.num_workers": data.num_workers,
        "data.shuffle_seed": data.shuffle_seed,
        "data.predownload": data.predownload or 0,
        "data.download_timeout": data.download_timeout,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "scheduler.alpha_f": config.scheduler.alpha_f,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UserError(f"{key} must not be negative, but is {value}")
    if loss.beta and not loss.rescale and not (loss.separate_image and loss.separate_text):
        raise UserError(
            "loss.rescale=false separates both sides always; set loss.separate_image and loss.separate_text to true"
        )
    for key in ("scale", "ratio"):
        bounds = getattr(data, key)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise UserError(f"data.{key} must be two numbers, 0 < smallest <= largest, not {bounds}")
    if not data.streams:
        raise UserError(
            "data.streams is empty: name at least one set, e.g. data.streams.cc12m.remote=s3://bucket/cc12m"
        )
    for name, stream in data.streams.items():
        if not (stream.remote or stream.local):
            raise UserError(f"data.streams.{name} has neither remote nor local")
    if model.text_cfg.vocab_size < VOCABULARY:
        raise UserError(
            f"model.text_cfg.vocab_size={model.text_cfg.vocab_size}: CLIP's tokenizer has {VOCABULARY} tokens"
        )
    if not 0 <= model.vision_cfg.patch_dropout < 1:
        raise UserError(f"model.vision_cfg.patch_dropout={model.vision_cfg.patch_dropout} must lie in [0, 1)")
    keep = config.save_num_checkpoints_to_keep
    if keep != -1 and keep < 1:
        raise UserError(f"save_num_checkpoints_to_keep={keep} must be -1 (all) or at least 1")
    if keep != -1 and not config.save_filename.startswith("ep{epoch}-ba{batch}"):
        raise UserError(
            f"save_num_checkpoints_to_keep={keep} knows checkpoints by names that start with ep{{epoch}}-ba{{batch}}, "
            f"and save_filename={config.save_filename} does not; keep all (-1) or rename"
        )
    if config.autoresume and (config.save_weights_only or config.save_ignore_keys):
        raise UserError(
            "save_weights_only and save_ignore_keys leave out what a resumed run needs; set autoresume=false with them"
        )
    if config.autoresume and not (config.save_folder and config.run_name and config.save_latest_filename):
        raise UserError(
            "autoresume=true needs run_name, save_folder and save_latest_filename (or set autoresume=false)"
        )
