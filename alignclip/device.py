"""Devices and precisions by the names that they have in a YAML file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from alignclip.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
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


def processor_name() -> str:
    """Return the name of this machine's processor; "" where the system doesn't say it."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return what autocast computes in under one of Composer's precisions; None: no autocast."""
    return AUTOCAST.get(precision)


def is_faster_in_bf16(device: torch.device) -> bool:
    """Say whether products in bf16 are faster here; on a CPU, where none can be asked, try both."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return _product_seconds(torch.bfloat16) < 0.9 * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """Time a small matrix product on the CPU: the best of a few."""
    matrix, times = torch.ones(256, 256, dtype=dtype), []
    for _ in range(3):
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    return min(times)
