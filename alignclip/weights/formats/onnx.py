"""Both encoders as ONNX graphs, beside an export of another format."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from alignclip.errors import UserError
from alignclip.model.encoders import CLIP
from alignclip.weights.formats.base import Encode

IMAGE, TEXT = "image_encoder.onnx", "text_encoder.onnx"
OPSET = 17


class _Encoder(nn.Module):
    """An encoder as a module, which is what the tracer takes."""

    def __init__(self, model: CLIP, encode: Callable[[CLIP, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(self.model, inputs)


def write_onnx(model: CLIP, folder: Path) -> None:
    """Write a graph from ``image`` and one from ``text`` to ``features`` [n, embed_dim], any n.

    ``image`` is float32 [n, 3, s, s], ``text`` int64 [n, context_length]. The features are not
    normalised, as ``encode_image`` and ``encode_text`` return them.

    Raises:
        UserError: a package is missing, or the model can't be traced.
    """
    _onnxruntime()
    size = model.visual.image_size[0]
    image = torch.zeros(2, 3, size, size)
    text = torch.zeros(2, model.context_length, dtype=torch.long)
    # all positions of a text: a graph can't be trimmed to the longest text
    _write_graph(folder / IMAGE, _Encoder(model, CLIP.encode_image), "image", image)
    _write_graph(folder / TEXT, _Encoder(model, open_clip.CLIP.encode_text), "text", text)


def _write_graph(path: Path, encoder: nn.Module, name: str, example: Tensor) -> None:
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            _plain_attention(),
            redirect_stdout(io.StringIO()),
        ):
            # the tracer's, of Python numbers that are the same for every input
            warnings.simplefilter("ignore")
            torch.onnx.export(
                encoder.eval(),
                (example,),
                str(path),
                input_names=[name],
                output_names=["features"],
                dynamic_axes={name: {0: "n"}, "features": {0: "n"}},
                opset_version=OPSET,
                dynamo=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise UserError(
            f"--onnx: this model can't be exported: {str(error).splitlines()[0]}"
        ) from None


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Compute attention by operators that ONNX has: PyTorch's fused one for inference is none."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def read_onnx(folder: Path, scale: Tensor) -> Encode:
    """Read both graphs by ONNX Runtime on the CPU; ``scale``, which isn't in them, comes back."""
    runtime = _onnxruntime()
    image, text = (
        runtime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in (IMAGE, TEXT)
    )

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = image.run(None, {"image": images.numpy()})
        (texts,) = text.run(None, {"text": tokens.numpy()})
        return torch.from_numpy(found), torch.from_numpy(texts), scale

    return encode


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'alignclip[onnx]'") from None
    return onnxruntime
