"""The search for images that an annotation file names, in folders of unpacked archives."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

from alignclip.data.mds_index import LONGEST_NAME
from alignclip.errors import UserError

SEARCHED_DEPTH = 2  # folders below --images that are searched
MOST = 200  # of such folders
OF_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")


class ImageFinder:
    """Finds files below a folder.

    Args:
        root: the folder of ``--images``.
        published: the names are a published set's, in which no two images have the same file name.
            Such an image may lie in any folder, and COCO's images of 2014 may have their names of
            2017. An image of other sets lies where the annotations say.
    """

    def __init__(self, root: Path, published: bool) -> None:
        self.root = root
        self.published = published
        self._last = root

    def find(self, image: str) -> Path:
        """Return the file of an image; where there is none, the place where it is expected.

        Raises:
            UserError: the name leads out of the folder: somebody else's annotations could name any
                file of this machine.
        """
        if not _may_exist(image):
            raise UserError(f"the annotations name an image that no file can be called: {image!a}")
        expected = self.root / image
        is_elsewhere = self.published and not expected.is_relative_to(self.root)
        if ".." in expected.parts or is_elsewhere:
            raise UserError(
                f"the annotations name an image outside of --images: {image!a}; give --images the "
                "folder that holds all images, and names below it"
            )
        if expected.is_file() or not self.published:
            return expected
        name = Path(image).name
        names = [image, name, *(OF_2014.findall(name))]
        for folder in (self._last, *self._folders):
            for candidate in names:
                if (folder / candidate).is_file():
                    self._last = folder
                    return folder / candidate
        return expected

    @cached_property
    def _folders(self) -> list[Path]:
        """The root and the folders below, nearest first."""
        found, level = [self.root], [self.root]
        for _ in range(SEARCHED_DEPTH):
            level = sorted(e for folder in level for e in folder.iterdir() if e.is_dir())[:MOST]
            found += level
        return found


def _may_exist(path: str) -> bool:
    """Say whether a file may have such a path."""
    try:
        parts = [os.fsencode(part) for part in path.split("/")]
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return "\0" not in path and all(len(part) <= LONGEST_NAME for part in parts)
