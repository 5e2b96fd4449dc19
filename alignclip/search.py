"""``python -m alignclip.search images/ "a red bicycle"``: the images of a folder, ranked by a text.

The model is ``--model``, or that of the newest run below the working directory, as the recipes and
the quickstart save them. The best are also drawn on one picture.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from alignclip.config.command_line import read_options
from alignclip.config.setting import check_settings, setting
from alignclip.data.image_files import SEARCH_FORMATS
from alignclip.errors import UserError, one_line, one_line_errors
from alignclip.near import did_you_mean
from alignclip.runtime import console
from alignclip.runtime.stand_ins import stand_ins
from alignclip.runtime.threads import set_thread_defaults
from alignclip.verification import contact_sheet
from alignclip.weights import early
from alignclip.weights.locate import LATEST

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from alignclip.weights.load import Preprocess

SEARCH_EXAMPLES = """examples:
  python -m alignclip.search photos/ "a red bicycle"
  python -m alignclip.search photos/ "a red bicycle" --model s3://my-bucket/runs/first
  python -m alignclip.search photos/ "a red bicycle" --model runs/first/latest-rank0.pt \\
    --top 30 --to found.png
  python -m alignclip.search photos/ "a red bicycle" --model hf-hub:ORG/NAME --device cpu | cut -f3\
"""

DRAWN = 1000  # images at most on a contact sheet
TOLD = 3  # unreadable images by name
SHEET = "search.png"
RUNS = ("runs/*", "quickstart-run/checkpoints")  # save folders of the recipes and of the quickstart


@dataclass
class SearchOptions:
    """The settings of one search.

    Attributes:
        folder: with the images.
        text: what is looked for.
        model: anything that :func:`alignclip.load` takes; null takes the newest run here.
        top: how many are shown.
        to: the contact sheet, if any.
    """

    folder: Path = setting(flags=("folder",), help="images; those in its sub-folders, too")
    text: str = setting(flags=("text",), help='what to look for, e.g. "a red bicycle"')
    model: str | None = setting(
        None,
        place=True,
        metavar="PATH",
        help="anything that alignclip.load takes: a run's folder, a checkpoint, an open_clip "
        f"export; a path or a URL (default: the newest run in {' or '.join(RUNS)})",
    )
    top: int = setting(12, at_least=1, metavar="N", help="how many (default %(default)s)")
    to: str | None = setting(
        SHEET,
        off=("--no-sheet", "draw none"),
        place=True,
        metavar="SHEET.png",
        help="the picture that they are drawn on (default %(default)s)",
    )
    device: str | None = setting(
        None, help="cpu, cuda, cuda:1, mps, … (default: cuda where there is one)"
    )
    batch_size: int = setting(64, at_least=1, metavar="N", help="default %(default)s")
    num_workers: int = setting(
        4, at_least=0, metavar="N", help="processes that decode (default %(default)s)"
    )


@dataclass(frozen=True)
class Match:
    """An image and its cosine similarity to the text."""

    similarity: float
    path: Path


class ImageFiles:
    """Map-style: ``(image, error)`` of each file; what can't be read is black, with the reason."""

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess, image_size: int) -> None:
        self.paths = paths
        self.preprocess = preprocess
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        import torch

        try:
            with (
                warnings.catch_warnings(),
                Image.open(self.paths[index], formats=_readable()) as image,
            ):
                # of odd EXIF and palettes: whatever can be read is searched
                warnings.simplefilter("ignore")
                return self.preprocess(image), ""
        except Exception as error:  # PIL's decoders raise nearly anything on broken files
            return torch.zeros(3, self.image_size, self.image_size), one_line(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search as the arguments say; exit status 2 is bad input."""
    console.prepare_output()
    set_thread_defaults()
    options = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # file names are bytes, and come out as they are
        sys.stdout.reconfigure(errors="surrogateescape")
    with one_line_errors():
        matches, total = search(options)
        print("rank\tsimilarity\tpath")
        for rank, match in enumerate(matches, 1):
            print(f"{rank:>4}\t{match.similarity:>10.4f}\t{match.path}")
        if options.to:
            _draw_matches(options, matches, total)


def parse(arguments: Sequence[str] | None = None) -> SearchOptions:
    """Read the command line."""
    return read_options(
        SearchOptions,
        arguments,
        "python -m alignclip.search",
        "Rank the images of a folder by their similarity to a text.",
        SEARCH_EXAMPLES,
    )


def search(options: SearchOptions) -> tuple[list[Match], int]:
    """Encode every image and the text; what can't be read is told and left out.

    Returns:
        the ``top`` best, best first, equal ones by path; and how many images were ranked.

    Raises:
        UserError: no such folder or model, no images, none that can be read; impossible options.
    """
    _check_search(options)
    paths = find(options.folder)
    place = options.model or newest_run()
    early.check_weights("--model", place)
    console.loading("PyTorch")
    # seconds of imports, after what can be said without them
    import torch

    with stand_ins():
        from alignclip.evaluation.encoding import Encoder
        from alignclip.weights.load import find_device, load

    device = find_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, preprocess, tokenizer = load(place, device)
    length, longest = len(tokenizer.encode(options.text)) + 2, model.context_length
    if length > longest:
        print(f"the text has {length} tokens, and is cut to {longest}", file=sys.stderr)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    encoder = Encoder(model, device, dtype, options.batch_size)
    text = dataclasses.replace(encoder, progress=False).texts([options.text])
    files = cast("Dataset[Any]", ImageFiles(paths, preprocess, encoder.image_size))
    images, errors = encoder.images(files, options.num_workers)
    similarities = (images @ text[0]).tolist()
    matches, unreadable = [], []
    for similarity, path, error in zip(similarities, paths, errors, strict=True):
        if error:
            unreadable.append(f"{path} ({error})")
        else:
            matches.append(Match(similarity, path))
    _tell_unreadable(unreadable, len(paths))
    # what only the last bit tells apart is the same image
    matches.sort(key=lambda match: (-round(match.similarity, 6), match.path))
    return matches[: options.top], len(matches)


def _check_search(options: SearchOptions) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    check_settings(options)
    if not options.text.strip():
        raise UserError("the text is empty; write what to look for")
    if options.to:
        contact_sheet.check_path(options.to)
        if options.top > DRAWN:
            raise UserError(f"--to draws {DRAWN} images at most, not --top {options.top}")


def newest_run() -> str:
    """Find the run below the working directory with the newest checkpoint, and say which it is.

    Returns:
        its save folder.

    Raises:
        UserError: there is none.
    """
    links = (path for pattern in RUNS for path in Path().glob(f"{pattern}/{LATEST}"))
    found = [path for path in links if path.is_file()]
    if not found:
        raise UserError(
            f"no run in {' or '.join(RUNS)} here; name a model: --model PATH, or hf-hub:ORG/NAME"
        )
    newest = max(found, key=lambda path: (path.stat().st_mtime, path)).parent
    print(f"model: {newest}, the newest run here; another one: --model PATH", file=sys.stderr)
    return str(newest)


def find(folder: Path) -> list[Path]:
    """Find the image files below a folder by their extensions, but hidden ones; in order.

    Raises:
        UserError: no such folder, or no images.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        near = did_you_mean(folder, Path.is_dir) or "; the first argument is a folder of images"
        raise UserError(f"{folder}: {what}{near}")
    suffixes = {
        suffix for suffix, name in Image.registered_extensions().items() if name in SEARCH_FORMATS
    }
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes]
    if not found:
        raise UserError(f"{folder}: no images there; they end in {', '.join(sorted(suffixes))}")
    return sorted(found)


def _readable() -> tuple[str, ...]:
    """Return those of the formats that this PIL has."""
    Image.init()
    return tuple(name for name in SEARCH_FORMATS if name in Image.OPEN)


def _tell_unreadable(images: list[str], total: int) -> None:
    """Tell how many images could not be read, and why the first of them.

    Raises:
        UserError: none could.
    """
    said = "; ".join(images[:TOLD])
    said += f" and {len(images) - TOLD:,} more" if len(images) > TOLD else ""
    if len(images) == total:
        raise UserError(f"none of the {total:,} images can be read: {said}")
    if images:
        count = f"{len(images):,} of {total:,} images"
        print(f"{count} can't be read and are left out: {said}", file=sys.stderr)


def _draw_matches(options: SearchOptions, matches: Sequence[Match], total: int) -> None:
    """Draw the matches on one picture: rank, similarity and path of each, the text above them.

    Raises:
        UserError: the picture can't be written.
    """
    assert options.to
    cells = []
    for rank, match in enumerate(matches, 1):
        image = b""
        with suppress(OSError):  # the file went meanwhile
            image = match.path.read_bytes()
        name = str(match.path.relative_to(options.folder))
        cells.append(contact_sheet.Cell(f"{rank} · {match.similarity:.4f}", image, name))
    title = f"“{options.text}”: {len(cells):,} of {total:,} images"
    path = contact_sheet.check_path(options.to)
    contact_sheet.save_sheet(contact_sheet.draw_sheet(cells, title, _readable()), path)
    print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
