"""Sizes of published evaluation sets, to tell a set that is not the one it is called."""

from __future__ import annotations

# Images of each split, as the publishers count them; several numbers where several lists are in use.
# COCO, Flickr8k and Flickr30k: Karpathy's splits (https://cs.stanford.edu/people/karpathy/deepimagesent);
# Flickr30k also by Flickr30k Entities' lists, Flickr8k also by the publisher's.
IMAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "coco": {
        "train": (82_783,),
        "restval": (30_504,),
        "train+restval": (113_287,),
        "val": (5_000,),
        "test": (5_000,),
    },
    "coco2017": {"train": (118_287,), "val": (5_000,)},
    "flickr8k": {"train": (6_000,), "val": (1_000,), "test": (1_000,)},
    "flickr30k": {"train": (29_000, 29_783), "val": (1_014, 1_000), "test": (1_000,)},
    "cifar10": {"train": (50_000,), "test": (10_000,)},
    "cifar100": {"train": (50_000,), "test": (10_000,)},
    "flowers": {"train": (1_020,), "val": (1_020,), "test": (6_149,)},
    "food101": {"train": (75_750,), "test": (25_250,)},
    "cars": {"train": (8_144,), "test": (8_041,)},
    "fashion_mnist": {"train": (60_000,), "test": (10_000,)},
    "imagenet1k": {"train": (1_281_167,), "val": (50_000,)},
    "imagenetv2": {"test": (10_000,)},
    "imagenet-a": {"test": (7_500,)},
    "imagenet-r": {"test": (30_000,)},
    "imagenet-o": {"test": (2_000,)},
    "imagenet-sketch": {"test": (50_889,)},
}
# Images of whole sets whose annotation files look alike.
WHOLE = {8_091: "Flickr8k", 8_092: "Flickr8k", 31_783: "Flickr30k", 31_014: "Flickr30k"}
WHOLE |= {40_504: "COCO's val2014", 82_783: "COCO's train2014", 123_287: "COCO 2014"}


def published(dataset: str, split: str) -> tuple[int, ...]:
    """Return the numbers of images that a split is published with; empty where nobody published the split."""
    return IMAGES.get(dataset, {}).get(split, ())


def difference(dataset: str, split: str, images: int) -> str | None:
    """Say in a sentence that a set has not the published number of images.

    Returns:
        None where the number is a published one, or where no number is published.
    """
    known = published(dataset, split)
    if not known or images in known:
        return None
    return f"{dataset}'s {split} split is published with {_listed(known)} images, this one has {images:,}"


def larger(dataset: str, split: str, images: int) -> str | None:
    """Say why a file of ``images`` images can't be the split; None where the file can be the split."""
    known = published(dataset, split)
    if not known or images <= max(known):
        return None
    looks = f", and {WHOLE[images]} as a whole has {images:,}" if images in WHOLE else ""
    return f"{dataset}'s {split} split has {_listed(known)} images{looks}"


def _listed(numbers: tuple[int, ...]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)
