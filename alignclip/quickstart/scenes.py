"""Captioned scenes that are drawn here: a data set of image–text pairs that needs no network.

A scene is either a group (one to four equal things) or two things in a relation, on a plain background. Its caption
names everything that was drawn, in one of many wordings: ``a big crimson disc above a small blue star, on black`` and
``on a black background, a little blue star below a large red circle`` are one scene, said twice.

What is held out: of the 64 pairs (colour, shape), the 16 of :data:`HELD_OUT`, two for each colour and two for each
shape. No thing in a training scene is such a pair; each test scene holds at least one. Colours and shapes are
therefore all seen in training, but what the test asks for is put together anew. Test scenes are unique in meaning (no
two have the same :attr:`Scene.meaning`), and so are their captions.

Files are tars as img2dataset (https://github.com/rom1504/img2dataset) writes them: ``key.jpg``, ``key.txt``,
``key.json``; the same arguments write the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

PIXELS = 64
SUPERSAMPLING = 4  # drawn this many times larger, then averaged: smooth edges
PER_TAR = 500

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "crescent")
RADIUS = {"small": 6.5, "large": 12.5}  # pixels
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Two diagonals of the colour × shape table.
HELD_OUT = frozenset(
    (colour, SHAPES[(row + step) % len(SHAPES)])
    for row, colour in enumerate(COLOURS)
    for step in (0, 3)
)

WORDS = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green", "green", "emerald"),
    "turquoise": ("turquoise", "turquoise", "cyan"),
    "blue": ("blue", "blue", "cobalt"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose"),
    "white": ("white",),
    "grey": ("grey", "gray"),
    "black": ("black",),
    "brown": ("brown",),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
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
NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
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
    """One drawn object, by its canonical words."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. A group is one thing with a count; two things have a relation (first to second)."""

    things: tuple[Thing, ...]
    count: int
    relation: str | None
    background: str

    @property
    def meaning(self) -> tuple[object, ...]:
        """A key that is equal for scenes that show the same: a left of b is b right of a."""
        if self.relation in ("right of", "below"):
            return (self.things[::-1], self.count, RELATIONS[self.relation], self.background)
        return (self.things, self.count, self.relation, self.background)

    @property
    def held_out(self) -> bool:
        """Whether any of its things is a (colour, shape) that training never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, str, random.Random]]:
    """Scenes without end, each with its caption and the generator that places it.

    Args:
        split: ``train`` (no held-out pair) or ``test`` (a held-out pair in each scene, no meaning or caption twice).
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
        caption = describe(scene, rng)
        if split == "test":
            if scene.meaning in meanings or caption in captions:
                continue
            meanings.add(scene.meaning)
            captions.add(caption)
        yield scene, caption, random.Random(rng.getrandbits(64))


def _random_scene(rng: random.Random) -> Scene:
    """Groups and pairs alike often."""
    things = tuple(_random_thing(rng) for _ in range(rng.choice((1, 2))))
    background = rng.choice(tuple(BACKGROUNDS))
    if len(things) == 1:
        return Scene(things, rng.randint(1, 4), None, background)
    if things[0] == things[1]:  # that would be a group of two
        return Scene(things[:1], 2, None, background)
    return Scene(things, 1, rng.choice(tuple(RELATIONS)), background)


def _random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(tuple(RADIUS)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES))


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the scene's captions: everything that is drawn is named, the wording is drawn from ``rng``."""
    first = _name(scene.things[0], scene.count, rng)
    if scene.relation is None:
        what = first
    else:
        what = f"{first} {rng.choice(WORDS[scene.relation])} {_name(scene.things[1], 1, rng)}"
    return rng.choice(FRAMES).format(what=what, ground=rng.choice(WORDS[scene.background]))


def _name(thing: Thing, count: int, rng: random.Random) -> str:
    """``a big red disc``, ``three tiny blue boxes``."""
    size, colour, noun = (
        rng.choice(WORDS[word]) for word in (thing.size, thing.colour, thing.shape)
    )
    if count == 1:
        return f"a {size} {colour} {noun}"
    return f"{rng.choice(NUMBERS[count])} {size} {colour} {PLURALS.get(noun, noun + 's')}"


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of :data:`PIXELS` squared; places, tilts and shades vary with ``rng``."""
    edge = PIXELS * SUPERSAMPLING
    image = Image.new("RGB", (edge, edge), _shade(BACKGROUNDS[scene.background], 5, rng))
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip(scene.things * scene.count, _places(scene, rng), strict=True):
        colour = _shade(COLOURS[thing.colour], 10, rng)
        radius = RADIUS[thing.size] * rng.uniform(0.92, 1.08) * SUPERSAMPLING
        tilt = math.radians(rng.uniform(-8, 8))
        right, down = radius * math.cos(tilt), radius * math.sin(tilt)
        for outline in _outlines(thing.shape):
            turned = [(u * right - v * down, u * down + v * right) for u, v in outline]
            pen.polygon(
                [(x * SUPERSAMPLING + a, y * SUPERSAMPLING + b) for a, b in turned], fill=colour
            )
    return image.reduce(SUPERSAMPLING)


def _shade(colour: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """The centre of each thing, in pixels from the top left. Things of a group have a quarter of the picture each."""
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


def _arc(
    radius: float, start: float = 0.0, stop: float = 360.0, dx: float = 0.0
) -> list[tuple[float, float]]:
    """Points of a circle about (dx, 0) between two angles in degrees."""
    angles = [math.radians(start + (stop - start) * step / 40) for step in range(41)]
    return [(dx + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _outlines(shape: str) -> list[list[tuple[float, float]]]:
    """The polygons of a shape inside the unit circle, y downwards."""
    if shape == "circle":
        return [_arc(1.0)]
    if shape == "square":
        return [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]
    if shape == "triangle":
        return [[(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]]
    if shape == "star":
        radii = (1.05, 0.43)
        return [
            [
                (
                    radii[i % 2] * math.sin(math.pi * i / 5),
                    -radii[i % 2] * math.cos(math.pi * i / 5),
                )
                for i in range(10)
            ]
        ]
    if shape == "cross":
        return [
            [(-1.0, -0.32), (1.0, -0.32), (1.0, 0.32), (-1.0, 0.32)],
            [(-0.32, -1.0), (0.32, -1.0), (0.32, 1.0), (-0.32, 1.0)],
        ]
    if shape == "diamond":
        return [[(0.0, -1.05), (0.75, 0.0), (0.0, 1.05), (-0.75, 0.0)]]
    if (
        shape == "ring"
    ):  # two halves, there along the outer edge, back along the inner one; they overlap a little
        return [_arc(1.0, at, at + 190.0) + _arc(0.55, at + 190.0, at) for at in (-5.0, 175.0)]
    if shape == "crescent":
        return [_arc(1.0, 50.0, 310.0) + _arc(0.8, 285.0, 75.0, dx=0.43)]
    raise ValueError(f"no shape {shape!r}")


def write(folder: str | Path, split: str, count: int, seed: int = 0) -> list[Path]:
    """Draw ``count`` scenes of a split into ``folder/00000.tar``, ``00001.tar``, … of :data:`PER_TAR` each.

    Returns:
        The tars, in order. The same arguments write the same bytes; a file that is there is replaced.

    Raises:
        ValueError: a split other than ``train`` or ``test``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    source = scenes(split, seed)
    bar = tqdm(total=count, desc=f"drawing {split} scenes", unit="scene")
    for number, start in enumerate(range(0, count, PER_TAR)):
        paths.append(folder / f"{number:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for index in range(min(PER_TAR, count - start)):
                scene, caption, rng = next(source)
                key = f"{number:05d}{index:04d}"  # img2dataset's: tar and place
                for suffix, content in _files(key, scene, caption, rng).items():
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                bar.update()
    bar.close()
    return paths


def _files(key: str, scene: Scene, caption: str, rng: random.Random) -> dict[str, bytes]:
    jpeg = io.BytesIO()
    draw(scene, rng).save(
        jpeg, "JPEG", quality=95, subsampling=0
    )  # full colour resolution: things are small
    record = {
        "key": key,
        "status": "success",
        "caption": caption,
        "width": PIXELS,
        "height": PIXELS,
    }
    record["scene"] = asdict(scene)
    return {"jpg": jpeg.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}


def contact_sheet(
    path: str | Path, split: str = "test", seed: int = 0, columns: int = 8, rows: int = 6
) -> None:
    """One PNG of a split's first scenes in a grid, without captions, to look at."""
    sheet = Image.new("RGB", (columns * (PIXELS + 4), rows * (PIXELS + 4)), (255, 0, 255))
    for index, (scene, _, rng) in zip(range(columns * rows), scenes(split, seed), strict=False):
        place = (index % columns * (PIXELS + 4) + 2, index // columns * (PIXELS + 4) + 2)
        sheet.paste(draw(scene, rng), place)
    sheet.save(path)
