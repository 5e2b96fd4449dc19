"""Turn encoded bytes into uint8 pixels and crops, and, on the device, uint8 into normalised floats.

Evaluation feeds a model what ``open_clip.image_transform`` would. Training crops have the
distribution of open_clip's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from alignclip.data.image_files import EVALUATION_FORMATS, TRAINING_FORMATS

JPEG_MAGIC = b"\xff\xd8\xff"


def decode_image(data: bytes) -> Tensor:
    """Decode an image file held in memory.

    JPEG goes through torchvision (2.5 times PIL's speed). What torchvision can't read (PNG, WebP,
    CMYK) or refuses goes through PIL, which drops alpha as open_clip's own transform does.

    Returns:
        uint8 ``[3, height, width]``, RGB.

    Raises:
        OSError: neither decoder can read it.
    """
    if data.startswith(JPEG_MAGIC):
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
        uint8 ``[3, size, size]``.
    """
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: torch.manual_seed would seed GPUs, too
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
    box, bicubic = (top, left, height, width), InterpolationMode.BICUBIC
    return F.resized_crop(image, *box, [size, size], interpolation=bicubic, antialias=True)


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
        images: uint8 ``[N, 3, height, width]``.

    Returns:
        float32 of the same shape.
    """
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
