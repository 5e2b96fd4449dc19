"""Retrieval sets to MDS: miniatures in each set's own layout, every caption with its image."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from miniatures import picture, write

from alignclip.conversion.retrieval import RetrievalOptions as Options
from alignclip.conversion.retrieval import convert, main
from alignclip.errors import UserError


def texts(number: int, captions: int = 5) -> list[str]:
    return [
        f"picture {number}, said in way {i}.\n" for i in range(captions)
    ]  # COCO's have such ends


def quick(dataset: str, images: Path, annotations: Path, out: Path | str, **changes: Any) -> str:
    places = {"images": str(images), "annotations": str(annotations), "out": str(out)}
    return convert(Options(dataset=dataset, **places, progress=False, **changes))


def read_back(folder: Path) -> tuple[dict[str, tuple[bytes, list[str]]], dict[str, Any]]:
    """The image and captions of each key, in order, and ``dataset.json``."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    rows = [dataset[i] for i in range(dataset.num_samples)]
    assert {tuple(sorted(row)) for row in rows} == {("caption", "image", "key")}
    index = json.loads((folder / "index.json").read_text())
    assert all(shard["hashes"] == ["xxh64"] for shard in index["shards"])
    assert (
        index["shards"][0]["column_encodings"][index["shards"][0]["column_names"].index("caption")]
        == "json"
    )
    described = json.loads((folder / "dataset.json").read_text())
    assert described["samples"] == len(rows)
    return {row["key"]: (row["image"], row["caption"]) for row in rows}, described


# miniatures

SPLITS = ["train", "test", "val", "test", "restval", "test"]


def make_karpathy(root: Path, dataset: str) -> Path:
    """Six images, those of ``SPLITS``; the last has six captions."""
    coco = dataset == "coco"
    images = []
    for i, split in enumerate(SPLITS):
        folder = "train2014" if split in ("train", "restval") else "val2014"
        name = f"COCO_{folder}_{i:012}.jpg" if coco else f"{1000 + i}.jpg"
        sentences = [
            {"raw": text, "sentid": j} for j, text in enumerate(texts(i, 6 if i == 5 else 5))
        ]
        image = {"filename": name, "imgid": i, "split": split, "sentences": sentences}
        images.append({**image, "filepath": folder} if coco else image)
        write(root / (folder if coco else "flickr30k-images") / name, picture(i))
    return write(
        root / f"dataset_{dataset}.json", json.dumps({"images": images, "dataset": dataset})
    )


def make_coco_api(root: Path) -> Path:
    """Ids out of order, the captions of an image not together."""
    ids = [300, 100, 200]
    images = [{"id": i, "file_name": f"{i:012}.jpg", "height": 4, "width": 6} for i in ids]
    captions = [
        {"id": 10 * j + i, "image_id": i, "caption": texts(i)[j]} for j in range(5) for i in ids
    ]
    for i in ids:
        write(root / "val2017" / f"{i:012}.jpg", picture(i))
    content = {"images": images, "annotations": captions, "info": {}, "licenses": []}
    return write(root / "annotations" / "captions_val2017.json", json.dumps(content))


def make_flickr_lines(root: Path, form: str) -> Path:
    lines = {"token": "{name}#{j}\t{text}", "csv": "{name}| {j}| {text}", "txt": "{name},{text}"}
    header = {
        "token": [],
        "csv": ["image_name| comment_number| comment"],
        "txt": ["image,caption"],
    }[form]
    rows = []
    for i in range(4):
        write(root / "images" / f"{1000 + i}.jpg", picture(i))
        rows += [
            lines[form].format(name=f"{1000 + i}.jpg", j=j, text=text.strip())
            for j, text in enumerate(texts(i))
        ]
    if form == "csv":  # a line of Kaggle's file is like this
        rows[-1] = rows[-1].replace("| 4|", "| 4  ")
    name = {
        "token": "results_20130124.token",
        "csv": "results.csv",
        "txt": "flickr30k_test_karpathy.txt",
    }[form]
    return write(root / name, "\n".join([*header, *rows]) + "\n")


# each named set


@pytest.mark.parametrize("below", ["", "val2014"])
def test_coco_karpathy(below: str, tmp_path: Path) -> None:
    annotations = make_karpathy(tmp_path / "coco", "coco")
    quick("coco", tmp_path / "coco" / below, annotations, tmp_path / "out")
    rows, described = read_back(tmp_path / "out")
    assert rows == {
        f"val2014/COCO_val2014_{i:012}.jpg": (picture(i), texts(i, 6 if i == 5 else 5))
        for i in (1, 3, 5)
    }
    assert (described["dataset"], described["split"], described["annotations"]) == (
        "coco",
        "test",
        str(annotations),
    )
    quick("coco", tmp_path / "coco", annotations, tmp_path / "restval", split="restval")
    assert list(read_back(tmp_path / "restval")[0]) == ["train2014/COCO_train2014_000000000004.jpg"]


@pytest.mark.parametrize("below", ["", "val2017"])
@pytest.mark.parametrize(
    "dataset", ["coco2017", "coco"]
)  # clip_benchmark's coco_test_karpathy.json is such a file
def test_coco_api_layout(dataset: str, below: str, tmp_path: Path) -> None:
    annotations = make_coco_api(tmp_path / "coco")
    quick(dataset, tmp_path / "coco" / below, annotations, tmp_path / "out")
    rows, described = read_back(tmp_path / "out")
    assert list(rows.items()) == [(f"{i:012}.jpg", (picture(i), texts(i))) for i in (100, 200, 300)]
    assert described["split"] == ("val" if dataset == "coco2017" else "test")
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoCaptions  # what clip_benchmark reads it with

    theirs = CocoCaptions(str(tmp_path / "coco" / "val2017"), str(annotations))
    assert [captions for _, captions in theirs] == [captions for _, captions in rows.values()]


@pytest.mark.parametrize("below", ["", "flickr30k-images"])
def test_flickr_karpathy(below: str, tmp_path: Path) -> None:
    annotations = make_karpathy(tmp_path / "flickr", "flickr30k")
    content = json.loads(annotations.read_text(encoding="utf-8"))
    for image in content["images"]:
        if image["split"] != "test":
            del image["sentences"]
    annotations.write_text(json.dumps(content), encoding="utf-8")
    quick("flickr30k", tmp_path / "flickr" / below, annotations, tmp_path / "out")
    rows, _ = read_back(tmp_path / "out")
    assert rows == {
        f"{1000 + i}.jpg": (picture(i), texts(i, 6 if i == 5 else 5)) for i in (1, 3, 5)
    }


@pytest.mark.parametrize("form", ["token", "csv", "txt"])
def test_flickr_lines(form: str, tmp_path: Path) -> None:
    annotations = make_flickr_lines(tmp_path, form)
    split_file = write(
        tmp_path / "test.txt", "1003\n1001.jpg\n"
    )  # Flickr30k Entities' have no .jpg
    quick(
        "flickr30k", tmp_path / "images", annotations, tmp_path / "out", split_file=str(split_file)
    )
    rows, described = read_back(tmp_path / "out")
    expected = {
        f"{1000 + i}.jpg": (picture(i), [text.strip() for text in texts(i)]) for i in (3, 1)
    }
    assert list(rows.items()) == list(expected.items())
    assert described["split"] == "test"


def test_flickr_of_hugging_face(tmp_path: Path) -> None:
    """``flickr_annotations_30k.csv``: the captions of an image as a JSON list in a field of its
    own.
    """
    make_karpathy(tmp_path / "flickr", "flickr30k")
    table = io.StringIO()
    rows = csv.DictWriter(table, ["raw", "sentids", "split", "filename", "img_id"])
    rows.writeheader()
    for i, split in enumerate(SPLITS):
        captions = [text.strip() + ' "quoted", é' for text in texts(i)]
        row = {
            "raw": json.dumps(captions),
            "sentids": "[0, 1, 2, 3, 4]",
            "split": split,
            "filename": f"{1000 + i}.jpg",
        }
        odd = {} if split == "test" else {"raw": "no list"}  # of another split
        rows.writerow(row | {"img_id": i} | odd)
    annotations = write(tmp_path / "flickr_annotations_30k.csv", table.getvalue())
    quick("flickr30k", tmp_path / "flickr", annotations, tmp_path / "out")
    found, _ = read_back(tmp_path / "out")
    assert list(found) == ["1001.jpg", "1003.jpg", "1005.jpg"]
    assert found["1003.jpg"] == (picture(3), [text.strip() + ' "quoted", é' for text in texts(3)])
    with pytest.raises(UserError, match="has no split 'tset'; did you mean 'test'"):
        quick("flickr30k", tmp_path / "flickr", annotations, tmp_path / "other", split="tset")


def test_flickr_of_kaggle_with_commas(tmp_path: Path) -> None:
    lines = ["image_name,comment_number,comment"]
    lines += [
        f"{1000 + i}.jpg,{j}, 3 men, said in way {j}.\x85" for i in range(2) for j in range(5)
    ]
    for i in range(2):
        write(tmp_path / "images" / f"{1000 + i}.jpg", picture(i))
    annotations = write(tmp_path / "captions.txt", "\r\n".join(lines))
    quick("flickr30k", tmp_path / "images", annotations, tmp_path / "out")
    found, _ = read_back(tmp_path / "out")
    assert found["1001.jpg"][1] == [f"3 men, said in way {j}.\x85" for j in range(5)]


def test_all_of_flickr_is_no_split(tmp_path: Path) -> None:
    """Kaggle's ``captions.txt`` looks as clip_benchmark's file of one split does.

    It has more images than any.
    """
    lines = ["image,caption", *(f"{i}.jpg,a dog" for i in range(31_783))]
    annotations = write(tmp_path / "captions.txt", "\n".join(lines))
    (tmp_path / "images").mkdir()
    with pytest.raises(
        UserError, match=r"holds all splits \(31,783 images\); name the images of 'test'"
    ):
        quick("flickr30k", tmp_path / "images", annotations, tmp_path / "out")


def test_another_list_of_images_is_another_set(tmp_path: Path) -> None:
    annotations = make_flickr_lines(tmp_path, "token")
    first, second = write(tmp_path / "a.txt", "1001"), write(tmp_path / "b.txt", "1000")
    quick("flickr30k", tmp_path / "images", annotations, tmp_path / "out", split_file=str(first))
    assert "already" in quick(
        "flickr30k", tmp_path / "images", annotations, tmp_path / "out", split_file=str(first)
    )
    with pytest.raises(UserError, match="already holds flickr30k"):
        quick(
            "flickr30k", tmp_path / "images", annotations, tmp_path / "out", split_file=str(second)
        )


def test_flickr_of_clip_benchmark(tmp_path: Path) -> None:
    flickr = pytest.importorskip("clip_benchmark.datasets.flickr")
    annotations = make_flickr_lines(tmp_path, "txt")
    quick("flickr30k", tmp_path / "images", annotations, tmp_path / "out")
    theirs = flickr.Flickr(str(tmp_path / "images"), str(annotations))
    assert [
        (name, captions) for name, (_, captions) in read_back(tmp_path / "out")[0].items()
    ] == theirs.data


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_pairs(suffix: str, comma: str, tmp_path: Path) -> None:
    rows = [
        ("number", "image", "caption"),
        ("1", "a.jpg", '"one, ""so"" said"'),
        ("2", "sub/b.jpg", "ein Bär"),
    ]
    rows += [
        ("3", "a.jpg", "again"),
        ("4", "c.jpg", " "),
        ("5", str(tmp_path / "elsewhere.jpg"), "absolute"),
    ]
    annotations = write(
        tmp_path / f"my.{suffix}", "\ufeff" + "\r\n".join(comma.join(row) for row in rows)
    )
    for i, name in enumerate(["images/a.jpg", "images/sub/b.jpg", "images/c.jpg", "elsewhere.jpg"]):
        write(tmp_path / name, picture(i))
    message = quick("pairs", tmp_path / "images", annotations, tmp_path / "out", split="mine")
    assert "skipped               1\n  no caption          1\n" in message
    result, described = read_back(tmp_path / "out")
    assert result == {
        "a.jpg": (picture(0), ['one, "so" said', "again"]),
        "sub/b.jpg": (picture(1), ["ein Bär"]),
        str(tmp_path / "elsewhere.jpg"): (picture(3), ["absolute"]),
    }
    assert described["skipped"] == {"missing image": 0, "no caption": 1, "unreadable image": 0}
    assert described["split"] == "mine"


# images that are not there


def test_missing_images_are_named_or_skipped(tmp_path: Path) -> None:
    annotations = make_karpathy(tmp_path, "coco")
    lost = tmp_path / "val2014" / f"COCO_val2014_{3:012}.jpg"
    lost.unlink()
    with pytest.raises(
        UserError, match=rf"1 of 3 images are missing, the first is {lost}; --skip-missing"
    ):
        quick("coco", tmp_path, annotations, tmp_path / "out")
    write(tmp_path / "val2014" / f"COCO_val2014_{1:012}.jpg", b"no image")
    message = quick("coco", tmp_path, annotations, tmp_path / "out", skip_missing=True)
    assert "cannot be decoded: val2014/COCO_val2014_000000000001.jpg" in message
    rows, described = read_back(tmp_path / "out")
    assert list(rows) == [f"val2014/COCO_val2014_{5:012}.jpg"]
    assert described["skipped"] == {"missing image": 1, "no caption": 0, "unreadable image": 1}
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(UserError, match=r"3 of 3 images are missing, .*; is --images right\?"):
        quick("coco", tmp_path, annotations, tmp_path / "other", skip_missing=True)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "a/../../secret.jpg", "{folder}/secret.jpg", "..", "/etc/hostname"]
)
@pytest.mark.parametrize("layout", ["pairs", "coco2017"])
def test_annotations_name_no_image_outside_of_the_folder(
    tmp_path: Path, name: str, layout: str
) -> None:
    if layout == "pairs" and name.startswith(("/", "{")):
        pytest.skip("your own table may have full paths")
    write(tmp_path / "secret.jpg", picture(1))
    name = name.format(folder=tmp_path)
    inside = write(tmp_path / "images" / "a" / "1.jpg", picture(2))
    if layout == "pairs":
        file = write(tmp_path / "pairs.csv", f"image,caption\na/1.jpg,one\n{name},two\n")
    else:
        images = [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": name}]
        captions = [{"image_id": i, "caption": "text"} for i in (1, 2)]
        file = write(
            tmp_path / "captions.json", json.dumps({"images": images, "annotations": captions})
        )
    with pytest.raises(UserError, match="name an image outside of --images"):
        quick(layout, tmp_path / "images", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert inside.exists()


# complete or absent


# bad input


def bad_inputs(folder: Path) -> list[tuple[list[str], str]]:
    images = folder / "flickr30k-images"
    numbers = itertools.count()
    karpathy, token = make_karpathy(folder, "flickr30k"), make_flickr_lines(folder, "token")

    def given(dataset: str, annotations: Path | str, *more: str) -> list[str]:
        if isinstance(annotations, str):
            annotations = write(folder / f"{next(numbers)}.csv", annotations)
        return [dataset, "--images", str(images), "--annotations", str(annotations), *more]

    def file(name: str, content: str) -> Path:
        return write(folder / name, content)

    test = str(file("test.txt", "1001\n77\n"))
    return [
        (given("flicker30k", karpathy), "unknown dataset 'flicker30k'; did you mean 'flickr30k'?"),
        (
            given("flickr30k", karpathy, "--split", "tset"),
            "has no split 'tset'; did you mean 'test'?",
        ),
        (["coco", "--images", str(images)], "--annotations is missing"),
        (["coco", "--annotations", str(karpathy)], "--images is missing"),
        (given("coco", folder / "none.json"), "none.json does not exist"),
        (given("coco", images), "cannot read --annotations"),
        (given("coco", file("broken.json", "{")), "is not JSON"),
        (
            given("coco", file("other.json", '{"image": []}')),
            "is not laid out as coco is: no entry 'images'",
        ),
        (given("coco", file("list.json", "[1]")), "is not laid out as coco is"),
        (
            given("coco2017", file("one.json", '{"images": [], "annotations": [{"image_id": 1}]}')),
            "no entry 1",
        ),
        (
            given("coco2017", file("empty.json", '{"images": [], "annotations": []}')),
            "has no captions",
        ),
        (given("flickr30k", karpathy, "--split-file", test), "has splits of its own"),
        (given("coco", karpathy, "--split-file", test), "--split-file is for flickr30k"),
        (
            given("flickr30k", token),
            "holds all splits (4 images); name the images of 'test' with --split-file",
        ),
        (
            given("flickr30k", token, "--split-file", test),
            "1 of 2 images of --split-file are not in",
        ),
        (given("flickr30k", token, "--split-file", str(folder / "none")), "none does not exist"),
        (
            given("flickr30k", file("odd.txt", "image,caption\nno image\n")),
            "line 2 is no image and caption: no image",
        ),
        (given("pairs", "file,caption\na.jpg,b\n"), "has no column 'image'; it has file, caption"),
        (given("pairs", ""), "has no column 'image'; it has none"),
        (given("pairs", "image,caption\na.jpg\n"), "line 2: less than 2 columns"),
        (
            given("pairs", "image,caption\na.jpg,one, two\n"),
            "line 2: more than 2 columns (captions with separators",
        ),
        (
            given("pairs", 'image,caption\na.jpg,"Stop" sign\n'),
            "line 2: ',' expected after '\"' (captions with",
        ),
        (
            given("pairs", 'image,caption\na.jpg,"Stop sign\nb.jpg,c\n'),
            "line 2: unexpected end of data",
        ),
        (given("pairs", "image,caption\n,b\n"), "a row has no image (its caption: 'b')"),
        (given("pairs", "image,caption\n"), "has no captions"),
        (given("pairs", "image,caption\na.jpg, \n"), "there are no images"),
        (
            given("pairs", write(folder / "latin.csv", b"image,caption\na.jpg,B\xe4r\n")),
            "is not UTF-8 (line 2)",
        ),
        (given("flickr30k", karpathy, "--limit", "-1"), "--limit must be at least 1"),
        (given("flickr30k", karpathy, "--out", "s3:/bucket"), "did you mean 's3://bucket'?"),
        (["coco", "--annotations", str(karpathy), "--images", "s3://bucket/coco"], "local folders"),
    ]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in bad_inputs(tmp_path / "in"):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *out])
        assert ended.value.code == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: "), arguments
        assert message in error
    assert not (tmp_path / "out" / "index.json").exists()
