"""Every setting of a run, typed, with its default.

Keys are the argument names of Composer's Trainer, of Streaming's StreamingDataset and of
open_clip's model configuration wherever these have one. :mod:`alignclip.config.reading` reads YAML
files and command lines into the dataclasses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from alignclip.config.setting import setting
from alignclip.config.trainer_sections import (
    CompileSettings,
    ParallelismSettings,
    ProfilerSettings,
)

# OmegaConf writes a model's section, and on Python 3.10 it knows Optional[X] better than X | None.
# ruff: noqa: UP045

CLASSES = (
    "algorithms",
    "callbacks",
    "loggers",
)  # sections of Composer's classes with their arguments
VOCABULARY = 49408  # of CLIP's byte pairs
DEVICES = ("cpu", "gpu", "mps")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def _place(default: Optional[str] = None) -> Any:
    return setting(default, place=True)


def _chosen_name(default: Optional[str] = None) -> Any:
    return setting(default, name=True)


def _count(default: int) -> Any:
    """Make a field of a number above 0."""
    return setting(default, above=0)


def _amount(default: Optional[float]) -> Any:
    """Make a field of a number of at least 0."""
    return setting(default, at_least=0)


@dataclass
class VisionConfig:
    """Image tower, in open_clip's ``vision_cfg`` names; ``timm_model_name`` replaces the ViT."""

    image_size: int = _count(224)
    patch_size: int = _count(16)
    width: int = _count(768)
    layers: int = _count(12)
    head_width: int = _count(64)
    mlp_ratio: float = setting(4.0, above=0)
    patch_dropout: float = setting(0.0, at_least=0, below=1)
    timm_model_name: Optional[str] = None
    timm_pool: str = "avg"
    timm_proj: str = "linear"


@dataclass
class TextConfig:
    """Text tower, in open_clip's ``text_cfg`` names."""

    context_length: int = _count(77)
    vocab_size: int = _count(VOCABULARY)
    width: int = _count(512)
    heads: int = _count(8)
    layers: int = _count(12)
    mlp_ratio: float = setting(4.0, above=0)


@dataclass
class SharedConfig:
    """Modules that both modalities share: nothing shared is CLIP, everything is SharedCLIP."""

    # the last n transformer blocks
    blocks: int = setting(0, at_least=0, or_all=True)
    ln_final: bool = False  # the LayerNorm behind the blocks
    projection: bool = False  # the projection into the embedding


@dataclass
class ModelConfig:
    """The encoders.

    ``encode_chunk_size`` > 0 encodes a rank's batch in recomputed chunks, with the same gradients.
    """

    embed_dim: int = _count(512)
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    shared: SharedConfig = field(default_factory=SharedConfig)
    # x · sigmoid(1.702 x) in place of GELU, as OpenAI's models were trained
    quick_gelu: bool = False
    # the logarithm of the scale, which training keeps in [0, ln 100]
    init_logit_scale: float = setting(math.log(1 / 0.07), at_least=-20, at_most=20)
    encode_chunk_size: int = _amount(0)


@dataclass
class LossConfig:
    """alpha · L_clip + beta · L_sep; see :class:`alignclip.losses.AlignCLIPLoss`."""

    alpha: float = _amount(1.0)
    beta: float = _amount(0.0)
    separate_image: bool = True
    separate_text: bool = True
    rescale: bool = True
    # term → its settings: the keys of alignclip.config.plugged.LOSS_TERMS that the YAML has
    terms: dict[str, Any] = setting(factory=dict, plugged=True)

    @property
    def needs_semantic(self) -> bool:
        """Say whether the loss reads the caption embeddings (the ``semantic`` column)."""
        return self.beta != 0 and self.rescale and (self.separate_image or self.separate_text)


@dataclass
class SetConfig:
    """Place of an MDS set (``remote``) and of its cache (``local``), as Streaming names both."""

    remote: Optional[str] = _place()
    local: Optional[str] = _place()
    split: Optional[str] = _chosen_name()


@dataclass
class StreamConfig(SetConfig):
    """A set to train on, in :class:`streaming.Stream`'s argument names."""

    proportion: Optional[float] = _amount(None)
    repeat: Optional[float] = _amount(None)
    choose: Optional[int] = _amount(None)


@dataclass
class DataConfig:
    """Sets, StreamingDataset's arguments, the training crop, and DataLoader's arguments."""

    streams: dict[str, StreamConfig] = field(default_factory=dict)
    # StreamingDataset
    shuffle: bool = True
    shuffle_algo: str = "py1e"
    shuffle_seed: int = _amount(17)
    shuffle_block_size: Optional[int] = None
    # fixed, because the order of samples depends on it: a run goes on the same on any number of
    # nodes that divides it (or is a multiple of it). Small sets want 1: each canonical node's share
    # is filled up with repeats.
    num_canonical_nodes: int = _count(64)
    predownload: Optional[int] = _amount(None)
    cache_limit: Optional[str] = None
    validate_hash: Optional[str] = "xxh64"
    keep_zip: bool = False
    epoch_size: Optional[str] = None
    sampling_method: str = setting("balanced", choices=("balanced", "fixed"))
    sampling_granularity: int = _count(1)
    partition_algo: str = "relaxed"
    batching_method: str = setting(
        "random", choices=("random", "stratified", "per_stream", "device_per_stream")
    )
    # the training crop: RandomResizedCrop(scale, ratio), bicubic
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    # DataLoader
    num_workers: int = _amount(8)
    # how workers are started; fork is the fastest, the others begin without the run's memory
    multiprocessing_context: str = setting("fork", choices=("fork", "forkserver", "spawn"))
    prefetch_factor: int = 2
    persistent_workers: bool = True
    pin_memory: bool = True


@dataclass
class OptimizerConfig:
    """An optimizer of timm (``opt``) and its arguments; 1-D parameters are not decayed.

    ``layer_decay``, as timm calls it: each layer down from a tower's top has its ``lr`` multiplied
    by it once more.
    """

    opt: str = "adamw"
    lr: float = setting(1e-3, above=0)
    betas: list[float] = setting(factory=lambda: [0.9, 0.98], at_least=0, below=1)
    eps: float = _amount(1e-6)
    weight_decay: float = _amount(0.1)
    layer_decay: Optional[float] = setting(None, above=0, at_most=1)  # null: one lr for all layers
    # of torch's optimizers: one kernel for all parameters. null: on a GPU. On a CPU it is faster,
    # too, and rounds differently
    fused: Optional[bool] = None


@dataclass
class SchedulerConfig:
    """The learning rate: lr · (t + 1) / t_warmup, then a cosine to lr · alpha_f at the end."""

    t_warmup: str = setting("10000ba", time="schedule")
    alpha_f: float = _amount(0.0)


@dataclass
class TrainerConfig:
    """The arguments of :class:`composer.Trainer` that a YAML can hold, under their own names."""

    max_duration: str = setting("30ep", time="schedule", above=0)
    run_name: str = _chosen_name("")
    seed: int = _amount(17)
    precision: str = setting("amp_bf16", choices=("fp32", "amp_fp16", "amp_bf16", "amp_fp8"))
    precision_config: Optional[dict[str, Any]] = None
    device: Optional[str] = setting(None, choices=DEVICES)
    parallelism_config: ParallelismSettings = field(default_factory=ParallelismSettings)
    ddp_sync_strategy: Optional[str] = setting(
        None, choices=("single_auto_sync", "multi_auto_sync", "forced_sync")
    )
    dist_timeout: float = setting(600.0, above=0)
    deterministic_mode: bool = False
    compile_config: Optional[CompileSettings] = None
    train_subset_num_batches: int = setting(-1, at_least=1, or_all=True)
    spin_dataloaders: bool = True
    # null: where the output is a terminal; into a file go lines instead
    progress_bar: Optional[bool] = None
    log_to_console: bool = False
    console_log_interval: str = setting("10ba", time="interval", above=0)
    log_traces: bool = False
    auto_log_hparams: bool = False
    profiler: Optional[ProfilerSettings] = None
    python_log_level: Optional[str] = setting(None, choices=_LOG_LEVELS, any_case=True)
    # checkpoints
    save_folder: Optional[str] = _place()
    save_interval: str = setting("1ep", time="interval", above=0)
    save_filename: str = "ep{epoch}-ba{batch}-rank{rank}.pt"
    save_latest_filename: Optional[str] = "latest-rank{rank}.pt"
    # with false a resumed run could not save again what its killed self had saved
    save_overwrite: bool = True
    save_weights_only: bool = False
    save_ignore_keys: Optional[list[str]] = None
    # here also in object storage, not only on the local disk
    save_num_checkpoints_to_keep: int = setting(-1, at_least=1, or_all=True)
    save_metrics: bool = False
    autoresume: bool = True
    load_path: Optional[str] = _place()
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_progress_bar: bool = True
    load_ignore_keys: Optional[list[str]] = None
    load_exclude_algorithms: Optional[list[str]] = None


@dataclass
class EvaluatorConfig(SetConfig):
    """An evaluation: a task on a set; for ``sts``, ``remote`` or ``local`` is the file itself."""

    task: str = ""  # one of alignclip.config.plugged.TASKS
    interval: str = setting("1ep", time="interval", above=0)  # of a training run
    batch_size: int = setting(256, at_least=1)  # samples a rank encodes at a time
    num_workers: int = setting(4, at_least=0)
    # the task's own settings (alignclip.config.plugged.TASKS); None where the task has none
    settings: Any = setting(None, plugged=True)


@dataclass
class KeepBestConfig:
    """The checkpoint to keep beside the latest ones: the best by one metric of one evaluator."""

    metric: str = ""  # name of the evaluator/name of the metric, e.g. coco/image_retrieval_recall@5
    # null: as the metric is better (alignclip.config.metrics)
    mode: Optional[str] = setting(None, choices=("max", "min"))


@dataclass
class StartConfig:
    """The weights that a new run starts from, and which of them stay, named as open_clip's flags.

    See :mod:`alignclip.weights.start_from` for what ``pretrained`` may be and
    :mod:`alignclip.training.locking` for the locks.
    """

    pretrained: Optional[str] = _place()
    # whose numbers a shared module gets where the towers differ
    pretrained_shared_from: str = setting("text", choices=("text", "vision"))
    lock_image: bool = False
    # from the top: projection, last block and norm, then a block each, patches; in timm's towers
    # their own groups without the projection, which is always trained
    lock_image_unlocked_groups: int = _amount(0)
    lock_image_freeze_bn_stats: bool = False
    lock_text: bool = False
    lock_text_unlocked_layers: int = _amount(0)  # counted the same way


@dataclass
class RunConfig(StartConfig, TrainerConfig):
    """A pretraining run: model, data, optimization; the Trainer's arguments at the top level."""

    global_train_batch_size: int = _count(512)
    # batches between two whose losses are read from the device and logged; the first and the last
    # batch are, too. null: 10 on a GPU, which the host waits for, and 1 on a CPU
    batch_log_interval: Optional[int] = setting(None, above=0)
    # what a batch does whose loss or gradients are not finite: end the run, or take no step
    non_finite: str = setting("stop", choices=("stop", "skip"))
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    evaluators: dict[str, EvaluatorConfig] = field(default_factory=dict)
    keep_best: Optional[KeepBestConfig] = None
    # class → its arguments; checked against the class's signature (alignclip.training.plugins)
    algorithms: dict[str, Optional[dict[str, Any]]] = setting(factory=dict, raw=True)
    callbacks: dict[str, Optional[dict[str, Any]]] = setting(factory=dict, raw=True)
    loggers: dict[str, Optional[dict[str, Any]]] = setting(factory=dict, raw=True)


@dataclass
class EvaluateConfig:
    """``evaluate.py``: what is evaluated, on what."""

    checkpoint: Optional[str] = _place()  # anything that alignclip.load takes
    # several, by the names that they get in tables and plots
    checkpoints: dict[str, str] = setting(factory=dict, place=True)
    evaluators: dict[str, EvaluatorConfig] = field(default_factory=dict)
    out: str = _place("evaluation")  # folder of results.json and the plots
    precision: str = setting("amp_bf16", choices=("fp32", "amp_bf16", "amp_fp16"))
    device: Optional[str] = setting(None, choices=DEVICES)
    dist_timeout: float = setting(3600.0, above=0)
