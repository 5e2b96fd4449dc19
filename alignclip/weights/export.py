"""The work of ``convert/checkpoint.py``: a model of any format into the files of another one.

Every export is read again by the library that it is for, and encodes the same inputs. One that
differs is an error, and nothing is left of it. A README.md, the model card, says what was trained
on what, and under which licence.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alignclip.config.reading import model_section
from alignclip.config.schema import VOCABULARY, ModelConfig
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError, one_line
from alignclip.storage.new_folder import new_folder
from alignclip.weights.card import recipe_of, write_card
from alignclip.weights.digest import weights_digest
from alignclip.weights.figures import read_figures
from alignclip.weights.formats import format_named
from alignclip.weights.formats.base import (
    Encode,
    Format,
    Loaded,
    Preprocess,
    Reopened,
    clones,
    encode_with,
)
from alignclip.weights.formats.hugging_face_settings import special_tokens
from alignclip.weights.formats.onnx import read_onnx, write_onnx
from alignclip.weights.formats.release import Release
from alignclip.weights.licenses import choose_license
from alignclip.weights.load import load, open_model
from alignclip.weights.locate import CARD, UNUSED

if TYPE_CHECKING:
    from alignclip.weights.export_command import ExportOptions

TOLERANCE = 1e-5  # of normalised features, and of exp(logit_scale) relative to itself
# Both sides resize by PIL to the same of 256 levels; what is left is the rounding of float32
PIXEL_TOLERANCE = 0.1 / 255
CHECKED_CAPTIONS = [
    "a red bicycle",
    "",
    "a photo of the number 7!",
    "naïve café",
    "two dogs run on the beach " * 40,
]


def export_model(options: ExportOptions) -> float:
    """Read, write, read again, compare; return the largest difference of a feature.

    Raises:
        UserError: no such source, not a model, a format that it can't be written in, or an export
            that doesn't compute the same.
    """
    config = _model_config(options.model_config) if options.model_config else None
    figures = read_figures(options.metrics) if options.metrics else None
    loaded = open_model(options.source, config=config)
    results, unsure = (
        figures.of(weights_digest(loaded.model), options.source) if figures else (None, None)
    )
    recipe, given = recipe_of(loaded), options.license
    start = recipe.get("pretrained") or recipe.get("load_path")
    license = choose_license(
        loaded.card, loaded.format, options.source, given, str(start) if start else None
    )
    form = format_named(options.to)
    card = write_card(loaded, options.source, license, results, form, options.out.rstrip("/"))
    try:
        with new_folder(options.out, form.last) as folder:
            worst = _write_checked(loaded, form, options, folder)
            (folder / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {one_line(error)}") from None
    for note in license.notes:
        print(f"licence: {note}", file=sys.stderr)
    if unsure:
        print(f"metrics: {unsure}", file=sys.stderr)
    return worst


def _model_config(path: str) -> ModelConfig:
    try:
        return model_section(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model-config {path}: no model section can be read: {one_line(error)}"
        ) from None


def _write_checked(loaded: Loaded, form: Format, options: ExportOptions, folder: Path) -> float:
    """Write everything but the card into an empty folder, and check it."""
    ours = encode_with(loaded.model)
    try:
        form.write(loaded, folder)
        # tensors that no model uses: with them the way back to the release is without a loss
        if loaded.unused and not isinstance(form, Release):
            save_file(clones(loaded.unused), folder / UNUSED)
    except (SafetensorError, RuntimeError) as error:  # a full disk, by these libraries' own names
        raise UserError(f"cannot write {options.out}: {one_line(error)}") from None
    again = form.reopen(folder) or _reopen_here(folder / form.last)
    worst = compare_features(loaded, ours, again.encode, options.to)
    compare_pixels(loaded, again.prepare, options.to)
    if options.onnx:
        write_onnx(loaded.model, folder)
        scale = loaded.model.logit_scale.detach().exp().reshape(())
        worst = max(worst, compare_features(loaded, ours, read_onnx(folder, scale), "ONNX"))
    return worst


def _reopen_here(file: Path) -> Reopened:
    """Read an export by alignclip."""
    model, prepare, _ = load(file)
    return Reopened(encode_with(model), prepare)


# --- the check --------------------------------------------------------------------------------


def compare_features(loaded: Loaded, ours: Encode, theirs: Encode, name: str) -> float:
    """Return the largest difference of normalised features between a model and its export.

    Raises:
        UserError: it is more than :data:`TOLERANCE`, or the temperatures differ.
    """
    images, tokens = _inputs(loaded.config)
    (image, text, scale), (image2, text2, scale2) = ours(images, tokens), theirs(images, tokens)
    worst = 0.0
    for one, other in ((image, image2), (text, text2)):
        gap = (F.normalize(one.float(), dim=-1) - F.normalize(other.float(), dim=-1)).abs().max()
        worst = max(worst, float(gap.nan_to_num(nan=float("inf"))))
    relative = float(((scale - scale2) / scale).abs())
    if not (worst <= TOLERANCE and relative <= TOLERANCE):
        raise UserError(
            f"--to {name}: read again, the features differ by {worst:.1e} and logit_scale by "
            f"{relative:.1e} (at most {TOLERANCE:.0e}); nothing was written"
        )
    return worst


def _inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Make images and texts of different lengths that fit any model: noise, and random words.

    Where the model reads CLIP's tokens, real captions follow, as CLIP's tokenizer writes them.
    """
    generator = torch.Generator().manual_seed(0)
    size, text = config.vision_cfg.image_size, config.text_cfg
    length = text.context_length
    images = torch.randn(8, 3, size, size, generator=generator)
    tokens = torch.zeros(8, length, dtype=torch.long)
    start, end = special_tokens(text.vocab_size)
    for i, row in enumerate(tokens):
        words = 1 + i * max(0, length - 3) // 7
        row[0] = start
        row[1 : words + 1] = torch.randint(1, start, (words,), generator=generator)[: length - 2]
        row[min(words + 1, length - 1)] = end
    if text.vocab_size >= VOCABULARY:
        tokens = torch.cat([tokens, SimpleTokenizer(context_length=length)(CHECKED_CAPTIONS)])
    return images, tokens


def compare_pixels(loaded: Loaded, prepare: Preprocess, name: str) -> None:
    """See that the export's library prepares a picture as the model's images are prepared.

    The picture is three times as wide as it is high, so that an even number of columns is cut off:
    of an odd number the libraries leave the half on different sides.

    Raises:
        UserError: the pixels differ.
    """
    side = loaded.config.vision_cfg.image_size + 7
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (4, 12, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(values.numpy()).resize((3 * side, side), Image.Resampling.BILINEAR)
    ours, theirs = image_transform_v2(loaded.preprocess, is_train=False)(picture), prepare(picture)
    std = torch.tensor(loaded.preprocess.std).view(3, 1, 1)
    gap = float(((ours - theirs) * std).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not gap <= PIXEL_TOLERANCE:
        raise UserError(
            f"--to {name}: read again, it prepares images otherwise: pixels differ by "
            f"{gap * 255:.1f} of 255 levels; nothing was written"
        )
