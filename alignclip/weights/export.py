"""Writing a trained model: Composer's checkpoints, the AlignCLIP authors' format, open_clip, Hugging Face, ONNX.

The source is anything that ``alignclip.load`` reads. Every export is read again by the library that it is for, and
encodes the same inputs: one that differs is an error, and nothing is left of it. A README.md, the model card, says what
was trained on what, and under which licence.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from alignclip.config.checks import VOCABULARY
from alignclip.config.reading import model_section
from alignclip.config.schema import ModelConfig
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError, check_place, few, one_line
from alignclip.storage import StorageError, Store, check_folder_writable, open_store, patiently
from alignclip.weights import exports
from alignclip.weights.exports import FORMATS, Encode
from alignclip.weights.figures import read_figures
from alignclip.weights.hugging_face import special_tokens
from alignclip.weights.loading import Loaded, Preprocess, open_model
from alignclip.weights.locate import CARD
from alignclip.weights.model_card import choose_license, write_card
from alignclip.weights.onnx_export import read_onnx, write_onnx
from alignclip.weights.state_dicts import weights_digest

if TYPE_CHECKING:
    from alignclip.weights.export_command import Options

TOLERANCE = 1e-5  # of normalised features, and of exp(logit_scale) relative to itself
# Of pixels: both sides resize by PIL, to the same of 256 levels; what is left is the rounding of float32.
PIXEL_TOLERANCE = 0.1 / 255
CAPTIONS = (
    "a red bicycle",
    "",
    "a photo of the number 7!",
    "naïve café",
    "two dogs run on the beach " * 40,
)


def convert(options: Options) -> float:
    """Read, write, read again, compare; the largest difference of a feature.

    Raises:
        UserError: no such source, not a model, a format that it can't be written in, ``out`` is there already, or an
            export that doesn't compute the same.
    """
    check_place("--out", options.out)
    remote = "://" in options.out
    out = Path(options.out).expanduser()
    if not remote and out.exists():
        raise UserError(f"--out {options.out} is there already; choose another or remove it")
    # before minutes of reading
    bucket = _bucket(options.out.rstrip("/")) if remote else None
    if bucket is None:
        try:
            check_folder_writable(out)
        except StorageError as error:
            raise UserError(f"cannot write to {options.out}: {error.why}") from None
    config = _model_config(options.model_config) if options.model_config else None
    figures = read_figures(options.metrics) if options.metrics else None
    loaded = open_model(options.source, config=config)
    unsure = None
    if figures is not None:
        figures, unsure = figures.of(weights_digest(loaded.model), options.source)
    license = choose_license(loaded, options.source, options.license)
    form = FORMATS[options.to]
    card = write_card(loaded, options.source, license, figures, form, options.out.rstrip("/"))
    parent = Path(tempfile.gettempdir()) if remote else out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # on the same file system, so that a rename makes the whole appear
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        worst = _write(loaded, options, folder)
        (folder / CARD).write_text(card, encoding="utf-8")
        if bucket is not None:
            _upload(folder, bucket, form.last)
        else:
            for file in folder.iterdir():  # safetensors writes for its owner alone
                file.chmod(0o666 & ~_umask())
            folder.chmod(0o777 & ~_umask())
            folder.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {one_line(error)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
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


def _write(loaded: Loaded, options: Options, folder: Path) -> float:
    """Write everything into the empty ``folder`` and check it."""
    form = FORMATS[options.to]
    ours = exports.encoding(loaded.model)
    try:
        form.write(loaded, folder)
        exports.keep_unused(loaded, folder)
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # a full disk, which these libraries call by their own names
        raise UserError(f"cannot write {options.out}: {one_line(error)}") from None
    again = form.read(folder)
    worst = difference(loaded, ours, again.encode, options.to)
    check_pixels(loaded, again.prepare, options.to)
    if options.onnx:
        write_onnx(loaded.model, folder)
        scale = loaded.model.logit_scale.detach().exp().reshape(())
        worst = max(worst, difference(loaded, ours, read_onnx(folder, scale), "ONNX"))
    return worst


def difference(loaded: Loaded, ours: Encode, theirs: Encode, name: str) -> float:
    """The largest difference of normalised features between the model and what was read again.

    Raises:
        UserError: it is more than :data:`TOLERANCE`, or the temperatures differ.
    """
    images, tokens = inputs(loaded.config)
    (image, text, scale), (image2, text2, scale2) = ours(images, tokens), theirs(images, tokens)
    worst = 0.0
    for one, other in ((image, image2), (text, text2)):
        gap = (F.normalize(one.float(), dim=-1) - F.normalize(other.float(), dim=-1)).abs().max()
        worst = max(worst, float(gap.nan_to_num(nan=float("inf"))))
    relative = float(((scale - scale2) / scale).abs())
    if not (worst <= TOLERANCE and relative <= TOLERANCE):
        raise UserError(
            f"--to {name}: read again, the features differ by {worst:.1e} and logit_scale by {relative:.1e} "
            f"(at most {TOLERANCE:.0e}); nothing was written"
        )
    return worst


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Images and texts of different lengths that fit any model: noise and random words, and where it reads them words.

    Real captions come as CLIP's tokenizer writes them, which the exports' tokenizers do, too.
    """
    generator = torch.Generator().manual_seed(0)
    size, length, vocabulary = (
        config.vision_cfg.image_size,
        config.text_cfg.context_length,
        config.text_cfg.vocab_size,
    )
    images = torch.randn(8, 3, size, size, generator=generator)
    tokens = torch.zeros(8, length, dtype=torch.long)
    start, end = special_tokens(vocabulary)
    for i, row in enumerate(tokens):
        words = 1 + i * max(0, length - 3) // 7
        row[0] = start
        row[1 : words + 1] = torch.randint(1, start, (words,), generator=generator)[: length - 2]
        row[min(words + 1, length - 1)] = end
    if vocabulary >= VOCABULARY:
        tokens = torch.cat([tokens, SimpleTokenizer(context_length=length)(list(CAPTIONS))])
    return images, tokens


def check_pixels(loaded: Loaded, prepare: Preprocess, name: str) -> None:
    """See that the export's own library prepares a picture as the model's images are prepared.

    The picture is three times as wide as it is high, so that an even number of columns is cut off: of an odd one the
    libraries leave the half on different sides.

    Raises:
        UserError: the pixels differ.
    """
    side = loaded.config.vision_cfg.image_size + 7
    values = torch.randint(
        0, 256, (4, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    picture = Image.fromarray(values.numpy()).resize((3 * side, side), Image.Resampling.BILINEAR)
    ours, theirs = image_transform_v2(loaded.preprocess, is_train=False)(picture), prepare(picture)
    std = torch.tensor(loaded.preprocess.std).view(3, 1, 1)
    gap = float(((ours - theirs) * std).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not gap <= PIXEL_TOLERANCE:
        raise UserError(
            f"--to {name}: read again, it prepares images otherwise: pixels differ by {gap * 255:.1f} of 255 levels; "
            "nothing was written"
        )


def _bucket(url: str) -> Store:
    """A place in object storage where nothing is and files can be written.

    Raises:
        UserError: it can't be reached or written, or there is something.
    """
    from alignclip.storage.staging import list_remote

    bucket = open_store(url)
    try:
        there = list_remote(url) if bucket.can_list else set()  # Azure can't be listed
        bucket.check_writable()
    except StorageError as error:
        raise UserError(f"cannot write to {url}: {error.why}") from error
    if there:
        raise UserError(
            f"--out {url} holds files already ({few(sorted(there))}); remove them, or choose another"
        )
    return bucket


def _upload(folder: Path, bucket: Store, last: str) -> None:
    """Every file; the one that says that a model is there last. Where that fails, what was uploaded goes again.

    Raises:
        UserError: storage that can't be written to.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == last, name))
    for i, name in enumerate(names):
        try:
            patiently(lambda name=name: bucket.put(folder / name, name), bucket.place)  # type: ignore[misc]
        except BaseException as error:  # Ctrl-C among them
            left = _remove(bucket, names[: i + 1])
            if not isinstance(error, StorageError):
                raise
            more = f"; what is there of it could not be removed: {few(left)}" if left else ""
            raise UserError(f"cannot write to {bucket.place}: {error.why}{more}") from error


def _remove(bucket: Store, names: Sequence[str]) -> list[str]:
    """Delete objects where Streaming's client can, S3 and GCS; the names of those that may have stayed."""
    left = []
    for name in names:
        try:
            bucket.delete(name)
        except StorageError:
            left.append(name)
    return left


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
