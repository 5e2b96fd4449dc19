"""Miniatures of published classification sets, each in its own layout, and what was made of
them.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignclip.conversion import class_names
from alignclip.conversion.classification import ClassificationOptions, convert

random = np.random.default_rng(0)


def picture(number: int, image_format: str = "JPEG") -> bytes:
    """A small file of which no other number has the same."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, number // 256, 99)).save(file, image_format)
    return file.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def quick(dataset: str, root: Path, out: Path | str, **changes: Any) -> str:
    places = {"root": str(root), "out": str(out)}
    return convert(ClassificationOptions(dataset=dataset, **places, progress=False, **changes))


def read_back(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The samples, ``classes.json`` and ``dataset.json`` of a set."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    rows = [dataset[i] for i in range(dataset.num_samples)]
    assert {tuple(sorted(row)) for row in rows} == {("image", "key", "label")}
    assert len({row["key"] for row in rows}) == len(rows)
    index = json.loads((folder / "index.json").read_text())
    assert all(shard["hashes"] == ["xxh64"] for shard in index["shards"])
    described = json.loads((folder / "dataset.json").read_text())
    assert described["samples"] == len(rows)
    return rows, json.loads((folder / "classes.json").read_text()), described


def make_cifar(root: Path, kind: str) -> Path:
    fine = kind == "CIFAR100"
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    number = 100 if fine else 10
    names = [f"kind_{i}" for i in range(number)]
    files = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in files:
        labels = random.permutation(number).tolist()
        data = random.integers(0, 256, (number, 3 * 32 * 32), dtype=np.uint8)
        batch = {"data": data, ("fine_labels" if fine else "labels"): labels}
        write(folder / file, pickle.dumps(batch))
    meta = {"fine_label_names" if fine else "label_names": names}
    write(folder / ("meta" if fine else "batches.meta"), pickle.dumps(meta))
    return root


def make_flowers(root: Path) -> Path:
    from scipy.io import savemat

    folder = root / "flowers-102"
    for i in range(1, 13):
        write(folder / "jpg" / f"image_{i:05}.jpg", picture(i))
    savemat(
        folder / "imagelabels.mat",
        {"labels": np.array([[77, 77, 102, 1, 2, 3, 50, 51, 52, 77, 5, 6]])},
    )
    savemat(
        folder / "setid.mat", {"trnid": [[1, 3, 5]], "valid": [[2, 4]], "tstid": [[12, 3, 10, 7]]}
    )
    return root


def make_food(root: Path) -> Path:
    # the order of the classes in the file is not that of the labels
    meta = {
        "waffles": ["waffles/7", "waffles/12"],
        "apple_pie": ["apple_pie/3"],
        "baby_back_ribs": ["baby_back_ribs/4"],
    }
    for i, name in enumerate(name for names in meta.values() for name in names):
        write(root / "food-101" / "images" / f"{name}.jpg", picture(i))
    write(root / "food-101" / "meta" / "test.json", json.dumps(meta).encode())
    return root


def make_cars(root: Path) -> Path:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([f"Maker Model{i} 2012" for i in range(196)], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    labels = [181, 103, 196, 1]  # from 1
    rows = [(39, np.uint8(label), f"{i:05}.jpg") for i, label in enumerate(labels, 1)]
    savemat(
        folder / "cars_test_annos_withlabels.mat", {"annotations": np.array(rows, dtype=fields)}
    )
    for i in range(1, 5):
        write(folder / "cars_test" / f"{i:05}.jpg", picture(i))
    return root


def make_idx(root: Path, prefix: str, number: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    images = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
    labels = (np.arange(number) % 10).astype(np.uint8)
    for name, data in (
        (
            f"{prefix}-images-idx3-ubyte",
            struct.pack(">IIII", 2051, number, 28, 28) + images.tobytes(),
        ),
        (f"{prefix}-labels-idx1-ubyte", struct.pack(">II", 2049, number) + labels.tobytes()),
    ):
        write(root / f"{name}.gz", gzip.compress(data)) if packed else write(root / name, data)
    return images, labels


def synsets(name: str) -> list[str]:
    """ImageNet's 1,000 WordNet ids, or the 200 of a set, from clip_benchmark's source."""
    source = (class_names.benchmark_folder() / "builder.py").read_text()  # type: ignore[operator]
    variable = {"1k": "all_imagenet_wordnet_ids"}.get(name, f"imagenet_{name}_wnids")
    text = source.split(f"{variable} = ", 1)[1].split("\n", 1)[0]
    return sorted(text.strip("[]{}").replace("'", "").split(", "))


def make_class_folders(root: Path, names: list[str], suffix: str = "JPEG") -> Path:
    for i, name in enumerate(names):
        write(root / name / f"{name}_{i}.{suffix}", picture(i))
    write(root / "README.txt", b"not an image")
    (root / ".cache").mkdir()
    return root


def make_pets(root: Path) -> Path:
    """All 37 classes, as the publisher names their images and numbers them.

    Some images more than once.
    """
    names = class_names.benchmark_lists("en_classnames.json")["pets"]
    rows = [(f"{name.replace(' ', '_')}_{i}", i) for i, name in enumerate(names, 1)]
    rows = [*rows[5:], *rows[:5], ("Bombay_201", 8)]  # in another order than the classes'
    folder = root / "oxford-iiit-pet"
    for i, (name, _) in enumerate(rows):
        write(folder / "images" / f"{name}.jpg", picture(i))
    lines = "".join(f"{name} {label} 1 1\n" for name, label in rows)
    write(folder / "annotations" / "test.txt", lines.encode())
    write(folder / "annotations" / "trainval.txt", b"Bombay_8 8 1 2\nSphynx_34 34 1 12\n")
    return root
