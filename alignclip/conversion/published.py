"""Sizes of published evaluation sets, to tell a set that is not the one it is called."""

from __future__ import annotations

from collections.abc import Mapping

PublishedSizes = Mapping[
    str, tuple[int, ...]
]  # split -> its images; several where several lists are in use

# Images of whole sets whose annotation files look alike.
WHOLE_SETS = {
    **dict.fromkeys((8_091, 8_092), "Flickr8k"),
    **dict.fromkeys((31_783, 31_014), "Flickr30k"),
    40_504: "COCO's val2014",
    82_783: "COCO's train2014",
    123_287: "COCO 2014",
}


def size_difference(dataset: str, split: str, sizes: PublishedSizes, images: int) -> str | None:
    """Say that a set has not the published number of images; None where it has, or nobody knows."""
    known = sizes.get(split)
    if not known or images in known:
        return None
    return (
        f"{dataset}'s {split} split is published with {_either(known)} images, "
        f"this one has {images:,}"
    )


def why_too_many(dataset: str, split: str, sizes: PublishedSizes, images: int) -> str | None:
    """Say why a file of ``images`` images can't be the split; None where it can."""
    known = sizes.get(split)
    if not known or images <= max(known):
        return None
    whole = WHOLE_SETS.get(images)
    looks = f", and {whole} as a whole has {images:,}" if whole else ""
    return f"{dataset}'s {split} split has {_either(known)} images{looks}"


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)
