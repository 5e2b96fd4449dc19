"""Turn encoded bytes into uint8 pixels and crops, and, on the device, uint8 into normalised floats.

Evaluation feeds a model what ``open_clip.image_transform`` would. Training crops have the
distribution of open_clip's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from alignclip.data.image_files import (
    EVALUATION_FORMATS,
    TRAINING_FORMATS,
    check_jpeg_pixels,
)

JPEG_MAGIC = b"\xff\xd8\xff"
BOX_ATTEMPTS = 10  # of a training crop, as many as torchvision's


def decode_image(data: bytes) -> Tensor:
    """Decode an image file held in memory.

    JPEG goes through torchvision (2.5 times PIL's speed). What torchvision can't read (PNG, WebP,
    CMYK) or refuses goes through PIL, which drops alpha as open_clip's own transform does.

    Returns:
        uint8 ``[3, height, width]``, RGB.

    Raises:
        OSError: neither decoder can read it, or it has too many pixels.
    """
    if data.startswith(JPEG_MAGIC):
        check_jpeg_pixels(data)
        with suppress(RuntimeError):
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_jpeg(content, mode=ImageReadMode.UNCHANGED)
            if image.shape[0] in (1, 3):
                return image.expand(3, -1, -1)
    try:
        with Image.open(io.BytesIO(data), formats=TRAINING_FORMATS) as picture:
            return pil_to_tensor(picture.convert("RGB"))
    except OSError:
        raise
    except Exception as error:  # broken files make PIL raise nearly anything
        raise OSError(f"{type(error).__name__}: {error}") from error


def random_resized_crop(
    image: Tensor, size: int, scale: Sequence[float], ratio: Sequence[float], seed: int
) -> Tensor:
    """Crop as open_clip does in training, drawn from ``seed`` alone.

    So a resumed run crops as the killed run would have.

    Args:
        image: uint8 ``[3, height, width]``.
        size: side of the result, pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        seed: of this draw. The global generators stay untouched.

    Returns:
        uint8 ``[3, size, size]``. The bytes lie as decoders give them, a pixel's three together.
    """
    top, left, height, width = draw_box(image.shape[1], image.shape[2], scale, ratio, seed)
    # Copied as the bytes lie. From a part of an image, PyTorch would make planes, a third slower.
    pixels = image.permute(1, 2, 0)[top : top + height, left : left + width].contiguous()
    cropped: Tensor = F.resize_image(
        pixels.permute(2, 0, 1), [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    return cropped


def draw_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], seed: int
) -> tuple[int, int, int, int]:
    """Draw the box of a training crop, the same as torchvision's RandomResizedCrop.

    torchvision draws a share of the area and a ratio of the sides until such a box fits, ten times
    at most, and each number by itself. Here all numbers of one kind are drawn at once: from the
    same seed, a number has the same place in the generator's sequence.

    Args:
        height: of the image.
        width: of the image.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        seed: of this draw.

    Returns:
        top, left, height and width of the box.
    """
    generator, drawn = torch.Generator(), torch.empty(2 * BOX_ATTEMPTS)
    bounds = _logarithms(*ratio)
    generator.manual_seed(seed)
    areas = drawn.uniform_(*scale, generator=generator).tolist()[::2]
    generator.manual_seed(seed)
    ratios = drawn.uniform_(*bounds, generator=generator).exp_().tolist()[1::2]
    for attempt, (share, sides) in enumerate(zip(areas, ratios, strict=True), 1):
        area = height * width * share
        box_width, box_height = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
        if 0 < box_width <= width and 0 < box_height <= height:
            generator.manual_seed(seed)
            drawn[: 2 * attempt].uniform_(generator=generator)  # to the place behind this attempt
            top, left = (
                int(torch.randint(0, room + 1, (1,), generator=generator))
                for room in (height - box_height, width - box_width)
            )
            return top, left, box_height, box_width
    # none fits: the largest box in the middle whose sides have a ratio within the bounds
    box_height, box_width = height, width
    if width / height < min(ratio):
        box_height = round(width / min(ratio))
    elif width / height > max(ratio):
        box_width = round(height * max(ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@cache
def _logarithms(smallest: float, largest: float) -> list[float]:
    """Return the logarithms of two numbers in fp32, as torchvision takes them."""
    logarithms: list[float] = torch.tensor([smallest, largest]).log().tolist()
    return logarithms


def center_crop(data: bytes, size: int) -> Tensor:
    """Resize and crop by open_clip's own evaluation transform, up to the uint8 pixels.

    Args:
        data: an image file in memory.
        size: side of the result, pixels.

    Returns:
        uint8 ``[3, size, size]``.

    Raises:
        OSError: PIL can't read it.
    """
    *resize_crop_rgb, _, _ = image_transform(size, is_train=False).transforms  # ToTensor, Normalize
    with Image.open(io.BytesIO(data), formats=EVALUATION_FORMATS) as picture:
        result: Image.Image = picture
        for step in resize_crop_rgb:
            result = step(result)
    return pil_to_tensor(result)


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images into floats with OpenAI's mean and deviation, where the images are.

    Args:
        images: uint8 ``[N, 3, height, width]``, in any order of bytes.

    Returns:
        float32 of the same shape, in planes.
    """
    # filled where the images are: values that come from the host would make the host wait
    mean, deviation = (
        torch.cat([torch.full((1, 1, 1), value, device=images.device) for value in values])
        for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    # not in place: torch.compile can't divide such a graph where encoders recompute chunks
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (pixels / 255 - mean) / deviation
