"""Published evaluation sets: their readers and sizes; what a set is that has another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, TypeVar

from alignclip.errors import UserError, nearest

P = ParamSpec("P")
Read = TypeVar("Read")

# Images of whole sets whose annotation files look alike.
WHOLE_SETS = {
    **dict.fromkeys((8_091, 8_092), "Flickr8k"),
    **dict.fromkeys((31_783, 31_014), "Flickr30k"),
    40_504: "COCO's val2014",
    82_783: "COCO's train2014",
    123_287: "COCO 2014",
}


@dataclass(frozen=True)
class PublishedSet(Generic[P, Read]):
    """A set that a converter reads.

    Attributes:
        read: the reader of the publisher's files.
        sizes: split -> images, as the publishers count them; several numbers where several lists
            are in use. No sizes: any name of a split will do.
        split: the split by default.
    """

    read: Callable[P, Read]
    sizes: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    split: str = "test"

    def known_sizes(self, split: str) -> tuple[int, ...]:
        """Return the numbers of images that a split is published with; none where nobody knows."""
        sizes = self.sizes.get(split, ())
        return (sizes,) if isinstance(sizes, int) else sizes

    def size_notes(self, name: str, split: str, images: int) -> list[str]:
        """Say that a split has not the published number of images, where it has another one."""
        known = self.known_sizes(split)
        if not known or images in known:
            return []
        published = f"{name}'s {split} split is published with {_either(known)} images"
        return [f"{published}, this one has {images:,}"]

    def why_too_many(self, name: str, split: str, images: int) -> str | None:
        """Say why a file of ``images`` images can't be the split; None where it can."""
        known = self.known_sizes(split)
        if not known or images <= max(known):
            return None
        whole = WHOLE_SETS.get(images)
        looks = f", and {whole} as a whole has {images:,}" if whole else ""
        return f"{name}'s {split} split has {_either(known)} images{looks}"


def find_set(sets: Mapping[str, PublishedSet[P, Read]], name: str) -> PublishedSet[P, Read]:
    """Return a set of a table by its name.

    Raises:
        UserError: there is no such set; names the nearest one.
    """
    if name not in sets:
        raise UserError(f"unknown dataset '{name}'; {nearest(name, sets)}")
    return sets[name]


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)
