"""The drawn data set: what is held out, what a caption says, what the files hold."""

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

CANONICAL = {word: canonical for canonical, words in scenes.WORDS.items() for word in words}


def take(split, count, seed=0):
    return [
        (scene, caption)
        for scene, caption, _ in itertools.islice(scenes.scenes(split, seed), count)
    ]


def test_no_training_thing_is_held_out_and_every_test_scene_has_one():
    train, test = take("train", 6000), take("test", 600)
    seen = {(thing.colour, thing.shape) for scene, _ in train for thing in scene.things}
    everything = set(itertools.product(scenes.COLOURS, scenes.SHAPES))
    assert seen == everything - scenes.HELD_OUT
    for scene, _ in test:
        assert {(thing.colour, thing.shape) for thing in scene.things} - seen


def test_two_pairs_are_held_out_for_each_colour_and_shape():
    assert len(scenes.HELD_OUT) == 16
    for colour in scenes.COLOURS:
        assert len({pair for pair in scenes.HELD_OUT if pair[0] == colour}) == 2
    for shape in scenes.SHAPES:
        assert len({pair for pair in scenes.HELD_OUT if pair[1] == shape}) == 2


def test_test_scenes_are_unique_in_caption_and_meaning():
    test = take("test", 600)
    assert len({caption for _, caption in test}) == 600
    assert len({scene.meaning for scene, _ in test}) == 600


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
    captions = {scenes.describe(scene, random.Random(seed)) for seed in range(200)}
    assert len(captions) > 150
    by_length = "|".join(sorted(map(re.escape, CANONICAL), key=len, reverse=True))
    for caption in captions:
        told = [CANONICAL[word] for word in re.findall(rf"\b(?:{by_length})\b", caption)]
        what = [word for word in told if word != "grey"]
        assert what == ["large", "red", "cross", "above", "small", "pink", "square"]
        assert told.count("grey") == 1


@pytest.mark.parametrize(
    ("count", "noun"), [(2, "crosses"), (3, "rings|hoops"), (4, "diamonds|rhombuses")]
)
def test_groups_are_counted_in_the_plural(count, noun):
    shape = {2: "cross", 3: "ring", 4: "diamond"}[count]
    scene = scenes.Scene((scenes.Thing("small", "red", shape),), count, None, "white")
    for seed in range(30):
        caption = scenes.describe(scene, random.Random(seed))
        assert any(number in caption for number in scenes.NUMBERS[count])
        assert re.search(rf"\b({noun}|plus signs)\b", caption)


def coloured_pixels(scene, seed=0):
    """[y, x] of the pixels that are near the colour of a thing, thing by thing."""
    pixels = np.asarray(scenes.draw(scene, random.Random(seed))).astype(int)
    near = [np.abs(pixels - scenes.COLOURS[thing.colour]).max(-1) <= 10 for thing in scene.things]
    return [np.argwhere(mask) for mask in near]


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
        return len(
            coloured_pixels(
                scenes.Scene((scenes.Thing(size, "red", shape),), count, None, "black")
            )[0]
        )

    assert area("large", 1) > 2.5 * area("small", 1) > 0
    assert 3.3 < area("large", 4) / area("large", 1) < 4.9
    for seed in range(10):
        scene = scenes.Scene((scenes.Thing("large", "red", shape),), 4, None, "black")
        pixels = np.asarray(scenes.draw(scene, random.Random(seed)))
        assert pixels[1:-1, 1:-1].max() > 200
        # the outermost pixels are less than half covered
        assert (
            max(edge.max() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) < 100
        )


def test_shapes_differ_from_one_another():
    masks = []
    for shape in scenes.SHAPES:
        scene = scenes.Scene((scenes.Thing("large", "red", shape),), 1, None, "black")
        masks.append(np.asarray(scenes.draw(scene, random.Random(0)))[..., 0] > 110)
    for one, other in itertools.combinations(masks, 2):
        assert (one ^ other).sum() > 0.15 * (one | other).sum()


def test_tars_hold_jpeg_text_and_json_under_one_key(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "PER_TAR", 5)
    paths = scenes.write(tmp_path / "train", "train", 12, seed=3)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    expected = iter(take("train", 12, seed=3))
    keys = []
    for path, size in zip(paths, (5, 5, 2), strict=True):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) == 3 * size
            for key in dict.fromkeys(name.split(".")[0] for name in names):
                read = {
                    suffix: tar.extractfile(f"{key}.{suffix}").read()
                    for suffix in ("jpg", "txt", "json")
                }
                scene, caption = next(expected)
                assert read["txt"].decode() == caption
                record = json.loads(read["json"])
                assert (record["key"], record["caption"], record["width"], record["height"]) == (
                    key,
                    caption,
                    64,
                    64,
                )
                assert record["scene"]["background"] == scene.background
                image = Image.open(io.BytesIO(read["jpg"]))
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
                keys.append(key)
    assert keys == sorted(set(keys))


def test_same_seed_same_bytes_another_seed_others(tmp_path):
    one, two, other = (
        scenes.write(tmp_path / name, "test", 20, seed=seed)[0].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two != other


def test_unknown_split():
    with pytest.raises(ValueError, match="'train' or 'test'"):
        next(scenes.scenes("val"))
