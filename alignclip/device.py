"""Devices and precisions by the names that they have in a YAML file."""

from __future__ import annotations

import os

import torch

from alignclip.errors import UserError

AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """Return this process's device: ``cpu``, ``gpu`` or ``mps``; a GPU is the default.

    As under Composer, matrix products on a GPU may use TF32, but where the loss and the metrics say
    otherwise.

    Raises:
        UserError: there is no such device here.
    """
    is_there = {
        "cpu": True,
        "gpu": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    chosen = name or ("gpu" if is_there["gpu"] else "cpu")
    if not is_there.get(chosen):
        raise UserError(f"device={chosen}: there is none on this machine; device=cpu?")
    if chosen != "gpu":
        return torch.device(chosen)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return what autocast computes in under one of Composer's precisions; None: no autocast."""
    return AUTOCAST.get(precision)
