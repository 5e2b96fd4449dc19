"""Sections of a run's YAML that Composer takes as objects: parallelism, compiling, profiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from alignclip.config.setting import setting

# ruff: noqa: UP045  # as in alignclip.config.schema


@dataclass
class FSDP2Settings:
    """The settable fields of :class:`composer.utils.parallelism.FSDP2Config`."""

    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    activation_cpu_offload: bool = False
    # FULL: parameters stay fp32 and autocast works as under DDP; DEFAULT casts all of them,
    # logit_scale too
    mixed_precision: str = setting("FULL", choices=("FULL", "DEFAULT", "PURE"))
    verbose: bool = False


@dataclass
class ParallelismSettings:
    """The way in which the model is spread: nothing here is DDP."""

    fsdp2: Optional[FSDP2Settings] = None


@dataclass
class CompileSettings:
    """The arguments of :func:`torch.compile`; an empty section compiles with its defaults.

    Attributes:
        regional: compile each transformer block by itself, rather than the model as one graph.
    """

    regional: bool = False
    fullgraph: bool = False
    dynamic: Optional[bool] = None
    backend: str = "inductor"
    mode: Optional[str] = setting(
        None,
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    options: Optional[dict[str, Any]] = None
    disable: bool = False


@dataclass
class ProfilerSettings:
    """Composer's profiler.

    Traces are of ``active`` batches after ``wait`` and ``warmup`` ones, ``repeat`` times an epoch.
    Names of :func:`composer.profiler.cyclic_schedule` and :class:`composer.Profiler`.
    """

    skip_first: int = 0
    wait: int = 0
    warmup: int = 1
    active: int = 4
    repeat: int = 1
    torch_prof_folder: str = setting("{run_name}/torch_traces", place=True)
    torch_prof_record_shapes: bool = False
    torch_prof_profile_memory: bool = True
    torch_prof_with_stack: bool = False
    torch_prof_with_flops: bool = True
    sys_prof_cpu: bool = True
    sys_prof_memory: bool = False
    sys_prof_disk: bool = False
    sys_prof_net: bool = False
