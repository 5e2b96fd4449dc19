"""Classification sets to MDS: miniatures in each set's layout, as clip_benchmark reads them."""

from __future__ import annotations

import csv
import importlib
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniatures import (
    Made,
    assert_told_in_one_line,
    draw,
    labelled,
    make_cars,
    make_cifar,
    make_class_folders,
    make_flowers,
    make_food,
    make_idx,
    make_pets,
    picture,
    pictures,
    quick,
    random,
    refused,
    save_mat,
    structs,
    synsets,
    write,
    write_idx,
)
from PIL import Image

from alignclip.conversion import class_names, classification, evaluation_sets
from alignclip.conversion.classification import main
from alignclip.storage.staging import OutputFolder


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def benchmark(name: str, root: Path, split: str = "test") -> Any:
    """A set as clip_benchmark reads it."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    return builder.build_dataset(name, root=str(root), split=split, download=False)


def assert_words(made: Made, theirs: Any) -> None:
    assert made.classes["classnames"] == list(theirs.classes)
    assert made.classes["templates"] == theirs.templates


def assert_as_clip_benchmark(made: Made, name: str, root: Path, split: str = "test") -> None:
    """A set has clip_benchmark's images, labels, class names and templates."""
    theirs = benchmark(name, root, split)
    assert_words(made, theirs)
    assert len(made.rows) == len(theirs)
    for row, (image, label) in zip(made.rows, theirs, strict=True):
        assert row["label"] == label
        np.testing.assert_array_equal(pixels(row["image"]), np.asarray(image.convert("RGB")))


def assert_files(made: Made, root: Path) -> None:
    """The images are the files that the keys name."""
    assert made.images == [(root / key).read_bytes() for key in made.keys]


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes any file of the right name for the published one."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            importlib.import_module(f"torchvision.datasets.{module}"),
            "check_integrity",
            lambda path, md5=None: Path(path).is_file(),
        )


# each named set, where its publisher and where other people have it


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar(kind: str, any_md5: None, tmp_path: Path) -> None:
    name, root = kind.lower(), make_cifar(tmp_path / "data", kind)
    made = labelled(name, root, tmp_path / "test")
    assert_as_clip_benchmark(made, name, root)
    assert made.images[0].startswith(b"\x89PNG")  # lossless
    assert made.keys[3] == "00003"
    assert len(made.classes["classnames"]) == len(made.rows) == int(kind[5:])
    assert made.described["split"] == "test"
    (folder,) = root.iterdir()  # the folder itself is understood, too
    made = labelled(name, folder, tmp_path / "train", split="train")
    assert_as_clip_benchmark(made, name, root, "train")


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize(
    ("split", "labels"), [("test", [5, 101, 76, 49]), ("val", [76, 0]), ("train", [76, 101, 1])]
)
def test_flowers(split: str, labels: list[int], tmp_path: Path) -> None:
    root = make_flowers(tmp_path / "data")
    made = labelled("flowers", root, tmp_path / "out", split=split)
    assert_as_clip_benchmark(made, "flowers", root, split)
    assert made.labels == labels
    assert made.classes["classnames"][76] == "passion flower"
    assert_files(made, root)


def test_pets(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "data")
    made = labelled("pets", root, tmp_path / "out")
    assert_as_clip_benchmark(made, "pets", root)
    assert_files(made, root)
    assert len(made.classes["classnames"]) == 37
    assert made.classes["templates"] == ["a photo of a {c}, a type of pet."]
    made = labelled("pets", root, tmp_path / "train", split="trainval")
    assert made.names == ["Bombay", "Sphynx"]


def test_food(tmp_path: Path) -> None:
    """What a linear probe is fitted to lies elsewhere than the test images."""
    root = make_food(tmp_path / "data")
    made = labelled("food101", root, tmp_path / "out")
    assert_as_clip_benchmark(made, "food101", root)
    assert_files(made, root)
    assert made.names == ["waffles", "waffles", "apple pie", "baby back ribs"]
    make_food(root, "train", first=20)
    made = labelled("food101", root, tmp_path / "train", split="train")
    assert made.names == ["waffles", "apple pie", "baby back ribs"]
    assert made.images == pictures(20, 21, 22)


def test_cars(tmp_path: Path) -> None:
    root = make_cars(tmp_path / "data")
    made = labelled("cars", root, tmp_path / "out")
    assert_as_clip_benchmark(made, "cars", root)
    assert_files(made, root)
    assert made.labels == [180, 102, 195, 0]
    cars = root / "stanford_cars"
    rows = structs("bbox_x1 class fname", (39, 7, "00002.jpg"), (39, 196, "00001.jpg"))
    save_mat(cars / "devkit" / "cars_train_annos.mat", annotations=rows)
    draw(cars / "cars_train", "00001.jpg", "00002.jpg", first=31)
    made = labelled("cars", root, tmp_path / "train", split="train")
    assert (made.labels, made.images) == ([6, 195], pictures(32, 31))


MAKERS = {
    "cifar10": partial(make_cifar, kind="CIFAR10"),
    "cifar100": partial(make_cifar, kind="CIFAR100"),
    "flowers": make_flowers,
    "pets": make_pets,
    "food101": make_food,
    "cars": make_cars,
}
CARS_LABELS = "stanford_cars/cars_test_annos_withlabels.mat"
# set, and published place -> where people have what lies there
ELSEWHERE = [
    ("cifar10", {"cifar-10-batches-py": "cifar-10-python/cifar10"}),
    ("cifar100", {"cifar-100-python": "data"}),
    ("flowers", {"flowers-102/jpg": "Oxford/102flowers", "flowers-102": "Oxford/lists"}),
    (
        "pets",
        {"oxford-iiit-pet/annotations": "annotations", "oxford-iiit-pet/images": "oxford/images"},
    ),
    ("food101", {"food-101/images": "food/images", "food-101/meta": "food/meta/meta"}),
    (
        "cars",
        {
            "stanford_cars/cars_test": "cars_test/cars_test",
            "stanford_cars/devkit": "car_devkit/devkit",
            CARS_LABELS: "cars_test_annos_withlabels.mat",
        },
    ),
    (
        "cars",
        {
            "stanford_cars/cars_test": "cars_test",
            "stanford_cars/devkit/cars_meta.mat": "cars_meta.mat",
            CARS_LABELS: "cars_test_annos_withlabels.mat",
        },
    ),
    (
        "cars",
        {
            "stanford_cars/cars_test": "images/cars_test",
            "stanford_cars/devkit": "devkit",
            CARS_LABELS: "cars_test_annos_withlabels (1).mat",
        },
    ),
]


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize(("name", "places"), ELSEWHERE)
def test_a_set_is_found_where_people_have_it(
    name: str, places: dict[str, str], tmp_path: Path
) -> None:
    root, other = MAKERS[name](tmp_path / "data"), tmp_path / "downloads"
    expected = labelled(name, root, tmp_path / "out")
    for published, place in places.items():
        (other / place).parent.mkdir(parents=True, exist_ok=True)
        (root / published).rename(other / place)
    made = labelled(name, other, tmp_path / "again")
    assert made.rows == expected.rows
    assert made.classes == expected.classes


def test_cars_without_labels_are_told_so(tmp_path: Path) -> None:
    root = make_cars(tmp_path) / "stanford_cars"
    labelled, unlabelled = (
        root / "cars_test_annos_withlabels.mat",
        root / "devkit" / "cars_test_annos.mat",
    )
    labelled.rename(unlabelled)
    said = "cars_test_annos.mat has no labels .*put cars_test_annos_withlabels.mat"
    assert "MD5" not in refused(said, quick, "cars", tmp_path, tmp_path / "out")
    unlabelled.unlink()
    said = "there is no file cars_test_annos_withlabels"
    assert "MD5" not in refused(said, quick, "cars", tmp_path, tmp_path / "out")


def test_cars_in_one_folder(tmp_path: Path) -> None:
    """``car_ims.tgz`` and ``cars_annos.mat``, which say of each image whether it is for testing."""
    files = [f"car_ims/{i:06}.jpg" for i in range(1, 4)]
    rows = structs("relative_im_path class test", *zip(files, (3, 1, 2), (1, 0, 1), strict=True))
    names = np.array(["Audi A", "BMW B", "Kia C"], dtype=object)
    save_mat(tmp_path / "cars" / "cars_annos.mat", annotations=rows, class_names=names)
    draw(tmp_path / "cars", *files, first=1)
    made = labelled("cars", tmp_path, tmp_path / "test")
    assert (made.labels, made.images) == ([2, 1], pictures(1, 3))
    assert made.classes["classnames"] == list(names)
    assert labelled("cars", tmp_path, tmp_path / "train", split="train").labels == [0]


@pytest.mark.parametrize(
    ("folder", "packed"), [("", True), ("fashion-mnist", True), ("FashionMNIST/raw", False)]
)
def test_fashion_mnist(folder: str, packed: bool, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = make_idx(root / folder, prefix, 12, packed)
        if not packed:  # a mirror's names
            for file in (root / folder).glob(f"{prefix}-*"):
                file.rename(file.with_name(file.name.replace("-idx", ".idx")))
        made = labelled("fashion-mnist", root, tmp_path / split, split=split)
        assert made.labels == labels.tolist()
        for ours, image in zip(made.images, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(ours))), image)
        assert made.classes["dataset"] == "fashion_mnist"
        assert made.classes["classnames"][9] == "Ankle boot"
        assert len(made.classes["templates"]) == 80  # ImageNet's: clip_benchmark has none for it


def test_mnist_is_not_fashion_mnist(tmp_path: Path) -> None:
    """MNIST's files have the same names and sizes; its classes differ in size."""
    labels = np.array([0] * 980 + [1] * 1135 + [i % 8 + 2 for i in range(7885)], dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((10_000, 1, 1), np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    said = "1,000 images of each class; here are 980 to 1,135, as in MNIST"
    refused(said, quick, "fashion_mnist", tmp_path, tmp_path / "out")


def test_imagenet(tmp_path: Path) -> None:
    root, other = tmp_path / "imagenet", tmp_path / "other"
    make_class_folders(root / "val", synsets("1k"))
    made = labelled("imagenet1k", root, tmp_path / "out")  # test: val
    assert "nothing to do" in quick("imagenet1k", root, tmp_path / "out", split="val")
    shutil.rmtree(root / "val" / ".cache")  # clip_benchmark takes it for a class
    # what it calls unverified is without the archives
    theirs = benchmark("imagenet1k-unverified", root)
    assert list(zip(made.keys, made.labels, strict=True)) == [
        (Path(file).relative_to(root / "val").as_posix(), label) for file, label in theirs.imgs
    ]
    assert made.images == pictures(*range(1000))
    assert_words(made, theirs)
    assert made.described["split"] == "val"

    shutil.rmtree(root / "val" / "n01484850")
    said = "999 class folders instead of 1,000; the first one missing is n01484850"
    refused(said, quick, "imagenet1k", root, other)
    (root / "val" / "n01484850").mkdir()
    refused(r"n01484850 has no images", quick, "imagenet1k", root, other)
    (root / "val" / "extra").mkdir()
    said = "1,001 class folders, and 'extra' is none of the set's"
    refused(said, quick, "imagenet1k", root, other)


def test_imagenet_without_class_folders(tmp_path: Path) -> None:
    """The archive and Kaggle's copy are flat; Kaggle's has the labels in a table."""
    root, wnids = tmp_path / "ILSVRC", synsets("1k")
    # a folder of annotations has the same name, and comes first
    xml = root / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml"
    write(xml, b"<annotation/>")
    folder = root / "Data" / "CLS-LOC" / "val"
    draw(folder, *(f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 4)), first=1)
    said = "CLS-LOC/val has 3 images and no class folders: nothing says which class"
    refused(said, quick, "imagenet1k", root, tmp_path / "out")
    rows = [
        (f"ILSVRC2012_val_{i:08}", f"{wnids[i * 7]} 85 1 499 272 {wnids[1]} 3 4 5 6 ")
        for i in (3, 1, 2)
    ]
    with (root / "LOC_val_solution.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    made = labelled("imagenet1k", root, tmp_path / "out")
    assert (made.labels, made.images) == ([7, 14, 21], pictures(1, 2, 3))
    assert len(made.classes["classnames"]) == 1000
    assert "imagenet1k's val split is published with 50,000 images, this one has 3" in made.message
    write(folder / "ILSVRC2012_val_00000009.JPEG", picture(9))
    said = "has no label of 1 images, the first is ILSVRC2012_val_00000009.JPEG"
    refused(said, quick, "imagenet1k", root, tmp_path / "other")


def test_imagenet_v2_folder_names_are_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    root = tmp_path / "ImageNetV2-matched-frequency"  # as clip_benchmark renames it
    make_class_folders(root, [str(i) for i in range(1000)], "jpeg")
    made = labelled("imagenetv2", tmp_path, tmp_path / "out")
    assert (made.labels, made.images) == (list(range(1000)), pictures(*range(1000)))
    assert made.keys[2] == "2/2_2.jpeg"

    monkeypatch.setattr(builder.imagenetv2, "V2_DATASET_SIZE", 1000)
    theirs = benchmark("imagenetv2", tmp_path)
    labels = {path.relative_to(root).as_posix(): int(path.parent.name) for path in theirs.fnames}
    assert dict(zip(made.keys, made.labels, strict=True)) == labels
    assert_words(made, theirs)

    other = root.rename(tmp_path / "imagenetv2-top-images-format-val")
    made = labelled("imagenetv2", other, tmp_path / "top")
    note = f"{other.name} is not the matched-frequency variant, which papers report"
    assert note in made.message
    assert note in made.described["notes"]
    folder = other.rename(tmp_path / "imagenetv2-matched-frequency-format-val")
    shutil.rmtree(folder / "10")
    said = "999 class folders instead of 1,000; the first one missing is 10;"
    refused(said, quick, "imagenetv2", tmp_path, tmp_path / "other")


@pytest.mark.parametrize("letter", ["a", "r", "o"])
def test_imagenet_of_200_classes(letter: str, tmp_path: Path) -> None:
    """Labels and names are positions in the set's own 200 classes, not in the 1,000."""
    wnids, name, data = synsets(letter), f"imagenet-{letter}", tmp_path / "data"
    assert len(wnids) == 200
    root = make_class_folders(data / name / name, wnids)  # nested as Kaggle has it
    made = labelled(name, data, tmp_path / "out")
    shutil.rmtree(root / ".cache")  # clip_benchmark takes it for a class
    assert_as_clip_benchmark(made, name, root)
    assert set(made.labels) == set(range(200))
    assert len(made.classes["classnames"]) == 200

    shutil.rmtree(root / wnids[7])
    missing = "" if letter == "o" else f"; the first one missing is {wnids[7]}"
    said = f"199 class folders instead of 200{missing};"
    refused(said, quick, name, data, tmp_path / "other")


@pytest.mark.parametrize("name", ["imagenet-sketch", "imagenet_sketch"])
def test_imagenet_sketch_by_both_names(name: str, tmp_path: Path) -> None:
    root = make_class_folders(tmp_path / "sketch", synsets("1k"))
    made = labelled(name, tmp_path, tmp_path / "out", limit=50)
    assert made.labels == list(range(0, 1000, 20))  # spread, not the first fifty
    assert_files(made, root)
    names = made.classes["classnames"]
    assert (len(names), names[:2]) == (1000, ["tench", "goldfish"])
    assert (made.described["dataset"], made.described["limit"]) == ("imagenet-sketch", 50)


def test_a_number_of_images_that_is_not_the_published_one_is_said(
    tmp_path: Path, any_md5: None
) -> None:
    made = labelled("flowers", make_flowers(tmp_path / "data"), tmp_path / "out")
    note = "flowers's test split is published with 6,149 images, this one has 4"
    assert note in made.message
    assert made.described["notes"] == [note]
    # a part of the set was asked for: the set itself is compared
    assert note in quick("flowers", tmp_path / "data", tmp_path / "part", limit=2)


# folders of one's own


def make_birds(root: Path) -> Path:
    formats = {".png": "PNG", ".webp": "WEBP"}
    for i, name in enumerate(
        ["wren/1.jpg", "wren/more/2.PNG", "auk/1.webp", "auk/2.jpg", "auk/notes.txt"]
    ):
        write(root / name, picture(i, formats.get(Path(name).suffix.lower(), "JPEG")))
    (root / "kiwi").mkdir()
    return root


def test_folder(tmp_path: Path) -> None:
    root = make_birds(tmp_path / "birds")
    made = labelled("folder", root, tmp_path / "out")
    labels = {"auk/1.webp": 0, "auk/2.jpg": 0, "wren/1.jpg": 2, "wren/more/2.PNG": 2}
    assert dict(zip(made.keys, made.labels, strict=True)) == labels
    assert_files(made, root)
    assert made.classes["dataset"] == "folder"
    # a class without images is one of the choices
    assert made.classes["classnames"] == ["auk", "kiwi", "wren"]
    assert "a photo of a {c}." in made.classes["templates"]
    assert made.described["source"] == str(root)
    versions = {"alignclip", "mosaicml-streaming", "torchvision", "clip-benchmark"}
    assert made.described["versions"].keys() >= versions


@pytest.mark.parametrize(
    "classnames",
    [
        ["great auk", "kiwi", "house wren"],
        {"wren": "house wren", "auk": "great auk", "kiwi": "kiwi"},
    ],
)
def test_names_and_templates_of_ones_own_need_no_clip_benchmark(
    classnames: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (class_names, classification):
        monkeypatch.setattr(module, "benchmark_folder", lambda: None)
    given = ("folder", make_birds(tmp_path / "birds"), tmp_path / "out")
    names = str(write(tmp_path / "names.json", json.dumps(classnames)))
    templates = str(write(tmp_path / "templates.json", b'["a drawing of the bird {c}"]'))
    refused(r"pip install 'alignclip\[evaluate\]'", quick, *given, classnames=names)
    made = labelled(*given, classnames=names, templates=templates)
    assert made.classes["classnames"] == ["great auk", "kiwi", "house wren"]
    assert made.classes["templates"] == ["a drawing of the bird {c}"]
    assert "clip-benchmark" not in made.described["versions"]


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    root = make_birds(tmp_path / "birds")
    write(root / "wren" / "0.jpg", b"not an image")
    big = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(big, "JPEG")
    write(root / "wren" / "3.jpg", big.getvalue()[:-900])
    made = labelled("folder", root, tmp_path / "out")
    assert "  unreadable image    2\n" in made.message
    assert "wren/0.jpg, wren/3.jpg" in made.message
    assert len(made.rows) == 4
    assert made.described["skipped"] == {"unreadable image": 2}


# complete or absent


def test_a_complete_set_stays_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_birds(tmp_path / "birds"), tmp_path / "out"
    arguments = ["folder", "--root", str(root), "--out", str(out)]
    main(arguments)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    files = {"index.json", "shard.00000.mds", "classes.json", "dataset.json"}
    assert {path.name for path in before} == files
    main(arguments)
    assert f"{out} holds folder (test) already, 4 samples: nothing to do" in capsys.readouterr().out
    names = write(tmp_path / "names.json", b'["a", "b", "c"]')
    for dataset, place, changes in (
        ("folder", root, {"split": "train"}),
        ("folder", root, {"limit": 2}),
        ("folder", root, {"classnames": str(names)}),
        ("cifar10", root, {}),
        ("folder", tmp_path, {}),
    ):
        said = r"already holds folder \(test"
        assert "\n" not in refused(said, quick, dataset, place, out, **changes)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_birds(tmp_path / "birds")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_sets, "image_bytes", lambda sample: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick("folder", root, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert len(labelled("folder", root, tmp_path / "out").rows) == 4


def test_a_set_of_another_kind_is_refused(tmp_path: Path) -> None:
    root, out = make_birds(tmp_path / "birds"), tmp_path / "out"
    write(out / "index.json", b"{}")
    refused("another kind", quick, "folder", root, out)
    write(out / "dataset.json", b'{"encoder": null, "source": []}')  # convert/cc12m.py's
    refused("another kind", quick, "folder", root, out)


def test_s3_and_back(s3: Any, tmp_path: Path) -> None:
    from streaming import StreamingDataset

    out, data = f"{s3.bucket()}/eval/fashion", tmp_path / "data"
    images, labels = make_idx(data, "t10k", 40, packed=True)
    quick("fashion_mnist", data, out)
    files = {"classes.json", "dataset.json", "index.json", "shard.00000.mds"}
    assert OutputFolder(out).listing() == files
    dataset = StreamingDataset(
        remote=out, local=str(tmp_path / "cache"), batch_size=1, validate_hash="xxh64"
    )
    for i in range(40):
        row = dataset[i]
        assert row["label"] == labels[int(row["key"])]
        np.testing.assert_array_equal(pixels(row["image"])[..., 0], images[int(row["key"])])
    classes, described = OutputFolder(out).read_json(["classes.json", "dataset.json"])
    assert classes["classnames"][3] == "Dress"
    assert described["samples"] == 40
    assert "nothing to do" in quick("fashion_mnist", data, out)
    refused("already holds", quick, "fashion_mnist", data, out, split="train")


# bad input


BAD_FILES = {
    "splits/train/a/1.jpg": picture(1),
    "splits/val/a/1.jpg": picture(1),
    "short.json": b'["auk"]',
    "part.json": b'{"auk": "auk", "wrens": "wren", "kiwi": "kiwi"}',
    "broken.json": b"[",
    "plain.json": b'["a photo"]',
    "cifar-10-batches-py/test_batch": b"truncated",
    "idx/t10k-images-idx3-ubyte.gz": b"\x1f\x8bbroken",
    "idx/t10k-labels-idx1-ubyte.gz": b"\x1f\x8bbroken",
    "plain/t10k-images-idx3-ubyte": b"no numbers",
    "plain/t10k-labels-idx1-ubyte": b"no numbers",
    "flat/t10k-images-idx3-ubyte": b"\0\0\x08\x01\0\0\0\x01\0",
    "flat/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x01\0",
    "food-101/meta/test.json": b'{"apple_pie": ["apple_pie/1", "apple_pie/2"]}',
    "food-101/images/apple_pie/2.jpg": picture(1),
    "text/a/a.txt": b"no images",
    "undecodable/a/a.jpg": b"no image",
}
# the command's arguments, where @ is the folder of these files, and a part of the line
BAD_INPUTS = [
    ("cifar11", "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
    ("flowers --split vall", "flowers has no split 'vall'; did you mean 'val'?"),
    ("imagenetv2 --split train", "imagenetv2 has no split 'train'; valid: test"),
    ("cifar10", "--root is missing"),
    ("cifar10 --root @/nowhere", "nowhere does not exist"),
    ("cifar10 --root s3://bucket/cifar", "local folders"),
    ("cifar10 --root s3:/bucket/cifar", "did you mean 's3://bucket/cifar'?"),
    ("cifar10 --root @/broken.json", "is a file, not a folder"),
    ("cifar10 --root @/birds", "there is no folder 'cifar-10-batches-py' in --root"),
    ("cifar10 --root @", "not the published ones by their MD5"),
    ("fashion_mnist --root @/birds", "there is no t10k-images-idx3-ubyte[.gz] in --root"),
    ("fashion_mnist --root @/idx", "cannot read"),
    ("fashion_mnist --root @/plain", "t10k-images-idx3-ubyte is no IDX file"),
    ("fashion_mnist --root @/flat", "t10k-images-idx3-ubyte is no IDX file of 3 axes"),
    ("food101 --root @", "1 of 2 images are missing, the first is"),
    ("imagenet1k --root @/text", "'a' is none of the set's"),
    ("imagenet-o --root @/text/a", "0 class folders instead of 200"),
    ("imagenetv2 --root @/text", "1 class folders instead of 1,000"),
    ("folder --root @/birds --limit 0", "--limit must be at least 1"),
    ("folder --root @/birds --out s3:/bucket", "did you mean 's3://bucket'?"),
    ("folder --root @/birds --classnames @/none.json", "none.json does not exist"),
    ("folder --root @/birds --classnames @/broken.json", "is not JSON"),
    ("folder --root @/birds --classnames @/short.json", "has 1 names, the set has 3 classes"),
    (
        "folder --root @/birds --classnames @/part.json",
        "the first is 'wren'; did you mean 'wrens'?",
    ),
    (
        "folder --root @/birds --templates @/plain.json",
        "'a photo' has no place for the class name",
    ),
    ("folder --root @/birds --templates @/part.json", "must be a JSON list of strings"),
    ("folder --root @/splits", "are splits, not classes: give"),
    ("folder --root @/text/a", "has no sub-folders"),
    ("folder --root @/text", "there are no images"),
    ("folder --root @/undecodable", "none of the 1 images can be decoded"),
]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_birds(tmp_path / "birds")
    for name, content in BAD_FILES.items():
        write(tmp_path / name, content)
    assert_told_in_one_line(main, BAD_INPUTS, tmp_path, capsys)


def test_a_set_that_needs_scipy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_cars(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    said = r"needs scipy.*: pip install 'alignclip\[evaluate\]'"
    refused(said, quick, "cars", root, tmp_path / "out")
