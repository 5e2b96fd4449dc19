"""A file of weights → a state dict under our names, whoever wrote it and whatever is around it.

Nothing of a file is executed (:mod:`alignclip.weights.safe_read`), so a file from a stranger can only be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from alignclip.errors import UserError, few
from alignclip.weights import hugging_face, release_format
from alignclip.weights.open_clip_models import NO_WEIGHTS
from alignclip.weights.safe_pickle import Unread
from alignclip.weights.weight_files import read

RUN, RELEASE, OPEN_CLIP = "a run's checkpoint", "the authors' format", "open_clip's format"
HUGGING_FACE = "Hugging Face's format"

# Where training programs keep a model's weights in a checkpoint, the first that is there
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "weights")
# The text tower's embedding under the names of each format; what comes before is a wrapper's
ANCHORS = (
    "text.token_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "token_embedding.weight",
)


@dataclass
class Weights:
    """A file's state dict.

    Attributes:
        weights: under our names.
        kind: :data:`RUN`, :data:`RELEASE`, :data:`OPEN_CLIP` or :data:`HUGGING_FACE`.
        unused: tensors of an authors' file that no model uses, by the authors' names.
        run_name: what the training run was called, where the file says it.
        by_openai: whether OpenAI published it, with its own activation.
        torch_script: whether the file is a TorchScript archive.
        batch: how many batches a run had trained when it wrote the file; None where the file doesn't say it.
    """

    weights: dict[str, Tensor]
    kind: str
    unused: dict[str, Tensor] = field(default_factory=dict)
    run_name: str = ""
    by_openai: bool = False
    torch_script: bool = False
    batch: int | None = None


def read_weights(file: Path, place: str) -> Weights:
    """A file's state dict under our names, and what it is of.

    Args:
        file: where it is on this machine.
        place: what the person calls it, for errors.

    Raises:
        UserError: it holds no model's weights, or code.
    """
    whole = read(file, place)
    content = whole.values
    state = content.get("state")
    if isinstance(state, dict):
        model = state.get(
            "model"
        )  # with Composer's EMA the averaged one: it swaps the average in before a save
        if not isinstance(model, dict) or not any(
            str(name).startswith("encoders.") for name in model
        ):
            raise UserError(f"{place} is a Composer checkpoint, but not of a model of ours")
        check_tensors(model, place)
        ours = {str(name).removeprefix("encoders."): value for name, value in model.items()}
        return Weights(ours, RUN, batch=_batch(state))
    weights = _without_wrapper(_state_dict(content, place), place)
    check_tensors(weights, place)
    if release_format.is_release(weights):
        return Weights(release_format.renamed(weights), RELEASE, release_format.unused(weights))
    if hugging_face.is_clip_model(weights):
        return Weights(hugging_face.renamed(weights), HUGGING_FACE)
    if ANCHORS[0] in weights:  # open_clip's CustomTextCLIP
        weights = {name.removeprefix("text."): value for name, value in weights.items()}
    plain = {name: value for name, value in weights.items() if name not in NO_WEIGHTS}
    by_openai = "input_resolution" in content  # a setting that OpenAI's archives have and no others
    run_name = str(content.get("name", ""))
    return Weights(plain, OPEN_CLIP, {}, run_name, by_openai, whole.torch_script)


def _batch(state: Mapping[Any, Any]) -> int | None:
    """Return the batch in a Composer checkpoint's state; None where there is no such number."""
    value: Any = state
    for key in ("timestamp", "Timestamp", "batch"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if type(value) is int else None


def _state_dict(content: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """Return somebody else's state dict, bare or in a training checkpoint, without the numbers and texts in it.

    Raises:
        UserError: there is none.
    """
    for found in (*(content.get(name) for name in HOLDERS), content):
        if isinstance(found, Mapping) and any(
            isinstance(value, Tensor | np.ndarray) for value in found.values()
        ):
            return {
                str(name): _as_tensor(value)
                for name, value in found.items()
                if _may_be_weight(value)
            }
    raise UserError(f"{place} is not a model's weights; it holds {few(map(str, content))}")


def _may_be_weight(value: Any) -> bool:
    """Whether a value of a state dict is a tensor, of whatever kind; others lie beside the weights."""
    special = isinstance(value, Unread) and value.name.startswith("torch._utils.")
    return (
        special
        or isinstance(value, Tensor)
        or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")
    )


def _as_tensor(value: Any) -> Any:
    """Return a NumPy array as a tensor, and anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


def _without_wrapper(weights: dict[str, Any], place: str) -> dict[str, Any]:
    """Return weights without the names of what was around the model, such as DistributedDataParallel or a class.

    What lay beside the model in that class, a loss for example, is left out.

    Raises:
        UserError: there are several models in it.
    """
    prefixes = set()
    for name in weights:
        if (
            anchor := next((anchor for anchor in ANCHORS if name.endswith(anchor)), None)
        ) is not None:
            prefixes.add(name.removesuffix(anchor))
    if len(prefixes) > 1:
        raise UserError(
            f"{place} holds several models: {few(sorted(prefixes))}; save the state_dict of one alone"
        )
    prefix = prefixes.pop() if prefixes else ""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def check_tensors(weights: Mapping[Any, Any], place: str) -> None:
    """Refuse what is no tensor of numbers that lie in the file: it could not be copied, or would take any memory."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            what = value.what if isinstance(value, Unread) else f"a {type(value).__name__}"
            raise UserError(
                f"{place} is not a model's weights: '{name}' is {what}, not plain numbers"
            )
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized or value.is_nested:
            raise UserError(
                f"{place} is not a model's weights: '{name}' is a sparse, quantized or other special tensor"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{place} is refused: '{name}' is {list(value.shape)}, more than the file holds of it"
            )


def weights_digest(model: nn.Module) -> str:
    """What tells the weights of a model from all others: of names, shapes, types and every bit of the numbers."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"xxh3:{digest.hexdigest()}"
