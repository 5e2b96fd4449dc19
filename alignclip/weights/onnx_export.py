"""Both encoders as ONNX graphs, read again by ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from alignclip.errors import UserError
from alignclip.model.encoders import CLIP
from alignclip.weights.exports import Encode

IMAGE, TEXT = "image_encoder.onnx", "text_encoder.onnx"
OPSET = 17


class _Image(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)


class _Text(nn.Module):
    """All positions: a graph can't be trimmed to the longest text."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return open_clip.CLIP.encode_text(self.model, text)


def write_onnx(model: CLIP, folder: Path) -> None:
    """``image`` float32 [n, 3, s, s] and ``text`` int64 [n, context_length] -> ``features`` [n, embed_dim], any n.

    The features are not normalised, as ``encode_image`` and ``encode_text`` return them.

    Raises:
        UserError: a package is missing, or the model can't be traced.
    """
    _onnxruntime()
    size = model.visual.image_size[0]
    image = torch.zeros(2, 3, size, size)
    text = torch.zeros(2, model.context_length, dtype=torch.long)
    for name, encoder, example, argument in (
        (IMAGE, _Image(model), image, "image"),
        (TEXT, _Text(model), text, "text"),
    ):
        try:
            with (
                warnings.catch_warnings(),
                torch.no_grad(),
                _plain_attention(),
                redirect_stdout(io.StringIO()),
            ):
                warnings.simplefilter(
                    "ignore"
                )  # the tracer's, of Python numbers that are the same for every input
                torch.onnx.export(
                    encoder.eval(),
                    (example,),
                    str(folder / name),
                    input_names=[argument],
                    output_names=["features"],
                    dynamic_axes={argument: {0: "n"}, "features": {0: "n"}},
                    opset_version=OPSET,
                    dynamo=False,
                )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            raise UserError(
                f"--onnx: this model can't be exported: {str(error).splitlines()[0]}"
            ) from None


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Of operators that ONNX has: PyTorch's fused one for inference is none of them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def read_onnx(folder: Path, scale: Tensor) -> Encode:
    """Both graphs in ONNX Runtime on the CPU; ``scale`` is not in them and comes back as it is."""
    runtime = _onnxruntime()
    providers = ["CPUExecutionProvider"]
    image, text = (
        runtime.InferenceSession(str(folder / name), providers=providers) for name in (IMAGE, TEXT)
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
