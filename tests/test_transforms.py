from __future__ import annotations

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional

from alignclip.data.transforms import (
    center_crop,
    decode_image,
    draw_box,
    normalize,
    random_resized_crop,
)

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


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (1.0, 1.0), (0.3, 0.4)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 0.3)])
def test_boxes_are_torchvisions(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Also where no box fits, or one fits after some attempts."""
    for size in [*SIZES, (1, 1), (1, 500), (500, 1), (256, 256), (3, 4), (256, 205)]:
        image = torch.empty(3, *size)
        for seed in (*range(20), 2**32 - 1):
            torch.manual_seed(seed)
            expected = RandomResizedCrop.get_params(image, list(scale), list(ratio))
            assert draw_box(*size, scale, ratio, seed) == expected


@pytest.mark.parametrize(("mode", "form"), KINDS)
def test_crops_are_those_of_torchvision_to_the_bit(mode: str, form: str) -> None:
    """In whatever order a decoder has put the bytes; a pixel's bytes lie together in the crop."""
    for size in (*SIZES, (64, 64)):
        image = decode_image(picture(size, mode, form))
        for seed in range(4):
            box = draw_box(*image.shape[1:], [0.9, 1.0], [3 / 4, 4 / 3], seed)
            theirs = functional.resized_crop(
                image, *box, [64, 64], InterpolationMode.BICUBIC, antialias=True
            )
            for layout in (image.contiguous(), image):
                ours = random_resized_crop(layout, 64, [0.9, 1.0], [3 / 4, 4 / 3], seed)
                assert torch.equal(ours, theirs)
                assert ours.shape == (3, 64, 64)
                assert ours.permute(1, 2, 0).is_contiguous()


def test_normalised_pixels_are_the_same_in_any_order_of_bytes() -> None:
    planes = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    for images in (planes, planes.to(memory_format=torch.channels_last)):
        found = normalize(images)
        assert torch.equal(found, (planes.float() / 255 - mean) / deviation)
        assert found.is_contiguous()
