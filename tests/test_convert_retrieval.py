"""Retrieval sets to MDS: miniatures in each set's own layout, every caption with its image."""

from __future__ import annotations

import csv
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from miniatures import (
    Made,
    assert_told_in_one_line,
    captioned,
    draw,
    picture,
    pictures,
    refused,
    write,
)

from alignclip.conversion.classification_sets import CLASSIFICATION_SETS
from alignclip.conversion.image_finder import ImageFinder
from alignclip.conversion.retrieval import main
from alignclip.conversion.retrieval_sets import RETRIEVAL_SETS
from alignclip.errors import UserError


def texts(number: int, captions: int = 5) -> list[str]:
    # COCO's have such ends
    return [f"picture {number}, said in way {i}.\n" for i in range(captions)]


SPLITS = ["train", "test", "val", "test", "restval", "test"]
TEST_CAPTIONS = {1: texts(1), 3: texts(3), 5: texts(5, 6)}


def assert_made(made: Made, captions: dict[str, list[str]], *numbers: int) -> None:
    """A set has these captions of each image in this order, and the pictures of these numbers."""
    assert list(made.captions.items()) == list(captions.items())
    assert made.images == pictures(*numbers)


def make_karpathy(root: Path, dataset: str) -> Path:
    """Six images, those of ``SPLITS``; the last has six captions."""
    coco = dataset == "coco"
    images = []
    for i, split in enumerate(SPLITS):
        folder = "train2014" if split in ("train", "restval") else "val2014"
        name = f"COCO_{folder}_{i:012}.jpg" if coco else f"{1000 + i}.jpg"
        sentences = [{"raw": text} for text in texts(i, 6 if i == 5 else 5)]
        image = {"filename": name, "imgid": i, "split": split, "sentences": sentences}
        images.append({**image, "filepath": folder} if coco else image)
        write(root / (folder if coco else "flickr30k-images") / name, picture(i))
    return write(root / f"dataset_{dataset}.json", json.dumps({"images": images}))


def make_coco_api(file: Path, captions: dict[int, list[str]], name: str = "{:012}.jpg") -> Path:
    """An image for each id; the captions of an image don't lie together."""
    images = [{"id": i, "file_name": name.format(i), "height": 4} for i in captions]
    annotations = [
        {"id": 10 * j + i, "image_id": i, "caption": some[j]}
        for j in range(max(map(len, captions.values())))
        for i, some in captions.items()
    ]
    content = {"images": images, "annotations": annotations, "info": {}, "licenses": []}
    return write(file, json.dumps(content))


def make_flickr_lines(root: Path, line: str, name: str) -> Path:
    """Four images with five captions each."""
    rows = []
    for i in range(4):
        write(root / "images" / f"{1000 + i}.jpg", picture(i))
        for j, text in enumerate(texts(i)):
            rows.append(line.format(name=f"{1000 + i}.jpg", j=j, text=text.strip()))
    return write(root / name, "\n".join(rows) + "\n")


make_token_file = partial(make_flickr_lines, line="{name}#{j}\t{text}", name="r.token")


# each named set


@pytest.mark.parametrize("below", ["", "val2014"])
def test_coco_karpathy(below: str, tmp_path: Path) -> None:
    coco = tmp_path / "coco"
    annotations = make_karpathy(coco, "coco")
    made = captioned("coco", coco / below, annotations, tmp_path / "out")
    expected = {f"val2014/COCO_val2014_{i:012}.jpg": some for i, some in TEST_CAPTIONS.items()}
    assert_made(made, expected, 1, 3, 5)
    about = {"dataset": "coco", "split": "test", "annotations": str(annotations)}
    assert made.described.items() >= about.items()
    made = captioned("coco", coco, annotations, tmp_path / "restval", split="restval")
    assert made.keys == ["train2014/COCO_train2014_000000000004.jpg"]


@pytest.mark.parametrize(
    ("dataset", "below", "split"),
    [
        ("coco2017", "", "val"),
        ("coco", "val2017", "test"),  # clip_benchmark's coco_test_karpathy.json is such a file
    ],
)
def test_coco_api_layout(dataset: str, below: str, split: str, tmp_path: Path) -> None:
    images, numbers = tmp_path / "val2017", (300, 100, 200)
    annotations = make_coco_api(tmp_path / "captions.json", {i: texts(i) for i in numbers})
    for i in numbers:
        write(images / f"{i:012}.jpg", picture(i))
    made = captioned(dataset, tmp_path / below, annotations, tmp_path / "out")
    assert_made(made, {f"{i:012}.jpg": texts(i) for i in (100, 200, 300)}, 100, 200, 300)
    assert made.described["split"] == split
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoCaptions  # what clip_benchmark reads it with

    theirs = CocoCaptions(str(images), str(annotations))
    assert [captions for _, captions in theirs] == list(made.captions.values())


def test_flickr_karpathy(tmp_path: Path) -> None:
    annotations = make_karpathy(tmp_path / "flickr", "flickr30k")
    content = json.loads(annotations.read_text(encoding="utf-8"))
    for image in content["images"]:
        if image["split"] != "test":
            del image["sentences"]
    annotations.write_text(json.dumps(content), encoding="utf-8")
    made = captioned("flickr30k", tmp_path / "flickr", annotations, tmp_path / "out")
    assert_made(made, {f"{1000 + i}.jpg": some for i, some in TEST_CAPTIONS.items()}, 1, 3, 5)


def test_flickr_lines_with_a_list_of_images(tmp_path: Path) -> None:
    annotations, images, out = make_token_file(tmp_path), tmp_path / "images", tmp_path / "out"
    convert = partial(captioned, "flickr30k", images, annotations, out)
    # Flickr30k Entities' have no .jpg
    listed = str(write(tmp_path / "test.txt", "1003\n1001.jpg\n"))
    made = convert(split_file=listed)
    assert_made(made, {f"{1000 + i}.jpg": [t.strip() for t in texts(i)] for i in (3, 1)}, 3, 1)
    assert made.described["split"] == "test"
    assert "already" in convert(split_file=listed).message
    other = str(write(tmp_path / "other.txt", "1000"))
    refused("already holds flickr30k", convert, split_file=other)


def test_flickr_of_hugging_face(tmp_path: Path) -> None:
    """``flickr_annotations_30k.csv``: the captions of an image as a JSON list in a field."""
    flickr = tmp_path / "flickr"
    make_karpathy(flickr, "flickr30k")
    captions = {f"{1000 + i}.jpg": [f'{text} "quoted", é' for text in texts(i)] for i in range(6)}
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for split, (name, some) in zip(SPLITS, captions.items(), strict=True):
        raw = json.dumps(some) if split == "test" else "no list"
        rows.writerow([raw, "[0, 1, 2, 3, 4]", split, name, name[:4]])
    annotations = write(tmp_path / "flickr_annotations_30k.csv", table.getvalue())
    made = captioned("flickr30k", flickr, annotations, tmp_path / "out")
    assert_made(
        made, {name: captions[name] for name in ("1001.jpg", "1003.jpg", "1005.jpg")}, 1, 3, 5
    )
    said = "has no split 'tset'; did you mean 'test'"
    refused(said, captioned, "flickr30k", flickr, annotations, tmp_path / "other", split="tset")


def test_flickr_of_clip_benchmark(tmp_path: Path) -> None:
    flickr = pytest.importorskip("clip_benchmark.datasets.flickr")
    images = tmp_path / "images"
    annotations = make_flickr_lines(tmp_path, "{name},{text}", "flickr30k_test_karpathy.txt")
    annotations.write_text("image,caption\n" + annotations.read_text())
    made = captioned("flickr30k", images, annotations, tmp_path / "out")
    assert list(made.captions.items()) == flickr.Flickr(str(images), str(annotations)).data


def test_all_of_flickr8k(tmp_path: Path) -> None:
    """The publisher's files: captions of all images, one of them with an odd name, and a list."""
    lines = "1_a.jpg#0\tA child .\n2_b.jpg.1#0\tA dog .\n3_c.jpg#0\tA cat .\n"
    annotations = write(tmp_path / "Flickr8k.token.txt", lines)
    listed = str(write(tmp_path / "Flickr_8k.testImages.txt", "3_c.jpg\n"))
    draw(tmp_path / "Flicker8k_Dataset", "1_a.jpg", "3_c.jpg")
    made = captioned("flickr8k", tmp_path, annotations, tmp_path / "out", split_file=listed)
    assert made.captions == {"3_c.jpg": ["A cat ."]}


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_pairs(suffix: str, comma: str, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere.jpg")
    rows = [
        ("number", "image", "caption"),
        ("1", "a.jpg", '"one, ""so"" said"'),
        ("2", "sub/b.jpg", "ein Bär"),
        ("3", "a.jpg", "again"),
        ("4", "c.jpg", " "),
        ("5", elsewhere, "absolute"),
    ]
    text = "\ufeff" + "\r\n".join(comma.join(row) for row in rows)
    annotations = write(tmp_path / f"my.{suffix}", text)
    draw(tmp_path, "images/a.jpg", "images/sub/b.jpg", "images/c.jpg", "elsewhere.jpg")
    made = captioned("pairs", tmp_path / "images", annotations, tmp_path / "out", split="mine")
    assert "skipped               1\n  no caption          1\n" in made.message
    captions = {"a.jpg": ['one, "so" said', "again"], "sub/b.jpg": ["ein Bär"]}
    assert_made(made, captions | {elsewhere: ["absolute"]}, 0, 1, 3)
    skipped = {"missing image": 0, "no caption": 1, "unreadable image": 0}
    assert (made.described["skipped"], made.described["split"]) == (skipped, "mine")


NUMBERED = "image_name,comment_number,comment"
CSV_FILES = {  # name -> (lines, captions)
    "numbered": (NUMBERED + '\n1.jpg,0,"Two men, one dog"\n1.jpg,1,"Say ""hi"", twice"\n',
                 ["Two men, one dog", 'Say "hi", twice']),
    "numbered, not CSV": (NUMBERED + "\r\n1.jpg,0, 3 men, one dog.\x85\r\n1.jpg,1, 4 men\r\n",
                          ["3 men, one dog.\x85", "4 men"]),
    "two columns": ('image,caption\n1.jpg,"Two men, one dog"\n1.jpg,A "big" dog\n1.jpg,plain\n',
                    ["Two men, one dog", 'A "big" dog', "plain"]),
    "without a header": ('1.jpg,"one, two"\n1.jpg,three\n', ["one, two", "three"]),
    "a line break in a caption": ('image,caption\n1.jpg,"one\ntwo"\n', ["one\ntwo"]),
    "not CSV": ('image,caption\n'
                '1.jpg,Two men, one dog\n1.jpg,"Stop" says the sign\n1.jpg,"quoted"\n',
                ["Two men, one dog", '"Stop" says the sign', '"quoted"']),
    "an open mark": ('image,caption\n1.jpg,"Stop\n1.jpg,go" says it\n', ['"Stop', 'go" says it']),
    "an open mark that another closes": ('image,caption\n1.jpg,"Stop\n1.jpg,go"\n',
                                         ['"Stop', 'go"']),
    "bars": ('image_name| comment_number| comment\n1.jpg| 0| Two "men", one dog\n1.jpg| 1 a dog\n',
             ['Two "men", one dog', "a dog"]),
    "token": ('1.jpg#0\t"Two" men, one dog\n1.jpg#1\ta dog\n', ['"Two" men, one dog', "a dog"]),
    "carriage returns": ('image,caption\r\n1.jpg,"a, b"\r\n1.jpg,c\x85d\r\n', ["a, b", "c\x85d"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV_FILES)
def test_marks_of_csv_are_no_part_of_a_caption(name: str, tmp_path: Path) -> None:
    lines, expected = CSV_FILES[name]
    annotations = write(tmp_path / "captions.txt", lines)
    write(tmp_path / "1.jpg", picture(1))
    made = captioned("flickr30k", tmp_path, annotations, tmp_path / "out")
    assert made.captions == {"1.jpg": expected}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-16-le", "cp1252", "latin-1"])
@pytest.mark.parametrize(
    ("dataset", "separator"), [("flickr30k", ","), ("pairs", ","), ("pairs", ";"), ("pairs", "\t")]
)
def test_annotations_in_other_encodings_and_separators(
    dataset: str, separator: str, encoding: str, tmp_path: Path
) -> None:
    caption = "ein Bär, dort"
    quoted = f'"{caption}"' if separator == "," else caption
    text = f"image{separator}caption\r\n1.jpg{separator}{quoted}\r\n"
    annotations = write(tmp_path / "captions.txt", text.encode(encoding))
    write(tmp_path / "1.jpg", picture(1))
    named = None if encoding.startswith("utf") else encoding
    convert = partial(captioned, dataset, tmp_path, annotations, tmp_path / "out")
    if named:
        refused(r"is not UTF-8 \(line 2\); name its encoding", convert)
    assert convert(encoding=named).captions == {"1.jpg": [caption]}


# a file that holds more, or less, than the split


def test_what_is_left_out_of_a_split_is_said(tmp_path: Path) -> None:
    convert = partial(captioned, "coco", tmp_path, make_karpathy(tmp_path, "coco"))
    said = convert(tmp_path / "train", split="train").message
    rest = "left out: test 3, val 1, restval 1; --split train+restval takes both"
    assert f"train has 1 images; {rest}" in said
    assert "coco's train split is published with 82,783 images, this one has 1" in said
    made = convert(tmp_path / "both", split="train+restval")
    assert "train+restval has 2 images; left out: test 3, val 1" in made.message
    assert len(made.rows) == 2
    said = r"no split 'restvl'; did you mean 'restval'"
    refused(said, convert, tmp_path / "c", split="train+restvl")


@pytest.mark.parametrize(
    ("dataset", "number", "looks"),
    [
        ("flickr30k", 8_091, "Flickr8k"),
        ("flickr30k", 31_783, "Flickr30k"),
        ("flickr30k", 1_001, ""),
        ("flickr8k", 8_091, ""),
    ],
)
def test_a_whole_set_is_not_taken_for_a_split(
    dataset: str, number: int, looks: str, tmp_path: Path
) -> None:
    lines = "".join(f"{i}.jpg,a dog\n" for i in range(number))
    annotations = write(tmp_path / "captions.txt", f"image,caption\n{lines}")
    write(tmp_path / "images" / "1.jpg", picture(1))
    convert = partial(captioned, dataset, tmp_path / "images", annotations, tmp_path / "out")
    name = f"name the images of 'test' with --split-file .*{looks}"
    said = rf"holds all splits \({number:,} images\); {name}"
    refused(said, convert, skip_missing=True)
    said = convert(split_file=str(write(tmp_path / "list", "1.jpg\n"))).message
    assert f"left out: not in the split file {number - 1:,}" in said
    assert f"{dataset}'s test split is published with 1,000 images, this one has 1" in said


@pytest.mark.slow
def test_a_whole_file_of_coco_is_not_karpathys_split(tmp_path: Path) -> None:
    captions = {i: ["a dog"] for i in range(40_504)}
    annotations = make_coco_api(tmp_path / "captions_val2014.json", captions, "{}.jpg")
    convert = partial(captioned, "coco", tmp_path, annotations, tmp_path / "out")
    refused("40,504 images.*coco's test split has 5,000.*COCO's val2014 as a whole", convert)
    write(tmp_path / "7.jpg", picture(7))
    assert convert(split="val2014", skip_missing=True).captions == {"7.jpg": ["a dog"]}


def test_every_published_set_has_its_number_of_images() -> None:
    for name, source in (CLASSIFICATION_SETS | RETRIEVAL_SETS).items():
        is_published = name not in ("folder", "pairs")
        assert bool(source.sizes) == is_published
        if name in RETRIEVAL_SETS:
            assert (source.split in source.sizes) == is_published
    cars = CLASSIFICATION_SETS["cars"]
    assert cars.size_notes("cars", "test", 8_041) == cars.size_notes("cars", "mine", 1) == []


# images that are not there, or elsewhere


def test_missing_images_are_named_or_skipped(tmp_path: Path) -> None:
    convert = partial(captioned, "coco", tmp_path, make_karpathy(tmp_path, "coco"))
    folder, out = tmp_path / "val2014", tmp_path / "out"
    lost, broken, kept = (f"COCO_val2014_{i:012}.jpg" for i in (3, 1, 5))
    (folder / lost).unlink()
    said = rf"1 of 3 images are missing, the first is {folder / lost}; --skip-missing"
    refused(said, convert, out)
    write(folder / broken, b"no image")
    made = convert(out, skip_missing=True)
    assert f"cannot be decoded: val2014/{broken}" in made.message
    assert made.keys == [f"val2014/{kept}"]
    skipped = {"missing image": 1, "no caption": 0, "unreadable image": 1}
    assert made.described["skipped"] == skipped
    shutil.rmtree(folder)
    said = r"3 of 3 images are missing, .*; is --images right\?"
    refused(said, convert, tmp_path / "other", skip_missing=True)


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("val2014/COCO_val2014_000000000009.jpg", "coco2017/train2017/000000000009.jpg"),
        ("val2014/COCO_val2014_000000000009.jpg", "coco/images/COCO_val2014_000000000009.jpg"),
        ("9.jpg", "flickr30k_images/flickr30k_images/9.jpg"),
        ("9.jpg", "Flicker8k_Dataset/9.jpg"),
    ],
)
def test_images_are_found_in_the_folders_of_an_archive(
    named: str, lies: str, tmp_path: Path
) -> None:
    file = write(tmp_path / lies, picture(9))
    assert ImageFinder(tmp_path, published=True).find(named) == file
    # a table of one's own says where its images lie
    assert not ImageFinder(tmp_path, published=False).find(named).exists()


@pytest.mark.parametrize("name", ["a\0.jpg", "x\ud800.jpg", "a" * 256])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name an image that no file can be called: "):
        ImageFinder(tmp_path, published=False).find(name)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("pairs", name) for name in ("../secret.jpg", "a/../../secret.jpg", "..")),
        *(("coco2017", name) for name in ("../secret.jpg", "a/../../secret.jpg", "..")),
        # your own table may have full paths
        *(("coco2017", name) for name in ("{folder}/secret.jpg", "/etc/hostname")),
    ],
)
def test_annotations_name_no_image_outside_of_the_folder(
    tmp_path: Path, layout: str, name: str
) -> None:
    draw(tmp_path, "secret.jpg", "images/a/1.jpg")
    name = name.format(folder=tmp_path)
    if layout == "pairs":
        file = write(tmp_path / "pairs.csv", f"image,caption\na/1.jpg,one\n{name},two\n")
    else:
        images = [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": name}]
        captions = [{"image_id": i, "caption": "text"} for i in (1, 2)]
        content: dict[str, Any] = {"images": images, "annotations": captions}
        file = write(tmp_path / "captions.json", json.dumps(content))
    said = "name an image outside of --images"
    refused(said, captioned, layout, tmp_path / "images", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# bad input

KARPATHY = "--images @/flickr30k-images --annotations @/dataset_flickr30k.json"
IMAGES = "--images @/flickr30k-images --annotations"
BAD_FILES = {
    "test.txt": "1001\n77\n",
    "broken.json": "{",
    "other.json": '{"image": []}',
    "list.json": "[1]",
    "one.json": '{"images": [], "annotations": [{"image_id": 1}]}',
    "empty.json": '{"images": [], "annotations": []}',
    "odd.txt": "image,caption\nno image\n",
    "latin.csv": b"image,caption\na.jpg,B\xe4r\n",
}
# a table of pairs, and a part of the line that refuses it
BAD_TABLES = [
    ("file,caption\na.jpg,b\n", "has no column 'image'; it has file, caption"),
    ("", "has no column 'image'; it has none"),
    ("image,caption\na.jpg\n", "line 2: less than 2 columns"),
    ("image,caption\na.jpg,one, two\n", "line 2: more than 2 columns (captions with separators"),
    ('image,caption\na.jpg,"Stop" sign\n', "line 2: ',' expected after '\"' (captions with"),
    ('image,caption\na.jpg,"Stop sign\nb.jpg,c\n', "line 2: unexpected end of data"),
    ("image,caption\n,b\n", "a row has no image (its caption: 'b')"),
    ("image,caption\n", "has no captions"),
    ("image,caption\na.jpg, \n", "there are no images"),
]
# the command's arguments, where @ is the folder of these files, and a part of the line
BAD_INPUTS = [
    (f"flicker30k {KARPATHY}", "unknown dataset 'flicker30k'; did you mean 'flickr30k'?"),
    (f"flickr30k {KARPATHY} --split tset", "has no split 'tset'; did you mean 'test'?"),
    ("coco --images @", "--annotations is missing"),
    ("coco --annotations @/broken.json", "--images is missing"),
    (f"coco {IMAGES} @/none.json", "none.json does not exist"),
    (f"coco {IMAGES} @/flickr30k-images", "cannot read --annotations"),
    (f"coco {IMAGES} @/broken.json", "is not JSON"),
    (f"coco {IMAGES} @/other.json", "is not laid out as coco is: no entry 'images'"),
    (f"coco {IMAGES} @/list.json", "is not laid out as coco is"),
    (f"coco2017 {IMAGES} @/one.json", "no entry 1"),
    (f"coco2017 {IMAGES} @/empty.json", "has no captions"),
    (f"flickr30k {KARPATHY} --split-file @/test.txt", "has splits of its own"),
    (f"coco {KARPATHY} --split-file @/test.txt", "--split-file is for flickr30k"),
    (
        f"flickr30k {IMAGES} @/r.token",
        "holds all splits (4 images); name the images of 'test' with --split-file",
    ),
    (
        f"flickr30k {IMAGES} @/r.token --split-file @/test.txt",
        "1 of 2 images of --split-file are not in",
    ),
    (f"flickr30k {IMAGES} @/r.token --split-file @/none", "none does not exist"),
    (f"flickr30k {IMAGES} @/odd.txt", "line 2 is no image and caption: no image"),
    (f"pairs {IMAGES} @/latin.csv", "is not UTF-8 (line 2)"),
    (f"flickr30k {KARPATHY} --limit -1", "--limit must be at least 1"),
    (f"flickr30k {KARPATHY} --out s3:/bucket", "did you mean 's3://bucket'?"),
    ("coco --annotations @/broken.json --images s3://bucket/coco", "local folders"),
]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_karpathy(tmp_path, "flickr30k")
    make_token_file(tmp_path)
    tables = {f"{i}.csv": text for i, (text, _) in enumerate(BAD_TABLES)}
    for name, content in (BAD_FILES | tables).items():
        write(tmp_path / name, content)
    messages = zip(tables, (message for _, message in BAD_TABLES), strict=True)
    commands = [(f"pairs {IMAGES} @/{name}", message) for name, message in messages]
    assert_told_in_one_line(main, [*BAD_INPUTS, *commands], tmp_path, capsys)
