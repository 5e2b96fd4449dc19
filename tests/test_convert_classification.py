"""Classification sets to MDS: miniatures in each set's own layout, held against clip_benchmark's
reading of them.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniatures import (
    make_cars,
    make_cifar,
    make_class_folders,
    make_flowers,
    make_food,
    make_idx,
    make_pets,
    picture,
    quick,
    random,
    read_back,
    synsets,
    write,
)
from PIL import Image

from alignclip.conversion import class_names, classification, evaluation_sets
from alignclip.conversion.classification import (
    main,
)
from alignclip.errors import UserError
from alignclip.storage.staging import OutputFolder

REPOSITORY = Path(__file__).parents[1]


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def assert_as_clip_benchmark(folder: Path, name: str, root: Path, split: str = "test") -> None:
    """The set in ``folder`` has the images, labels, class names and templates that
    clip_benchmark evaluates with.
    """
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = builder.build_dataset(name, root=str(root), split=split, download=False)
    rows, classes, _ = read_back(folder)
    assert classes["classnames"] == list(theirs.classes)
    assert classes["templates"] == theirs.templates
    assert len(rows) == len(theirs)
    for row, (image, label) in zip(rows, theirs, strict=True):
        assert row["label"] == label
        np.testing.assert_array_equal(pixels(row["image"]), np.asarray(image.convert("RGB")))


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes any file of the right name for the published one."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            importlib.import_module(f"torchvision.datasets.{module}"),
            "check_integrity",
            lambda path, md5=None: Path(path).is_file(),
        )


# miniatures


# each named set


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar(kind: str, any_md5: None, tmp_path: Path) -> None:
    name, root = kind.lower(), make_cifar(tmp_path / "data", kind)
    quick(name, root, tmp_path / "test")
    assert_as_clip_benchmark(tmp_path / "test", name, root)
    rows, classes, described = read_back(tmp_path / "test")
    assert rows[0]["image"].startswith(b"\x89PNG")  # lossless
    assert rows[3]["key"] == "00003"
    assert len(classes["classnames"]) == len(rows) == int(kind[5:])
    assert described["split"] == "test"

    (folder,) = root.iterdir()
    quick(name, folder, tmp_path / "train", split="train")  # the folder itself is understood, too
    assert_as_clip_benchmark(tmp_path / "train", name, root, "train")


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize(
    ("split", "labels"), [("test", [5, 101, 76, 49]), ("val", [76, 0]), ("train", [76, 101, 1])]
)
def test_flowers(split: str, labels: list[int], tmp_path: Path) -> None:
    root = make_flowers(tmp_path / "data")
    quick("flowers", root, tmp_path / "out", split=split)
    assert_as_clip_benchmark(tmp_path / "out", "flowers", root, split)
    rows, classes, _ = read_back(tmp_path / "out")
    assert [row["label"] for row in rows] == labels
    assert classes["classnames"][76] == "passion flower"
    for row in rows:
        assert row["image"] == (root / row["key"]).read_bytes()


@pytest.mark.parametrize("split", ["test", "trainval"])
def test_pets(split: str, tmp_path: Path) -> None:
    root = make_pets(tmp_path / "data")
    if split == "trainval":  # the two archives unpacked elsewhere
        folder = root / "oxford-iiit-pet"
        folder.joinpath("annotations").rename(root / "annotations")
        folder.rename(root / "oxford")
    quick("pets", root, tmp_path / "out", split=split)
    rows, classes, _ = read_back(tmp_path / "out")
    assert len(classes["classnames"]) == 37
    assert classes["templates"] == ["a photo of a {c}, a type of pet."]
    if split == "test":
        assert_as_clip_benchmark(tmp_path / "out", "pets", root)
        assert all(row["image"] == (root / row["key"]).read_bytes() for row in rows)
    else:
        found = [classes["classnames"][row["label"]] for row in rows]
        assert found == ["Bombay", "Sphynx"]


@pytest.mark.parametrize(("name", "make"), [("food101", make_food), ("cars", make_cars)])
def test_food_and_cars(name: str, make: Any, tmp_path: Path) -> None:
    root = make(tmp_path / "data")
    quick(name, root, tmp_path / "out")
    assert_as_clip_benchmark(tmp_path / "out", name, root)
    rows, classes, _ = read_back(tmp_path / "out")
    for row in rows:
        assert row["image"] == (root / row["key"]).read_bytes()
    if name == "food101":
        assert [classes["classnames"][row["label"]] for row in rows] == [
            "waffles",
            "waffles",
            "apple pie",
            "baby back ribs",
        ]
    else:
        assert [row["label"] for row in rows] == [180, 102, 195, 0]


def test_training_splits_of_food_and_cars(tmp_path: Path) -> None:
    """What a linear probe is fitted to lies elsewhere than the test images."""
    from scipy.io import savemat

    food, cars = make_food(tmp_path / "data"), make_cars(tmp_path / "data") / "stanford_cars"
    names = {
        "waffles": ["waffles/1"],
        "apple_pie": ["apple_pie/2"],
        "baby_back_ribs": ["baby_back_ribs/9"],
    }
    for i, name in enumerate(name for names in names.values() for name in names):
        write(food / "food-101" / "images" / f"{name}.jpg", picture(20 + i))
    write(food / "food-101" / "meta" / "train.json", json.dumps(names).encode())
    fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    rows = np.array(
        [(39, np.uint8(7), "00002.jpg"), (39, np.uint8(196), "00001.jpg")], dtype=fields
    )
    savemat(cars / "devkit" / "cars_train_annos.mat", {"annotations": rows})
    for i in (1, 2):
        write(cars / "cars_train" / f"{i:05}.jpg", picture(30 + i))
    quick("food101", food, tmp_path / "food", split="train")
    found, classes, _ = read_back(tmp_path / "food")
    assert [classes["classnames"][row["label"]] for row in found] == [
        "waffles",
        "apple pie",
        "baby back ribs",
    ]
    assert [row["image"] for row in found] == [picture(20 + i) for i in range(3)]
    quick("cars", tmp_path / "data", tmp_path / "cars", split="train")
    found, _, _ = read_back(tmp_path / "cars")
    assert [(row["label"], row["image"]) for row in found] == [(6, picture(32)), (195, picture(31))]


@pytest.mark.parametrize(
    ("folder", "packed"), [("", True), ("fashion-mnist", True), ("FashionMNIST/raw", False)]
)
def test_fashion_mnist(folder: str, packed: bool, tmp_path: Path) -> None:
    root = tmp_path / "data"
    expected = {
        split: make_idx(root / folder, prefix, 12, packed)
        for split, prefix in (("train",) * 2, ("test", "t10k"))
    }
    for split, (images, labels) in expected.items():
        quick("fashion-mnist", root, tmp_path / split, split=split)
        rows, classes, _ = read_back(tmp_path / split)
        assert [row["label"] for row in rows] == labels.tolist()
        for row, image in zip(rows, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), image)
        assert classes["dataset"] == "fashion_mnist"
        assert classes["classnames"][9] == "Ankle boot"
        assert len(classes["templates"]) == 80  # ImageNet's: clip_benchmark has none for it


def test_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    make_class_folders(root / "val", synsets("1k"))
    quick("imagenet1k", root, tmp_path / "out")  # test: val
    assert "nothing to do" in quick("imagenet1k", root, tmp_path / "out", split="val")
    shutil.rmtree(root / "val" / ".cache")  # clip_benchmark takes it for a class
    # what it calls unverified is without the archives
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = builder.build_dataset("imagenet1k-unverified", root=str(root), split="test")
    rows, classes, described = read_back(tmp_path / "out")
    assert [(row["key"], row["label"]) for row in rows] == [
        (Path(file).relative_to(root / "val").as_posix(), label) for file, label in theirs.imgs
    ]
    assert [row["image"] for row in rows] == [picture(i) for i in range(1000)]
    assert (classes["classnames"], classes["templates"]) == (theirs.classes, theirs.templates)
    assert described["split"] == "val"

    shutil.rmtree(root / "val" / "n01484850")
    with pytest.raises(
        UserError, match=r"999 class folders instead of 1,000; the first one missing is n01484850"
    ):
        quick("imagenet1k", root, tmp_path / "other")
    (root / "val" / "n01484850").mkdir()
    with pytest.raises(UserError, match=r"n01484850 has no images"):
        quick("imagenet1k", root, tmp_path / "other")
    (root / "val" / "extra").mkdir()
    with pytest.raises(UserError, match=r"1,001 class folders, and 'extra' is none of the set's"):
        quick("imagenet1k", root, tmp_path / "other")


def test_imagenet_v2_folder_names_are_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    root = tmp_path / "ImageNetV2-matched-frequency"  # as clip_benchmark renames it
    make_class_folders(root, [str(i) for i in range(1000)], "jpeg")
    quick("imagenetv2", tmp_path, tmp_path / "out")
    rows, classes, _ = read_back(tmp_path / "out")
    assert [row["label"] for row in rows] == list(range(1000))
    assert [row["image"] for row in rows] == [picture(i) for i in range(1000)]
    assert rows[2]["key"] == "2/2_2.jpeg"

    monkeypatch.setattr(builder.imagenetv2, "V2_DATASET_SIZE", 1000)
    theirs = builder.build_dataset("imagenetv2", root=str(tmp_path), split="test")
    labels = {path.relative_to(root).as_posix(): int(path.parent.name) for path in theirs.fnames}
    assert {row["key"]: row["label"] for row in rows} == labels
    assert (classes["classnames"], classes["templates"]) == (theirs.classes, theirs.templates)

    root.rename(tmp_path / "imagenetv2-matched-frequency-format-val")
    shutil.rmtree(tmp_path / "imagenetv2-matched-frequency-format-val" / "10")
    with pytest.raises(
        UserError, match=r"999 class folders instead of 1,000; the first one missing is 10;"
    ):
        quick("imagenetv2", tmp_path, tmp_path / "other")


@pytest.mark.parametrize("letter", ["a", "r", "o"])
def test_imagenet_of_200_classes(letter: str, tmp_path: Path) -> None:
    """Labels and names are positions in the set's own 200 classes, not in the 1,000."""
    wnids = synsets(letter)
    assert len(wnids) == 200
    root = make_class_folders(tmp_path / f"imagenet-{letter}", wnids)
    quick(f"imagenet-{letter}", tmp_path, tmp_path / "out")
    shutil.rmtree(root / ".cache")  # clip_benchmark takes it for a class
    assert_as_clip_benchmark(tmp_path / "out", f"imagenet-{letter}", root)
    rows, classes, _ = read_back(tmp_path / "out")
    assert {row["label"] for row in rows} == set(range(200))
    assert len(classes["classnames"]) == 200

    shutil.rmtree(root / wnids[7])
    missing = "" if letter == "o" else f"; the first one missing is {wnids[7]}"
    with pytest.raises(UserError, match=f"199 class folders instead of 200{missing};"):
        quick(f"imagenet-{letter}", tmp_path, tmp_path / "other")


def test_one_200_class_set_is_not_taken_for_another(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "imagenet-r", synsets("a"))
    with pytest.raises(UserError, match="is none of the set's"):
        quick("imagenet-r", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["imagenet-sketch", "imagenet_sketch"])
def test_imagenet_sketch_by_both_names(name: str, tmp_path: Path) -> None:
    root = make_class_folders(tmp_path / "sketch", synsets("1k"))
    quick(name, tmp_path, tmp_path / "out", limit=50)
    rows, classes, described = read_back(tmp_path / "out")
    assert [row["label"] for row in rows] == list(range(0, 1000, 20))  # spread, not the first fifty
    assert all(row["image"] == (root / row["key"]).read_bytes() for row in rows)
    assert (len(classes["classnames"]), classes["classnames"][:2]) == (1000, ["tench", "goldfish"])
    assert (described["dataset"], described["limit"]) == ("imagenet-sketch", 50)


# folders of one's own


def make_birds(root: Path) -> Path:
    for i, name in enumerate(
        ["wren/1.jpg", "wren/more/2.PNG", "auk/1.webp", "auk/2.jpg", "auk/notes.txt"]
    ):
        formats = {".png": "PNG", ".webp": "WEBP"}
        write(root / name, picture(i, formats.get(Path(name).suffix.lower(), "JPEG")))
    (root / "kiwi").mkdir()
    return root


def test_folder(tmp_path: Path) -> None:
    root = make_birds(tmp_path / "birds")
    quick("folder", root, tmp_path / "out")
    rows, classes, described = read_back(tmp_path / "out")
    assert {row["key"]: row["label"] for row in rows} == {
        "auk/1.webp": 0,
        "auk/2.jpg": 0,
        "wren/1.jpg": 2,
        "wren/more/2.PNG": 2,
    }
    assert all(row["image"] == (root / row["key"]).read_bytes() for row in rows)
    assert classes["dataset"] == "folder"
    assert classes["classnames"] == [
        "auk",
        "kiwi",
        "wren",
    ]  # a class without images is one of the choices
    assert "a photo of a {c}." in classes["templates"]
    assert described["source"] == str(root)
    assert set(described["versions"]) >= {
        "alignclip",
        "mosaicml-streaming",
        "torchvision",
        "clip-benchmark",
    }


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
    root = make_birds(tmp_path / "birds")
    names = write(tmp_path / "names.json", json.dumps(classnames).encode())
    templates = write(tmp_path / "templates.json", b'["a drawing of the bird {c}"]')
    with pytest.raises(UserError, match=r"pip install 'alignclip\[evaluate\]'"):
        quick("folder", root, tmp_path / "out", classnames=str(names))
    quick("folder", root, tmp_path / "out", classnames=str(names), templates=str(templates))
    _, classes, described = read_back(tmp_path / "out")
    assert classes["classnames"] == ["great auk", "kiwi", "house wren"]
    assert classes["templates"] == ["a drawing of the bird {c}"]
    assert "clip-benchmark" not in described["versions"]


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    root = make_birds(tmp_path / "birds")
    write(root / "wren" / "0.jpg", b"not an image")
    big = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(big, "JPEG")
    write(root / "wren" / "3.jpg", big.getvalue()[:-900])
    message = quick("folder", root, tmp_path / "out")
    assert "  unreadable image    2\n" in message
    assert "wren/0.jpg, wren/3.jpg" in message
    rows, _, described = read_back(tmp_path / "out")
    assert len(rows) == 4
    assert described["skipped"] == {"unreadable image": 2}


# complete or absent


def test_a_complete_set_stays_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_birds(tmp_path / "birds"), tmp_path / "out"
    main(["folder", "--root", str(root), "--out", str(out)])
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {path.name for path in before} == {
        "index.json",
        "shard.00000.mds",
        "classes.json",
        "dataset.json",
    }
    main(["folder", "--root", str(root), "--out", str(out)])
    assert f"{out} holds folder (test) already, 4 samples: nothing to do" in capsys.readouterr().out
    names = write(tmp_path / "names.json", b'["a", "b", "c"]')
    for changes in (
        {"split": "train"},
        {"limit": 2},
        {"classnames": str(names)},
        {"dataset": "cifar10"},
        {"root": tmp_path},
    ):
        given = {"dataset": "folder", "root": root, **changes}
        with pytest.raises(UserError, match=r"already holds folder \(test") as caught:
            quick(given.pop("dataset"), given.pop("root"), out, **given)
        assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_birds(tmp_path / "birds")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_sets, "image_bytes", lambda sample: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick("folder", root, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    quick("folder", root, tmp_path / "out")
    assert len(read_back(tmp_path / "out")[0]) == 4


def test_a_set_of_another_kind_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out / "index.json", b"{}")
    with pytest.raises(UserError, match="another kind"):
        quick("folder", make_birds(tmp_path / "birds"), out)
    write(out / "dataset.json", b'{"encoder": null, "source": []}')  # convert/cc12m.py's
    with pytest.raises(UserError, match="another kind"):
        quick("folder", tmp_path / "birds", out)


def test_s3_and_back(s3: Any, tmp_path: Path) -> None:
    from streaming import StreamingDataset

    out = f"{s3.bucket()}/eval/fashion"
    images, labels = make_idx(tmp_path / "data", "t10k", 40, packed=True)
    quick("fashion_mnist", tmp_path / "data", out)
    assert sorted(OutputFolder(out).listing()) == [
        "classes.json",
        "dataset.json",
        "index.json",
        "shard.00000.mds",
    ]
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
    assert "nothing to do" in quick("fashion_mnist", tmp_path / "data", out)
    with pytest.raises(UserError, match="already holds"):
        quick("fashion_mnist", tmp_path / "data", out, split="train")


# bad input


def bad_inputs(folder: Path) -> list[tuple[list[str], str]]:
    birds = make_birds(folder / "birds")
    for name in ("train/a/1.jpg", "val/a/1.jpg"):
        write(folder / "splits" / name, picture(1))
    write(folder / "short.json", b'["auk"]')
    write(folder / "part.json", b'{"auk": "auk", "wrens": "wren", "kiwi": "kiwi"}')
    write(folder / "broken.json", b"[")
    write(folder / "plain.json", b'["a photo"]')
    write(folder / "cifar-10-batches-py" / "test_batch", b"truncated")
    for name in ("idx/t10k-images-idx3-ubyte.gz", "idx/t10k-labels-idx1-ubyte.gz"):
        write(folder / name, b"\x1f\x8bbroken")
    write(
        folder / "food-101" / "meta" / "test.json", b'{"apple_pie": ["apple_pie/1", "apple_pie/2"]}'
    )
    write(folder / "food-101" / "images" / "apple_pie" / "2.jpg", picture(1))
    write(folder / "text" / "a" / "a.txt", b"no images")
    write(folder / "undecodable" / "a" / "a.jpg", b"no image")
    own = ["folder", "--root", str(birds)]
    return [
        (["cifar11"], "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        (["flowers", "--split", "vall"], "flowers has no split 'vall'; did you mean 'val'?"),
        (["imagenetv2", "--split", "train"], "imagenetv2 has no split 'train'; valid: test"),
        (["cifar10"], "--root is missing"),
        (["cifar10", "--root", str(folder / "nowhere")], "nowhere does not exist"),
        (["cifar10", "--root", "s3://bucket/cifar"], "local folders"),
        (["cifar10", "--root", "s3:/bucket/cifar"], "did you mean 's3://bucket/cifar'?"),
        (["cifar10", "--root", str(folder / "broken.json")], "is a file, not a folder"),
        (["cifar10", "--root", str(birds)], "there is no folder 'cifar-10-batches-py' in --root"),
        (["cifar10", "--root", str(folder)], "not the published ones by their MD5"),
        (
            ["fashion_mnist", "--root", str(birds)],
            "there is no t10k-images-idx3-ubyte[.gz] in --root",
        ),
        (["fashion_mnist", "--root", str(folder / "idx")], "cannot read"),
        (["food101", "--root", str(folder)], "1 of 2 images are missing, the first is"),
        (["imagenet1k", "--root", str(folder / "text")], "'a' is none of the set's"),
        (["imagenet-o", "--root", str(folder / "text" / "a")], "0 class folders instead of 200"),
        (["imagenetv2", "--root", str(folder / "text")], "1 class folders instead of 1,000"),
        ([*own, "--limit", "0"], "--limit must be at least 1"),
        ([*own, "--out", "s3:/bucket"], "did you mean 's3://bucket'?"),
        ([*own, "--classnames", str(folder / "none.json")], "none.json does not exist"),
        ([*own, "--classnames", str(folder / "broken.json")], "is not JSON"),
        ([*own, "--classnames", str(folder / "short.json")], "has 1 names, the set has 3 classes"),
        (
            [*own, "--classnames", str(folder / "part.json")],
            "the first is 'wren'; did you mean 'wrens'?",
        ),
        (
            [*own, "--templates", str(folder / "plain.json")],
            "'a photo' has no place for the class name",
        ),
        ([*own, "--templates", str(folder / "part.json")], "must be a JSON list of strings"),
        (["folder", "--root", str(folder / "splits")], "are splits, not classes: give"),
        (["folder", "--root", str(folder / "text" / "a")], "has no sub-folders"),
        (["folder", "--root", str(folder / "text")], "there are no images"),
        (["folder", "--root", str(folder / "undecodable")], "none of the 1 images can be decoded"),
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


def test_a_set_that_needs_scipy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_cars(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"needs scipy.*: pip install 'alignclip\[evaluate\]'"):
        quick("cars", root, tmp_path / "out")


def test_mistakes_are_told_before_anything_large_is_imported(tmp_path: Path) -> None:
    script = REPOSITORY / "convert" / "classification.py"
    code = f"import runpy, sys; sys.argv = ['', 'cifar11', '--out', '{tmp_path}/out']\n"
    code += (
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit as end: "
        f"print(end.code)\n"
    )
    code += (
        "print(sorted({'torch', 'torchvision', 'streaming', 'scipy', 'timm', 'clip_benchmark'} "
        "& set(sys.modules)))"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["2", "[]"]
    assert "did you mean 'cifar10'?" in result.stderr
    assert time.monotonic() - start < 20  # 0.5 s on a machine with nothing else to do
