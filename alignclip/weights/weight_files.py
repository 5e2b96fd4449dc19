"""A file of weights → what it holds, whatever program wrote it; nothing of the file is executed.

A file is what its first bytes say, not what it is called: people rename files, and downloads end as web pages.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from alignclip.errors import UserError, one_line
from alignclip.weights.checkpoint_file import damage, has_checksum
from alignclip.weights.safe_pickle import Unread
from alignclip.weights.safe_read import read_pickled

TORCH_SCRIPT = "__torch__."  # where TorchScript has the classes of a program
# Configurations and the like that training programs leave beside weights. None of them is made: a reader of weights
# has no use for them, and nothing of their libraries is imported.
PASSED_OVER = (
    TORCH_SCRIPT, "torch.jit._pickle.", "omegaconf.", "typing.", "types.SimpleNamespace", "yacs.config.", "easydict.",
    "ml_collections.", "addict.", "box.", "hydra.", "lightning.", "lightning_fabric.", "pytorch_lightning.",
    "transformers.", "torch.optim.", "torch._C._distributed", "numpy.random.", "uuid.", "decimal.", "fractions.",
)  # fmt: skip
INDEX = ".index.json"  # ends the name of Hugging Face's list of a model's files
FIRST_BYTES = {  # of files that people take for weights
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; get that with 'git lfs pull'",
    b"<!DOCTYPE": "is a web page, not a file of weights: the download has failed",
    b"<html": "is a web page, not a file of weights: the download has failed",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\xfd7zXZ": "is compressed with xz; unpack it first",
    b"BZh": "is compressed with bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"\x89HDF": "is an HDF5 file (of Keras?), which isn't read; export it as PyTorch or safetensors",
    b"GGUF": "is a GGUF file, which isn't read: its weights are quantized",
    b"\x93NUMPY": "is one NumPy array, not a model's weights",
}


@dataclass
class Content:
    """What a file of weights holds.

    Attributes:
        values: by their names.
        torch_script: whether they are of a TorchScript module.
    """

    values: dict[str, Any]
    torch_script: bool = False


def read(file: Path, place: str) -> Content:
    """Return what a file of weights holds, its tensors mapped into memory rather than read.

    Args:
        file: where it is on this machine; a name that ends with ``.index.json`` lists the files of one model.
        place: what the person calls it, for errors.

    Raises:
        UserError: it is something else, truncated, or holds Python objects that are not plain data.
    """
    if file.name.endswith(INDEX):
        return _read_parts(file, place)
    with file.open("rb") as opened:
        start = opened.read(512)
    for first, sentence in FIRST_BYTES.items():
        if start.lstrip()[: len(first)].lower() == first.lower() or start.startswith(first):
            raise UserError(f"{place} {sentence}")
    if file.suffix == ".safetensors" or _is_safetensors(start, file.stat().st_size):
        try:
            return Content(dict(load_file(file)))
        except Exception as error:  # of safetensors, and of torch where it knows no such dtype
            raise UserError(
                f"{place} is not a safetensors file, or only a part of one ({type(error).__name__})"
            ) from None
    if zipfile.is_zipfile(file):
        if has_checksum(file) and (why := damage(file)):
            raise UserError(f"{place} is damaged: {why}")
        _check_archive(file, place)
    elif tarfile.is_tarfile(file):
        raise UserError(f"{place} is a tar archive; unpack it, and name the file of weights in it")
    content = read_pickled(file, what=place, mapped=True, passed_over=PASSED_OVER)
    if isinstance(content, Unread) and content.name.startswith(TORCH_SCRIPT):
        return Content(_of_torch_script(content), torch_script=True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{place} holds a {type(content).__name__}, not a model's weights")
    return Content(content)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file begins as safetensors does: the length of a header of JSON, and the header."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size


def _check_archive(file: Path, place: str) -> None:
    """Refuse zip files of other programs with what they are.

    Raises:
        UserError: NumPy's, or one of several files.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return  # which the reader says
    if any(name.endswith(".npy") for name in names):
        raise UserError(
            f"{place} is NumPy's (.npz), which isn't read; save its arrays with torch.save as tensors"
        )
    if names and not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{place} is a zip archive; unpack it, and name the file of weights in it")


def _of_torch_script(module: Unread) -> dict[str, Any]:
    """Return the tensors of a TorchScript module by their names; its code stays where it is."""
    found: dict[str, Any] = {}
    left: list[tuple[str, Unread]] = [("", module)]
    seen: set[int] = set()
    while left:
        prefix, current = left.pop()
        if id(current) in seen or not isinstance(current.state, Mapping):
            continue
        seen.add(id(current))
        for name, value in current.state.items():
            if isinstance(value, Unread) and value.name.startswith(TORCH_SCRIPT):
                left.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif not prefix and type(value) is int:
                found[str(name)] = value  # such as OpenAI's input_resolution
    return found


def _read_parts(index: Path, place: str) -> Content:
    """Return the tensors of all files that an index lists, each a plain name beside it.

    Raises:
        UserError: no such index, or one of the files isn't there or is none of weights.
    """
    whole: dict[str, Any] = {}
    for name in part_names(index, place):
        part = index.parent / name
        if not part.is_file():
            raise UserError(f"{place} lists {name}, which isn't there")
        whole |= read(part, f"{name} of {place}").values
    return Content(whole)


def part_names(index: Path, place: str) -> list[str]:
    """Return the names of the files that an index lists.

    Raises:
        UserError: it is no such index, or a name leads elsewhere.
    """
    try:
        names = sorted(
            {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}, key=str
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place} is no index of a model's files: {one_line(error)}") from None
    for name in names:
        if (
            not isinstance(name, str)
            or name != Path(name).name
            or not name.endswith((".safetensors", ".bin"))
        ):
            raise UserError(
                f"{place} is refused: it lists '{str(name)[:80]}', which is no file of weights beside it"
            )
    return names
