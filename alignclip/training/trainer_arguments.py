"""The Trainer's own arguments, from the YAML, and the parts of Composer that they are made of."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from composer.core import Precision
from composer.devices import Device
from composer.utils import ParallelismConfig
from composer.utils.parallelism import FSDP2Config

from alignclip.config.schema import RunConfig, TrainerConfig
from alignclip.config.trainer_sections import CompileSettings
from alignclip.ranks import world_size
from alignclip.training import composer_patches


def trainer_arguments(config: RunConfig, device: Device) -> dict[str, Any]:
    """Return the Trainer's own arguments from the YAML, except what this device can't do."""
    arguments = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainerConfig)}
    arguments["run_name"] = config.run_name or None
    # alignclip.training.display shows both
    arguments["progress_bar"] = arguments["log_to_console"] = False
    arguments["save_folder"] = None  # our own CheckpointSaver has what is said about saving
    arguments["compile_config"] = None
    if config.compile_config is not None:
        if not config.compile_config.regional:
            arguments["compile_config"] = compile_options(config.compile_config)
        if config.compile_config.regional or config.model.encode_chunk_size:
            composer_patches.compile_whole_graphs()
    del arguments["profiler"]  # alignclip.training.profiling builds one
    arguments["parallelism_config"] = None
    fsdp2 = config.parallelism_config.fsdp2
    if fsdp2 is not None:
        fsdp2_config = FSDP2Config(state_dict_type="full", **dataclasses.asdict(fsdp2))
        arguments["parallelism_config"] = ParallelismConfig(fsdp2=fsdp2_config)
        if device.name == "cpu" and world_size() > 1:
            composer_patches.average_fsdp_gradients_on_gloo()
    if device.name == "cpu":
        arguments["precision"] = Precision.FP32  # the model does its own bf16 autocast there
    return arguments


def compile_options(settings: CompileSettings) -> dict[str, Any]:
    """Return the arguments of :func:`torch.compile`."""
    options = dataclasses.asdict(settings)
    del options["regional"]
    return options


def console_interval(config: RunConfig) -> str | None:
    """Return the interval of lines on the console; None where a bar or nothing is wanted."""
    wanted = config.log_to_console or (config.progress_bar is None and not show_progress(config))
    return config.console_log_interval if wanted else None


def show_progress(config: RunConfig) -> bool:
    """Say whether to show progress bars: as the YAML says, or else in a terminal."""
    return sys.stderr.isatty() if config.progress_bar is None else config.progress_bar
