from __future__ import annotations

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from alignclip.data.transforms import center_crop, decode_image, normalize, random_resized_crop

KINDS = [
    ("RGB", "JPEG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("LA", "PNG"),
    ("RGB", "WEBP"),
]
SIZES = [(340, 256), (256, 340), (100, 80), (301, 64)]


def picture(size: tuple[int, int], mode: str, form: str) -> bytes:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (9, 11, 4), dtype=np.uint8), "RGBA").resize(
        size, Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    converted = (
        smooth.convert(mode) if mode in ("RGBA", "LA") else smooth.convert("RGB").convert(mode)
    )
    converted.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "form"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_sees_open_clips_pixels(size: tuple[int, int], mode: str, form: str) -> None:
    data = picture(size, mode, form)
    theirs = open_clip.image_transform(96, is_train=False)(Image.open(io.BytesIO(data)))
    ours = normalize(center_crop(data, 96)[None])[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("mode", "form"), KINDS)
def test_decoding_agrees_with_pil(mode: str, form: str) -> None:
    data = picture((120, 90), mode, form)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    ours = decode_image(data)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 90, 120)
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_undecodable_images_are_os_errors() -> None:
    whole = picture((120, 90), "RGB", "JPEG")
    for data in (b"", b"not an image", whole[:200]):
        with pytest.raises(OSError):
            decode_image(data)


@pytest.mark.parametrize("size", SIZES)
def test_training_crop_is_open_clips(size: tuple[int, int]) -> None:
    """The same draw of the same crop on PIL's side, to two levels of grey (rounding after each
    of two passes).
    """
    data = picture(size, "RGB", "JPEG")
    pil = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(8):
        ours = random_resized_crop(decode_image(data), 64, [0.9, 1.0], [3 / 4, 4 / 3], seed)
        torch.manual_seed(seed)
        box = RandomResizedCrop.get_params(pil, [0.9, 1.0], [3 / 4, 4 / 3])
        theirs = F.pil_to_tensor(F.resized_crop(pil, *box, [64, 64], InterpolationMode.BICUBIC))
        assert (ours.int() - theirs.int()).abs().max() <= 2


def test_crop_depends_on_its_seed_alone() -> None:
    image = decode_image(picture((120, 90), "RGB", "JPEG"))
    state = torch.random.get_rng_state()
    first = random_resized_crop(image, 32, [0.5, 1.0], [0.75, 1.33], seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, random_resized_crop(image, 32, [0.5, 1.0], [0.75, 1.33], seed=3))
    assert not torch.equal(first, random_resized_crop(image, 32, [0.5, 1.0], [0.75, 1.33], seed=4))
