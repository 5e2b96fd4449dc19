"""Rank the images of a folder by a text.

``python examples/search.py runs/first photos/ "a red bicycle"``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import alignclip
from alignclip.errors import UserError

BATCH = 64  # images that are encoded at a time
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main() -> None:
    """Print the best images with their cosines."""
    parser = argparse.ArgumentParser(description="Rank the images of a folder by a text.")
    parser.add_argument("model", help="anything that alignclip.load takes")
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("text", help="what to look for")
    parser.add_argument("--top", type=int, default=5, help="images to print (default: %(default)s)")
    options = parser.parse_args()

    paths = sorted(p for p in options.folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        parser.exit(2, f"error: {options.folder} holds no {', '.join(SUFFIXES)} file\n")
    try:
        model, _, _ = alignclip.load(options.model)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    features = []
    with torch.inference_mode():
        for first in range(0, len(paths), BATCH):
            pictures = [Image.open(path) for path in paths[first : first + BATCH]]
            features.append(model.encode_image(pictures, normalize=True))
        text = model.encode_text(options.text, normalize=True)
    cosines = (torch.cat(features) @ text.T).squeeze(1)
    for index in cosines.argsort(descending=True)[: options.top].tolist():
        print(f"{cosines[index]:.3f}  {paths[index]}")


if __name__ == "__main__":
    main()
