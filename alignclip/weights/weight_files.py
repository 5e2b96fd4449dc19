"""A file of weights → the values that it holds, whatever program wrote the file.

Nothing of a file is executed (:mod:`alignclip.weights.safe_read`), so a file from a stranger can
only be wrong. A file is what its first bytes say, not what it is called: people rename files, and
downloads end as web pages.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignclip.checked_json import has_type, parse_json
from alignclip.errors import UserError, few, one_line
from alignclip.weights.checkpoint_file import has_right_checksum
from alignclip.weights.locate import find_beside
from alignclip.weights.safe_pickle import Unread
from alignclip.weights.safe_read import read_pickled

TORCH_SCRIPT = "__torch__."  # where TorchScript has the classes of a program
# Configurations and the like that training programs leave beside weights. None of them is made: a
# reader of weights has no use for them, and nothing of their libraries is imported.
PASSED_OVER = (
    TORCH_SCRIPT, "torch.jit._pickle.", "omegaconf.", "typing.", "types.SimpleNamespace",
    "yacs.config.", "easydict.", "ml_collections.", "addict.", "box.", "hydra.", "lightning.",
    "lightning_fabric.", "pytorch_lightning.", "transformers.", "torch.optim.",
    "torch._C._distributed", "numpy.random.", "uuid.", "decimal.", "fractions.",
)  # fmt: skip
PARTS_INDEX = ".index.json"  # ends the name of Hugging Face's list of a model's files
WEB_PAGE = "is a web page, not a file of weights: the download has failed"
FIRST_BYTES = {  # of files that people take for weights
    b"version https://git-lfs":
        "is a pointer of Git LFS, not the file itself; get that with 'git lfs pull'",
    b"<!DOCTYPE": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\xfd7zXZ": "is compressed with xz; unpack it first",
    b"BZh": "is compressed with bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"\x89HDF": "is an HDF5 file (of Keras?), which isn't read; "
        "export it as PyTorch or safetensors",
    b"GGUF": "is a GGUF file, which isn't read: its weights are quantized",
    b"\x93NUMPY": "is one NumPy array, not a model's weights",
}  # fmt: skip
# Where training programs keep a model's weights in a checkpoint; the first that is there counts
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "weights")
# The text tower's embedding under each format's name; what comes before is a wrapper's name
ANCHORS = (
    "text.token_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "token_embedding.weight",
)


class _PartsIndex(TypedDict):
    weight_map: dict[str, str]


@dataclass
class Content:
    """The content of a file of weights.

    Attributes:
        file: where the file is on this machine.
        place: what the person calls the file, for errors.
        values: the values by their names.
        torch_script: whether the file is a TorchScript archive.
        known: settings that another list has of this file, by the names of open_clip's
            ``open_clip_config.json``; a file beside the weights says more.
    """

    file: Path
    place: str
    values: dict[str, Any]
    torch_script: bool = False
    known: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Somebody else's state dict, without what was around the model.

        Raises:
            UserError: the file holds none, several, or tensors that are no plain numbers.
        """
        weights = _without_wrapper(_state_dict(self.values, self.place), self.place)
        check_tensors(weights, self.place)
        return weights

    def json_beside(self, name: str) -> dict[str, Any]:
        """Return the parsed JSON file of that name beside the file or its link's, or an empty dict.

        Raises:
            UserError: it is no JSON.
        """
        path = find_beside(self.file, name)
        if path is None:
            return {}
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{self.place}: the {name} beside it is not JSON: {one_line(error)}"
            ) from None
        return content if isinstance(content, dict) else {}


def read(file: Path, place: str) -> Content:
    """Read a file of weights; its tensors are mapped into memory.

    Args:
        file: where it is on this machine; a name that ends with ``.index.json`` lists the files of
            one model.
        place: what the person calls it, for errors.

    Raises:
        UserError: it is something else, truncated, or holds Python objects that are no plain data.
    """
    if file.name.endswith(PARTS_INDEX):
        return Content(file, place, _read_parts(file, place))
    with file.open("rb") as opened:
        start = opened.read(512)
    for first, sentence in FIRST_BYTES.items():
        if start.startswith(first) or start.lstrip().lower().startswith(first.lower()):
            raise UserError(f"{place} {sentence}")
    if file.suffix == ".safetensors" or _is_safetensors(start, file.stat().st_size):
        try:
            return Content(file, place, dict(load_file(file)))
        except Exception as error:  # of safetensors, and of torch where it knows no such dtype
            raise UserError(
                f"{place} is not a safetensors file, or only a part of one ({type(error).__name__})"
            ) from None
    if not zipfile.is_zipfile(file) and tarfile.is_tarfile(file):
        raise UserError(f"{place} is a tar archive; unpack it, and name the file of weights in it")
    if has_right_checksum(file) is False:
        raise UserError(f"{place} is damaged: its checksum is wrong")
    content = read_pickled(file, what=place, mapped=True, passed_over=PASSED_OVER)
    if isinstance(content, Unread) and content.name.startswith(TORCH_SCRIPT):
        return Content(file, place, _of_torch_script(content), torch_script=True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{place} holds a {type(content).__name__}, not a model's weights")
    return Content(file, place, content)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Tell whether a file begins as safetensors does: the length of a JSON header, the header."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size


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


def _read_parts(index: Path, place: str) -> dict[str, Any]:
    """Return the tensors of all files that an index lists, each a plain name beside the index.

    Raises:
        UserError: no such index, a name that leads elsewhere, or a file that isn't there or holds
            no weights.
    """
    try:
        listed = parse_json(index.read_bytes())
        if not has_type(listed, _PartsIndex):
            raise ValueError("it has no weight_map from names to files")
    except ValueError as error:
        raise UserError(f"{place} is no index of a model's files: {one_line(error)}") from None
    names = sorted({*listed["weight_map"].values()})
    whole: dict[str, Any] = {}
    for name in names:
        if name != Path(name).name or not name.endswith((".safetensors", ".bin")):
            raise UserError(
                f"{place} is refused: it lists '{name[:80]}', which is no file of weights beside it"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{place} lists {name}, which isn't there")
        whole |= read(index.parent / name, f"{name} of {place}").values
    return whole


def _state_dict(values: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """Return a state dict, bare or in a training checkpoint, without the numbers and texts in it.

    Raises:
        UserError: there is none.
    """
    for found in (*(values.get(name) for name in HOLDERS), values):
        if isinstance(found, Mapping) and any(
            isinstance(value, Tensor | np.ndarray) for value in found.values()
        ):
            return {
                str(name): _as_tensor(value)
                for name, value in found.items()
                if _may_be_weight(value)
            }
    raise UserError(f"{place} is not a model's weights; it holds {few(map(str, values))}")


def _may_be_weight(value: Any) -> bool:
    """Tell whether a value of a state dict is a tensor, of whatever kind."""
    if isinstance(value, Unread):
        return value.name.startswith("torch._utils.")
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    return is_array or isinstance(value, Tensor)


def _as_tensor(value: Any) -> Any:
    """Return a NumPy array as a tensor, and anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


def _without_wrapper(weights: dict[str, Any], place: str) -> dict[str, Any]:
    """Return weights without the name of a wrapper such as DistributedDataParallel or a class.

    What lay beside the model in the wrapper, a loss for example, is left out.

    Raises:
        UserError: there are several models in it.
    """
    prefixes = set()
    for name in weights:
        if anchor := next((anchor for anchor in ANCHORS if name.endswith(anchor)), None):
            prefixes.add(name.removesuffix(anchor))
    if len(prefixes) > 1:
        raise UserError(
            f"{place} holds several models: {few(sorted(prefixes))}; "
            "save the state_dict of one alone"
        )
    prefix = prefixes.pop() if prefixes else ""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def check_tensors(weights: Mapping[Any, Any], place: str) -> None:
    """Refuse tensors whose numbers don't lie in the file, or are no plain numbers.

    Raises:
        UserError: names the first one.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            what = value.what if isinstance(value, Unread) else f"a {type(value).__name__}"
            raise UserError(
                f"{place} is not a model's weights: '{name}' is {what}, not plain numbers"
            )
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized or value.is_nested:
            raise UserError(
                f"{place} is not a model's weights: "
                f"'{name}' is a sparse, quantized or other special tensor"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{place} is refused: "
                f"'{name}' is {list(value.shape)}, more than the file holds of it"
            )
