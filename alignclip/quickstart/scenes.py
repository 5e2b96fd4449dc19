"""Captioned scenes that are drawn here: a data set of image–text pairs that needs no network.

A scene is either a group (one to four equal things) or two things in a relation, on a plain
background. Its caption names everything that was drawn, in one of many wordings: ``a big crimson
disc above a small blue star, on black`` and ``on a black background, a little blue star below a
large red circle`` are one scene, said twice.

Of the 64 pairs (colour, shape), the 16 of :data:`HELD_OUT` are held out, two for each colour and
two for each shape. No thing in a training scene is such a pair; each test scene holds at least one.
Colours and shapes are therefore all seen in training, but what the test asks for is put together
anew. Test scenes are unique in meaning (no two have the same :attr:`Scene.meaning`), and so are
their captions.

Files are tars as img2dataset (https://github.com/rom1504/img2dataset) writes them: ``key.jpg``,
``key.txt``, ``key.json``; the same arguments write the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

PIXELS = 64
SUPERSAMPLING = 4  # drawn this many times larger, then averaged: smooth edges
PER_TAR = 500

Polygon = list[tuple[float, float]]

COLOURS = {
    "red": (215, 25, 35),
    "orange": (250, 135, 10),
    "yellow": (245, 225, 40),
    "green": (25, 145, 55),
    "turquoise": (50, 215, 215),
    "blue": (35, 70, 215),
    "purple": (125, 40, 165),
    "pink": (250, 125, 190),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "black": (10, 10, 10),
    "brown": (95, 60, 35),
}


def _arc(radius: float, start: float, stop: float, dx: float = 0.0) -> Polygon:
    """Return points of a circle about (dx, 0) between two angles in degrees."""
    angles = [math.radians(start + (stop - start) * step / 40) for step in range(41)]
    return [(dx + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> Polygon:
    tips = [(1.05, 0.43)[i % 2] for i in range(10)]
    return [
        (radius * math.sin(math.pi * i / 5), -radius * math.cos(math.pi * i / 5))
        for i, radius in enumerate(tips)
    ]


# The polygons of each shape inside the unit circle, y downwards
OUTLINES: dict[str, list[Polygon]] = {
    "circle": [_arc(1.0, 0.0, 360.0)],
    "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "triangle": [[(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]],
    "star": [_star()],
    "cross": [
        [(-1.0, -0.32), (1.0, -0.32), (1.0, 0.32), (-1.0, 0.32)],
        [(-0.32, -1.0), (0.32, -1.0), (0.32, 1.0), (-0.32, 1.0)],
    ],
    "diamond": [[(0.0, -1.05), (0.75, 0.0), (0.0, 1.05), (-0.75, 0.0)]],
    # two halves, there along the outer edge, back along the inner one; they overlap a little
    "ring": [_arc(1.0, at, at + 190.0) + _arc(0.55, at + 190.0, at) for at in (-5.0, 175.0)],
    "crescent": [_arc(1.0, 50.0, 310.0) + _arc(0.8, 285.0, 75.0, dx=0.43)],
}
SHAPES = tuple(OUTLINES)
RADIUS = {"small": 6.5, "large": 12.5}  # pixels
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Two diagonals of the colour × shape table.
HELD_OUT = frozenset(
    (colour, SHAPES[(row + step) % len(SHAPES)])
    for row, colour in enumerate(COLOURS)
    for step in (0, 3)
)

# of a canonical name; a name that is missing here is its only word
WORDS_FOR = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green", "green", "emerald"),
    "turquoise": ("turquoise", "turquoise", "cyan"),
    "blue": ("blue", "blue", "cobalt"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose"),
    "grey": ("grey", "gray"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "half moon"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
COUNT_WORDS = {2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
PLURALS = {"box": "boxes", "cross": "crosses", "rhombus": "rhombuses"}
FRAMES = (
    "{what} on a {ground} background",
    "{what} on {ground}",
    "{what} against a {ground} backdrop",
    "on a {ground} background, {what}",
    "a {ground} picture with {what}",
    "a drawing of {what} on {ground}",
    "an image showing {what} against {ground}",
)


@dataclass(frozen=True)
class Thing:
    """A drawn object, by its canonical words."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """The content of a picture.

    A group is one thing with a count; two things have a relation (first to second).
    """

    things: tuple[Thing, ...]
    count: int
    relation: str | None
    background: str

    @property
    def meaning(self) -> tuple[object, ...]:
        """Return what is equal for scenes that show the same: a left of b is b right of a."""
        if self.relation in ("right of", "below"):
            return (self.things[::-1], self.count, RELATIONS[self.relation], self.background)
        return (self.things, self.count, self.relation, self.background)

    @property
    def held_out(self) -> bool:
        """Say whether any of its things is a (colour, shape) that training never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, str, random.Random]]:
    """Yield scenes without end, each with its caption and the generator that places it.

    Args:
        split: ``train`` (no held-out pair) or ``test`` (a held-out pair in each scene, no meaning
            or caption twice).
        seed: another seed, other scenes.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    rng = random.Random(f"{split}-{seed}")
    meanings: set[tuple[object, ...]] = set()
    captions: set[str] = set()
    while True:
        scene = _random_scene(rng)
        if scene.held_out != (split == "test"):
            continue
        caption = describe_scene(scene, rng)
        if split == "test":
            if scene.meaning in meanings or caption in captions:
                continue
            meanings.add(scene.meaning)
            captions.add(caption)
        yield scene, caption, random.Random(rng.getrandbits(64))


def _random_scene(rng: random.Random) -> Scene:
    """Draw groups and pairs alike often."""
    things = tuple(_random_thing(rng) for _ in range(rng.choice((1, 2))))
    background = rng.choice(tuple(BACKGROUNDS))
    if len(things) == 1:
        return Scene(things, rng.randint(1, 4), None, background)
    if things[0] == things[1]:  # that would be a group of two
        return Scene(things[:1], 2, None, background)
    return Scene(things, 1, rng.choice(tuple(RELATIONS)), background)


def _random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(tuple(RADIUS)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES))


def describe_scene(scene: Scene, rng: random.Random) -> str:
    """Name everything that a scene shows, in a wording that is drawn from ``rng``."""
    first = _noun_phrase(scene.things[0], scene.count, rng)
    what = first
    if scene.relation is not None:
        what += f" {_word(scene.relation, rng)} {_noun_phrase(scene.things[1], 1, rng)}"
    return rng.choice(FRAMES).format(what=what, ground=_word(scene.background, rng))


def _word(name: str, rng: random.Random) -> str:
    return rng.choice(WORDS_FOR.get(name, (name,)))


def _noun_phrase(thing: Thing, count: int, rng: random.Random) -> str:
    """Name a thing: ``a big red disc``, ``three tiny blue boxes``."""
    size, colour, noun = (_word(name, rng) for name in (thing.size, thing.colour, thing.shape))
    if count == 1:
        return f"a {size} {colour} {noun}"
    return f"{rng.choice(COUNT_WORDS[count])} {size} {colour} {PLURALS.get(noun, noun + 's')}"


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene, :data:`PIXELS` squared in RGB; places, tilts and shades vary with ``rng``."""
    edge = PIXELS * SUPERSAMPLING
    image = Image.new("RGB", (edge, edge), _shade(BACKGROUNDS[scene.background], 5, rng))
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip(scene.things * scene.count, _centres(scene, rng), strict=True):
        colour = _shade(COLOURS[thing.colour], 10, rng)
        radius = RADIUS[thing.size] * rng.uniform(0.92, 1.08) * SUPERSAMPLING
        tilt = math.radians(rng.uniform(-8, 8))
        right, down = radius * math.cos(tilt), radius * math.sin(tilt)
        for outline in OUTLINES[thing.shape]:
            turned = [(u * right - v * down, u * down + v * right) for u, v in outline]
            pen.polygon(
                [(x * SUPERSAMPLING + a, y * SUPERSAMPLING + b) for a, b in turned], fill=colour
            )
    return image.reduce(SUPERSAMPLING)


def _shade(colour: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Return the centre of each thing, in pixels from the top left.

    Things of a group have a quarter of the picture each.
    """
    near, far = PIXELS / 4, PIXELS * 3 / 4
    if scene.relation is None and scene.count == 1:
        return [(rng.uniform(near, far), rng.uniform(near, far))]
    if scene.relation is None:
        centres = rng.sample([(near, near), (far, near), (near, far), (far, far)], scene.count)
    else:
        first, second = (near, far) if scene.relation in ("left of", "above") else (far, near)
        aside = rng.uniform(near, far)
        centres = [(first, aside), (second, aside)]
        if scene.relation in ("above", "below"):
            centres = [(x, y) for y, x in centres]
    return [(x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)) for x, y in centres]


def write(folder: str | Path, split: str, count: int, seed: int = 0) -> list[Path]:
    """Draw scenes of a split into ``folder/00000.tar``, ``00001.tar``, … of :data:`PER_TAR` each.

    Returns:
        The tars, in order. The same arguments write the same bytes; a file that is there is
        replaced.

    Raises:
        ValueError: a split other than ``train`` or ``test``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    source = scenes(split, seed)
    with tqdm(total=count, desc=f"drawing {split} scenes", unit="scene") as bar:
        for number, start in enumerate(range(0, count, PER_TAR)):
            paths.append(folder / f"{number:05d}.tar")
            with tarfile.open(paths[-1], "w") as tar:
                for index in range(min(PER_TAR, count - start)):
                    scene, caption, rng = next(source)
                    key = f"{number:05d}{index:04d}"  # img2dataset's: tar and place
                    add_sample(tar, key, _sample_files(key, scene, caption, rng))
                    bar.update()
    return paths


def add_sample(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    """Add a sample's files to a tar, by their suffixes."""
    for suffix, content in files.items():
        entry = tarfile.TarInfo(f"{key}.{suffix}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def _sample_files(key: str, scene: Scene, caption: str, rng: random.Random) -> dict[str, bytes]:
    jpeg = io.BytesIO()
    # full colour resolution: things are small
    draw_scene(scene, rng).save(jpeg, "JPEG", quality=95, subsampling=0)
    said = {"key": key, "status": "success", "caption": caption}
    record = {**said, "width": PIXELS, "height": PIXELS, "scene": asdict(scene)}
    return {"jpg": jpeg.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}
