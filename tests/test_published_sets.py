"""Published sets as people have them: other folders, other annotation files, other sets under a
set's name.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from miniatures import (
    make_cars,
    make_cifar,
    make_class_folders,
    make_flowers,
    make_food,
    make_idx,
    picture,
    quick,
    read_back,
    synsets,
    write,
)

from alignclip.conversion import classification, retrieval
from alignclip.conversion.image_finder import ImageFinder
from alignclip.conversion.retrieval_sets import RETRIEVAL_SETS as RETRIEVAL
from alignclip.errors import UserError

# where the parts of Stanford Cars lie, by who has put them together
CARS = {
    "nested": {"cars_test": "cars_test/cars_test", "devkit": "car_devkit/devkit"},
    "flat": {"cars_test": "cars_test", "devkit": "."},
    "second download": {"cars_test": "images/cars_test", "devkit": "devkit", "annotations": " (1)"},
}


@pytest.mark.parametrize("layout", CARS)
def test_cars_are_found_where_people_have_them(layout: str, tmp_path: Path) -> None:
    places = CARS[layout]
    published_place = make_cars(tmp_path / "published") / "stanford_cars"
    root = tmp_path / "downloads"
    for name in ("cars_test", "devkit"):
        (root / places[name]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(published_place / name, root / places[name], dirs_exist_ok=True)
    labels = "cars_test_annos_withlabels"
    shutil.copy(
        published_place / f"{labels}.mat", root / f"{labels}{places.get('annotations', '')}.mat"
    )
    quick("cars", root, tmp_path / "out")
    rows, classes, _ = read_back(tmp_path / "out")
    assert [row["label"] for row in rows] == [180, 102, 195, 0]
    assert [row["image"] for row in rows] == [picture(i) for i in range(1, 5)]
    assert [row["key"] for row in rows] == [
        f"stanford_cars/cars_test/{i:05}.jpg" for i in range(1, 5)
    ]
    assert len(classes["classnames"]) == 196


def test_cars_without_labels_are_told_so(tmp_path: Path) -> None:
    root = make_cars(tmp_path) / "stanford_cars"
    labelled = root / "cars_test_annos_withlabels.mat"
    labelled.rename(root / "devkit" / "cars_test_annos.mat")
    with pytest.raises(
        UserError, match=r"cars_test_annos.mat has no labels .*put cars_test_annos_withlabels.mat"
    ) as caught:
        quick("cars", tmp_path, tmp_path / "out")
    assert "MD5" not in str(caught.value)
    (root / "devkit" / "cars_test_annos.mat").unlink()
    with pytest.raises(UserError, match=r"there is no file cars_test_annos_withlabels") as caught:
        quick("cars", tmp_path, tmp_path / "out")
    assert "MD5" not in str(caught.value)


def test_cars_in_one_folder(tmp_path: Path) -> None:
    """``car_ims.tgz`` and ``cars_annos.mat``, which say of each image whether it is for testing."""
    from scipy.io import savemat

    fields = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    rows = [
        (f"car_ims/{i:06}.jpg", np.uint8(label), np.uint8(test))
        for i, label, test in ((1, 3, 1), (2, 1, 0), (3, 2, 1))
    ]
    names = np.array(["Audi A", "BMW B", "Kia C"], dtype=object)
    (tmp_path / "cars").mkdir()
    savemat(
        tmp_path / "cars" / "cars_annos.mat",
        {"annotations": np.array(rows, dtype=fields), "class_names": names},
    )
    for i in range(1, 4):
        write(tmp_path / "cars" / "car_ims" / f"{i:06}.jpg", picture(i))
    quick("cars", tmp_path, tmp_path / "test")
    quick("cars", tmp_path, tmp_path / "train", split="train")
    found, classes, _ = read_back(tmp_path / "test")
    assert [(row["label"], row["image"]) for row in found] == [(2, picture(1)), (1, picture(3))]
    assert classes["classnames"] == ["Audi A", "BMW B", "Kia C"]
    assert [row["label"] for row in read_back(tmp_path / "train")[0]] == [0]


def test_food_and_flowers_in_other_folders(tmp_path: Path, any_md5: None) -> None:
    food, flowers = (
        make_food(tmp_path / "a") / "food-101",
        make_flowers(tmp_path / "b") / "flowers-102",
    )
    (tmp_path / "food" / "meta").mkdir(parents=True)
    food.joinpath("images").rename(tmp_path / "food" / "images")
    food.joinpath("meta").rename(tmp_path / "food" / "meta" / "meta")
    quick("food101", tmp_path / "food", tmp_path / "food-out")
    found, classes, _ = read_back(tmp_path / "food-out")
    assert [classes["classnames"][row["label"]] for row in found][2:] == [
        "apple pie",
        "baby back ribs",
    ]
    assert all(
        row["image"] == (tmp_path / "food" / row["key"].removeprefix("food-101/")).read_bytes()
        for row in found
    )
    flowers.joinpath("jpg").rename(flowers / "102flowers")
    flowers.rename(tmp_path / "Oxford")
    quick("flowers", tmp_path / "Oxford", tmp_path / "flowers-out")
    assert [row["label"] for row in read_back(tmp_path / "flowers-out")[0]] == [5, 101, 76, 49]


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.cifar
    import torchvision.datasets.flowers102

    for module in (torchvision.datasets.cifar, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize(
    ("kind", "folder"), [("CIFAR10", "cifar-10-python/cifar10"), ("CIFAR100", "data")]
)
def test_cifar_in_other_folders(kind: str, folder: str, any_md5: None, tmp_path: Path) -> None:
    (unpacked,) = make_cifar(tmp_path / "x", kind).iterdir()
    (tmp_path / "y" / folder).parent.mkdir(parents=True)
    unpacked.rename(tmp_path / "y" / folder)
    quick(kind.lower(), tmp_path / "y", tmp_path / "out")
    assert len(read_back(tmp_path / "out")[0]) == int(kind[5:])


def test_imagenet_without_class_folders(tmp_path: Path) -> None:
    """The archive and Kaggle's copy are flat; Kaggle's has the labels in a table."""
    root, wnids = tmp_path / "ILSVRC", synsets("1k")
    # a folder of annotations has the same name, and comes first
    write(
        root / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml", b"<annotation/>"
    )
    for i in range(1, 4):
        write(root / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{i:08}.JPEG", picture(i))
    with pytest.raises(
        UserError, match=r"CLS-LOC/val has 3 images and no class folders: nothing says which class"
    ):
        quick("imagenet1k", root, tmp_path / "out")
    rows = [
        (f"ILSVRC2012_val_{i:08}", f"{wnids[i * 7]} 85 1 499 272 {wnids[1]} 3 4 5 6 ")
        for i in (3, 1, 2)
    ]
    with (tmp_path / "ILSVRC" / "LOC_val_solution.csv").open(
        "w", newline="", encoding="utf-8"
    ) as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    message = quick("imagenet1k", root, tmp_path / "out")
    found, classes, _ = read_back(tmp_path / "out")
    assert [(row["label"], row["image"]) for row in found] == [
        (7 * i, picture(i)) for i in range(1, 4)
    ]
    assert len(classes["classnames"]) == 1000
    assert "imagenet1k's val split is published with 50,000 images, this one has 3" in message
    write(root / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000009.JPEG", picture(9))
    with pytest.raises(
        UserError, match=r"has no label of 1 images, the first is ILSVRC2012_val_00000009.JPEG"
    ):
        quick("imagenet1k", root, tmp_path / "other")


def test_nested_imagenet_relatives(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "imagenet-a" / "imagenet-a", synsets("a"))
    quick("imagenet-a", tmp_path, tmp_path / "out")
    assert {row["label"] for row in read_back(tmp_path / "out")[0]} == set(range(200))


def test_another_variant_of_imagenet_v2_is_said(tmp_path: Path) -> None:
    make_class_folders(
        tmp_path / "imagenetv2-top-images-format-val", [str(i) for i in range(1000)], "jpeg"
    )
    message = quick("imagenetv2", tmp_path / "imagenetv2-top-images-format-val", tmp_path / "out")
    assert "imagenetv2-top-images-format-val is not the matched-frequency variant" in message
    assert any("matched-frequency" in note for note in read_back(tmp_path / "out")[2]["notes"])


def test_mnist_is_not_fashion_mnist(tmp_path: Path) -> None:
    """MNIST's files have the same names and sizes; its classes differ in size."""
    labels = np.array([0] * 980 + [1] * 1135 + [i % 8 + 2 for i in range(7885)], dtype=np.uint8)
    header = {
        "images-idx3": np.array([2051, 10_000, 1, 1], ">u4"),
        "labels-idx1": np.array([2049, 10_000], ">u4"),
    }
    data = {"images-idx3": bytes(10_000), "labels-idx1": labels.tobytes()}
    for name, numbers in header.items():
        content = gzip.compress(numbers.tobytes() + data[name])
        write(tmp_path / f"t10k-{name}-ubyte.gz", content)
    with pytest.raises(
        UserError, match=r"1,000 images of each class; here are 980 to 1,135, as in MNIST"
    ):
        quick("fashion_mnist", tmp_path, tmp_path / "out")
    assert Counter(labels.tolist())[0] == 980


def test_a_mirrors_names_of_fashion_mnist(tmp_path: Path) -> None:
    _, labels = make_idx(tmp_path / "archive", "t10k", 12, packed=False)
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (tmp_path / "archive" / f"t10k-{name}").rename(
            tmp_path / "archive" / f"t10k-{name.replace('-idx', '.idx')}"
        )
    quick("fashion_mnist", tmp_path, tmp_path / "out")
    assert [row["label"] for row in read_back(tmp_path / "out")[0]] == labels.tolist()


def test_a_number_of_images_that_is_not_the_published_one_is_said(
    tmp_path: Path, any_md5: None
) -> None:
    message = quick("flowers", make_flowers(tmp_path / "data"), tmp_path / "out")
    assert "flowers's test split is published with 6,149 images, this one has 4" in message
    described = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert described["notes"] == [
        "flowers's test split is published with 6,149 images, this one has 4"
    ]
    # a part of the set was asked for: the set itself is compared
    assert "this one has 4" in quick("flowers", tmp_path / "data", tmp_path / "part", limit=2)


def test_every_published_set_has_its_number_of_images() -> None:
    own = {"folder", "pairs"}
    for name, source in classification.CLASSIFICATION_SETS.items():
        assert bool(source.sizes) == (name not in own)
    for name, source in RETRIEVAL.items():
        assert (source.split in source.sizes) == (name not in own)
    cars = classification.CLASSIFICATION_SETS["cars"]
    assert cars.size_notes("cars", "test", 8_041) == cars.size_notes("cars", "mine", 1) == []


# captions


def karpathy(folder: Path, splits: dict[str, int], dataset: str = "coco") -> Path:
    images = []
    for split, number in splits.items():
        for _ in range(number):
            name = f"COCO_val2014_{len(images):012}.jpg"
            images.append(
                {
                    "filepath": "val2014",
                    "filename": name,
                    "split": split,
                    "sentences": [{"raw": "a dog"}],
                }
            )
    return write(folder / f"dataset_{dataset}.json", json.dumps({"images": images}).encode())


def convert_captions(
    dataset: str, images: Path, annotations: Path, out: Path, **changes: object
) -> str:
    places = {"images": str(images), "annotations": str(annotations), "out": str(out)}
    given = retrieval.RetrievalOptions(dataset=dataset, **places, progress=False)
    return retrieval.convert(dataclasses.replace(given, **changes))  # type: ignore[arg-type]


def captions_in(folder: Path) -> dict[str, list[str]]:
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    return {row["key"]: row["caption"] for row in (dataset[i] for i in range(dataset.num_samples))}


def test_what_is_left_out_of_a_split_is_said(tmp_path: Path) -> None:
    annotations = karpathy(tmp_path, {"train": 3, "restval": 2, "test": 1})
    for i in range(6):
        write(tmp_path / "val2014" / f"COCO_val2014_{i:012}.jpg", picture(i))
    message = convert_captions("coco", tmp_path, annotations, tmp_path / "train", split="train")
    assert (
        "train has 3 images; left out: restval 2, test 1; --split train+restval takes both"
        in message
    )
    assert "coco's train split is published with 82,783 images, this one has 3" in message
    message = convert_captions(
        "coco", tmp_path, annotations, tmp_path / "both", split="train+restval"
    )
    assert "train+restval has 5 images; left out: test 1" in message
    assert len(captions_in(tmp_path / "both")) == 5
    with pytest.raises(UserError, match=r"no split 'restvl'; did you mean 'restval'"):
        convert_captions("coco", tmp_path, annotations, tmp_path / "c", split="train+restvl")


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
    annotations = write(tmp_path / "captions.txt", f"image,caption\n{lines}".encode())
    write(tmp_path / "images" / "1.jpg", picture(1))
    expected = (
        rf"holds all splits \({number:,} images\); name the images of 'test' with "
        rf"--split-file .*{looks}"
    )
    with pytest.raises(UserError, match=expected):
        convert_captions(
            dataset, tmp_path / "images", annotations, tmp_path / "out", skip_missing=True
        )
    (tmp_path / "list").write_text("1.jpg\n", encoding="utf-8")
    listed = str(tmp_path / "list")
    message = convert_captions(
        dataset, tmp_path / "images", annotations, tmp_path / "out", split_file=listed
    )
    assert f"left out: not in the split file {number - 1:,}" in message
    assert f"{dataset}'s test split is published with 1,000 images, this one has 1" in message


def test_a_whole_file_of_coco_is_not_karpathys_split(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(40_504)]
    captions = [{"image_id": i, "caption": "a dog"} for i in range(40_504)]
    content = json.dumps({"images": images, "annotations": captions})
    annotations = write(tmp_path / "captions_val2014.json", content.encode())
    with pytest.raises(
        UserError, match=r"40,504 images.*coco's test split has 5,000.*COCO's val2014 as a whole"
    ):
        convert_captions("coco", tmp_path, annotations, tmp_path / "out")
    write(tmp_path / "7.jpg", picture(7))
    convert_captions(
        "coco", tmp_path, annotations, tmp_path / "out", split="val2014", skip_missing=True
    )
    assert captions_in(tmp_path / "out") == {"7.jpg": ["a dog"]}


CSV_FILES = {  # name -> (lines, captions)
    "numbered": (
        'image_name,comment_number,comment\n1.jpg,0,"Two men, one dog"\n1.jpg,1,"Say ""hi"", '
        'twice"\n',
        ["Two men, one dog", 'Say "hi", twice'],
    ),
    "two columns": (
        'image,caption\n1.jpg,"Two men, one dog"\n1.jpg,A "big" dog\n1.jpg,plain\n',
        ["Two men, one dog", 'A "big" dog', "plain"],
    ),
    "without a header": ('1.jpg,"one, two"\n1.jpg,three\n', ["one, two", "three"]),
    "a line break in a caption": ('image,caption\n1.jpg,"one\ntwo"\n', ["one\ntwo"]),
    "not CSV": (
        'image,caption\n1.jpg,Two men, one dog\n1.jpg,"Stop" says the sign\n1.jpg,"quoted"\n',
        ["Two men, one dog", '"Stop" says the sign', '"quoted"'],
    ),
    "an open mark": ('image,caption\n1.jpg,"Stop\n1.jpg,go" says it\n', ['"Stop', 'go" says it']),
    "an open mark that another closes": (
        'image,caption\n1.jpg,"Stop\n1.jpg,go"\n',
        ['"Stop', 'go"'],
    ),
    "bars": (
        'image_name| comment_number| comment\n1.jpg| 0| Two "men", one dog\n1.jpg| 1 a dog\n',
        ['Two "men", one dog', "a dog"],
    ),
    "token": ('1.jpg#0\t"Two" men, one dog\n1.jpg#1\ta dog\n', ['"Two" men, one dog', "a dog"]),
    "carriage returns": ('image,caption\r\n1.jpg,"a, b"\r\n1.jpg,c\x85d\r\n', ["a, b", "c\x85d"]),
}


@pytest.mark.parametrize("name", CSV_FILES)
def test_marks_of_csv_are_no_part_of_a_caption(name: str, tmp_path: Path) -> None:
    lines, expected = CSV_FILES[name]
    annotations = write(tmp_path / "captions.txt", lines.encode())
    write(tmp_path / "1.jpg", picture(1))
    convert_captions("flickr30k", tmp_path, annotations, tmp_path / "out")
    assert captions_in(tmp_path / "out") == {"1.jpg": expected}


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


def test_all_of_flickr8k(tmp_path: Path) -> None:
    """The publisher's files: the captions of all images, one of them with an odd name, and a
    list.
    """
    lines = "1_a.jpg#0\tA child .\n2_b.jpg.1#0\tA dog .\n3_c.jpg#0\tA cat .\n"
    annotations = write(tmp_path / "Flickr8k.token.txt", lines.encode())
    listed = write(tmp_path / "Flickr_8k.testImages.txt", b"3_c.jpg\n")
    for i, name in enumerate(("1_a", "3_c")):
        write(tmp_path / "Flicker8k_Dataset" / f"{name}.jpg", picture(i))
    convert_captions("flickr8k", tmp_path, annotations, tmp_path / "out", split_file=str(listed))
    assert captions_in(tmp_path / "out") == {"3_c.jpg": ["A cat ."]}


ENCODINGS = {
    "utf-16": None,
    "utf-8-sig": None,
    "utf-16-le": None,
    "cp1252": "cp1252",
    "latin-1": "latin-1",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("dataset", "separator"), [("flickr30k", ","), ("pairs", ","), ("pairs", ";"), ("pairs", "\t")]
)
def test_annotations_in_other_encodings_and_separators(
    dataset: str, separator: str, encoding: str, tmp_path: Path
) -> None:
    text = "".join(
        f"{separator.join(row)}\r\n" for row in [("image", "caption"), ("1.jpg", "ein Bär, dort")]
    )
    text = text if separator != "," else text.replace("ein Bär, dort", '"ein Bär, dort"')
    annotations = write(tmp_path / "captions.txt", text.encode(encoding))
    write(tmp_path / "1.jpg", picture(1))
    named = ENCODINGS[encoding]
    if named:
        with pytest.raises(UserError, match=r"is not UTF-8 \(line 2\); name its encoding"):
            convert_captions(dataset, tmp_path, annotations, tmp_path / "out")
    convert_captions(dataset, tmp_path, annotations, tmp_path / "out", encoding=named)
    assert captions_in(tmp_path / "out") == {"1.jpg": ["ein Bär, dort"]}
