"""The drawn data set: what is held out, what a caption says, what the files hold."""

import dataclasses
import io
import itertools
import json
import random
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from alignclip.quickstart import scenes

CANONICAL = {word: canonical for canonical, words in scenes.WORDS_FOR.items() for word in words}


def take(split, count, seed=0):
    source = scenes.scenes(split, seed)
    return [(scene, caption) for scene, caption, _ in itertools.islice(source, count)]


def group(shape, size="large", count=1, background="black"):
    return scenes.Scene((scenes.Thing(size, "red", shape),), count, None, background)


def test_what_is_held_out_is_in_every_test_scene_and_in_no_training_scene():
    train, test = take("train", 6000), take("test", 600)
    seen = {(thing.colour, thing.shape) for scene, _ in train for thing in scene.things}
    everything = set(itertools.product(scenes.COLOURS, scenes.SHAPES))
    assert seen == everything - scenes.HELD_OUT
    for scene, _ in test:
        assert {(thing.colour, thing.shape) for thing in scene.things} - seen
    # two pairs for each colour and shape
    for side, of_side in enumerate((scenes.COLOURS, scenes.SHAPES)):
        assert sorted(pair[side] for pair in scenes.HELD_OUT) == sorted([*of_side] * 2)
    # test scenes are unique
    assert len({caption for _, caption in test}) == len({scene.meaning for scene, _ in test}) == 600
    with pytest.raises(ValueError, match="'train' or 'test'"):
        take("val", 1)


def test_meaning_is_the_same_from_either_side():
    first, second = scenes.Thing("small", "red", "star"), scenes.Thing("large", "blue", "ring")
    for relation, inverse in scenes.RELATIONS.items():
        one = scenes.Scene((first, second), 1, relation, "white")
        assert one.meaning == scenes.Scene((second, first), 1, inverse, "white").meaning
        assert one.meaning != scenes.Scene((second, first), 1, relation, "white").meaning
        assert one.meaning != scenes.Scene((first, second), 1, inverse, "white").meaning


def test_captions_of_a_scene_vary_and_name_all_that_is_drawn():
    things = (scenes.Thing("large", "red", "cross"), scenes.Thing("small", "pink", "square"))
    scene = scenes.Scene(things, 1, "above", "grey")
    captions = {scenes.describe_scene(scene, random.Random(seed)) for seed in range(200)}
    assert len(captions) > 150
    by_length = "|".join(sorted(map(re.escape, CANONICAL), key=len, reverse=True))
    for caption in captions:
        told = [CANONICAL[word] for word in re.findall(rf"\b(?:{by_length})\b", caption)]
        what = [word for word in told if word != "grey"]
        assert what == ["large", "red", "cross", "above", "small", "pink", "square"]
        assert told.count("grey") == 1


@pytest.mark.parametrize(
    ("count", "shape", "noun"),
    [
        (2, "cross", "crosses|plus signs"),
        (3, "ring", "rings|hoops"),
        (4, "diamond", "diamonds|rhombuses"),
    ],
)
def test_groups_are_counted_in_the_plural(count, shape, noun):
    for seed in range(30):
        caption = scenes.describe_scene(group(shape, count=count), random.Random(seed))
        assert any(number in caption for number in scenes.COUNT_WORDS[count])
        assert re.search(rf"\b({noun})\b", caption)


def pixels_of(scene, seed=0):
    return np.asarray(scenes.draw_scene(scene, random.Random(seed))).astype(int)


def coloured_pixels(scene, seed=0):
    """[y, x] of the pixels that are near the colour of a thing, thing by thing."""
    colours = [np.array(scenes.COLOURS[thing.colour]) for thing in scene.things]
    pixels = pixels_of(scene, seed)
    return [np.argwhere(np.abs(pixels - colour).max(-1) <= 10) for colour in colours]


@pytest.mark.parametrize(
    ("relation", "axis", "sign"),
    [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)],
)
def test_a_relation_is_drawn_as_it_is_said(relation, axis, sign):
    things = (scenes.Thing("large", "red", "circle"), scenes.Thing("small", "blue", "square"))
    for seed in range(10):
        first, second = coloured_pixels(scenes.Scene(things, 1, relation, "white"), seed)
        assert sign * (first.mean(0) - second.mean(0))[axis] > 20
        assert abs((first.mean(0) - second.mean(0))[1 - axis]) < 5


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_size_and_count_show_in_the_area_and_nothing_leaves_the_picture(shape):
    def area(size, count):
        return len(coloured_pixels(group(shape, size, count))[0])

    assert area("large", 1) > 2.5 * area("small", 1) > 0
    assert 3.3 < area("large", 4) / area("large", 1) < 4.9
    for seed in range(10):
        pixels = pixels_of(group(shape, count=4), seed)
        assert pixels[1:-1, 1:-1].max() > 200
        # the outermost pixels are less than half covered
        pixels[1:-1, 1:-1] = 0
        assert pixels.max() < 100


def test_shapes_differ_from_one_another():
    masks = [pixels_of(group(shape))[..., 0] > 110 for shape in scenes.SHAPES]
    for one, other in itertools.combinations(masks, 2):
        assert (one ^ other).sum() > 0.15 * (one | other).sum()


def test_tars_hold_jpeg_text_and_json_under_one_key(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "PER_TAR", 5)
    paths = scenes.write(tmp_path / "train", "train", 12, seed=3)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    keys, told = [], []
    for path in paths:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for key in dict.fromkeys(name.split(".")[0] for name in names):
                members = [f"{key}.{suffix}" for suffix in ("jpg", "txt", "json")]
                jpg, txt, record = (tar.extractfile(member).read() for member in members)
                image = Image.open(io.BytesIO(jpg))
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
                keys.append(key)
                told.append((json.loads(record), txt.decode()))
    assert keys == [f"{i // 5:05}{i % 5:04}" for i in range(12)]
    expected = []
    for key, (scene, caption) in zip(keys, take("train", 12, seed=3), strict=True):
        about = {"key": key, "status": "success", "caption": caption, "width": 64, "height": 64}
        content = json.loads(json.dumps(dataclasses.asdict(scene)))
        expected.append((about | {"scene": content}, caption))
    assert told == expected


def test_same_seed_same_bytes_another_seed_others(tmp_path):
    one, two, other = (
        scenes.write(tmp_path / name, "test", 20, seed=seed)[0].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two != other
