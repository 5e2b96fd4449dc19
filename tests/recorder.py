"""What ``recording.py`` runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor

from alignclip.training import build, command, history

DRAWS = "ALIGNCLIP_TEST_DRAWS"  # in the environment: a run draws its learning curves


class Recorder(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gradient_steps = int(os.environ.get("ALIGNCLIP_TEST_GRADIENTS", "0"))
        self.step_seconds = float(os.environ.get("ALIGNCLIP_TEST_STEP_SECONDS", "0"))
        self.hold_at = int(os.environ.get("ALIGNCLIP_TEST_HOLD_AT", "-1"))
        self.lr = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        self.lr = state.optimizers[0].param_groups[0]["lr"]

    def after_backward(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step >= self.gradient_steps:
            return
        gradients = {}
        for name, parameter in state.model.named_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name.removeprefix("module.").removeprefix("encoders.")] = gradient.clone()
        if dist.get_global_rank() == 0:
            torch.save(gradients, self.folder / f"gradients-{step}.pt")

    def batch_end(self, state: State, logger: Logger) -> None:
        time.sleep(self.step_seconds)
        rank = dist.get_global_rank()
        samples = {
            "step": int(state.timestamp.batch) - 1,
            "ranks": dist.get_world_size(),
            "ranks_of_node": dist.get_local_world_size(),
            "rank": rank,
            "samples": state.batch["sample"].tolist(),
        }
        with (self.folder / f"samples-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(samples) + "\n")
        if rank != 0:
            return
        scale = state.outputs[2]
        record = {
            "step": int(state.timestamp.batch) - 1,
            "lr": self.lr,
            "logit_scale": float(scale),
            "sharded": sum(isinstance(p, DTensor) for p in state.model.parameters()),
            **{key: float(value).hex() for key, value in state.total_loss_dict.items()},
        }
        with (self.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        while (
            int(state.timestamp.batch) - 1 == self.hold_at and not (self.folder / "go-on").exists()
        ):
            time.sleep(0.2)


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    build_callbacks = build.build_callbacks
    build.build_callbacks = lambda config: [*build_callbacks(config), Recorder(folder)]
    if DRAWS not in os.environ:  # drawing the learning curves takes as long as a short run
        history.page = lambda name, lines: ""
        history.save_picture = lambda path, lines: path.touch()
    return command.main(arguments[1:])
