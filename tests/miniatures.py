"""Miniatures of published evaluation sets, and what the converters make of them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignclip.conversion import class_names, classification, retrieval
from alignclip.errors import UserError

random = np.random.default_rng(0)


def picture(number: int, image_format: str = "JPEG") -> bytes:
    """A small file of which no other number has the same."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, number // 256, 99)).save(file, image_format)
    return file.getvalue()


def pictures(*numbers: int) -> list[bytes]:
    return [picture(number) for number in numbers]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def draw(folder: Path, *names: str, first: int = 0) -> None:
    """Write pictures of these names, ``picture(first)`` and so on."""
    for number, name in enumerate(names, first):
        write(folder / name, picture(number))


# what is made of them


def quick(dataset: str, root: Path, out: Path | str, **changes: Any) -> str:
    """Convert a classification set, and return the summary."""
    given = {"dataset": dataset, "root": str(root), "out": str(out), "progress": False}
    return classification.convert_classification(
        classification.ClassificationOptions(**given, **changes)
    )


class Made:
    """A set that a converter has made.

    Attributes:
        message: the summary.
        rows: samples.
        classes: ``classes.json``, of a classification set.
        described: ``dataset.json``.
    """

    def __init__(self, folder: Path, message: str = "") -> None:
        from streaming import LocalDataset

        def read(name: str) -> dict[str, Any]:
            return json.loads((folder / name).read_text())  # type: ignore[no-any-return]

        dataset = LocalDataset(str(folder))
        self.message = message
        self.rows = [dataset[i] for i in range(dataset.num_samples)]
        self.classes = read("classes.json") if (folder / "classes.json").exists() else {}
        self.described = read("dataset.json")
        target = "label" if self.classes else "caption"
        assert all(row.keys() == {"key", "image", target} for row in self.rows)
        assert len(set(self.keys)) == len(self.rows) == self.described["samples"]
        assert all(shard["hashes"] == ["xxh64"] for shard in read("index.json")["shards"])

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]

    @property
    def keys(self) -> list[str]:
        return self.column("key")

    @property
    def images(self) -> list[bytes]:
        return self.column("image")

    @property
    def labels(self) -> list[int]:
        return self.column("label")

    @property
    def names(self) -> list[str]:
        """The class name of each sample."""
        return [self.classes["classnames"][label] for label in self.labels]

    @property
    def captions(self) -> dict[str, list[str]]:
        """The captions of each image."""
        return dict(zip(self.keys, self.column("caption"), strict=True))


def labelled(dataset: str, root: Path, out: Path, **changes: Any) -> Made:
    """Convert a classification set."""
    return Made(out, quick(dataset, root, out, **changes))


def captioned(dataset: str, images: Path, annotations: Path, out: Path, **changes: Any) -> Made:
    """Convert a retrieval set."""
    places = {"images": str(images), "annotations": str(annotations), "out": str(out)}
    options = retrieval.RetrievalOptions(dataset=dataset, **places, progress=False, **changes)
    return Made(out, retrieval.convert_retrieval(options))


def refused(match: str, convert: Callable[..., object], *arguments: Any, **changes: Any) -> str:
    """Convert what is refused with such a message; return the message."""
    with pytest.raises(UserError, match=match) as caught:
        convert(*arguments, **changes)
    return str(caught.value)


def assert_told_in_one_line(
    main: Callable[[Sequence[str]], None],
    table: Sequence[tuple[str, str]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command ends with one line for each row of the table: arguments, and a part of the line.

    ``@`` in the arguments stands for the folder.
    """
    for command, message in table:
        arguments = command.replace("@", str(folder)).split()
        if "--out" not in arguments:
            arguments += ["--out", str(folder / "out")]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2, command
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: "), command
        assert message in error
    assert not (folder / "out" / "index.json").exists()


# classification sets


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


def save_mat(path: Path, **entries: Any) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, entries)


def structs(names: str, *rows: tuple[Any, ...]) -> np.ndarray:
    """MATLAB's array of structs, whose numbers are bytes, as the publishers' are."""
    values = [tuple(np.uint8(one) if isinstance(one, int) else one for one in row) for row in rows]
    return np.array(values, dtype=[(name, "O") for name in names.split()])


def make_flowers(root: Path) -> Path:
    folder = root / "flowers-102"
    draw(folder / "jpg", *(f"image_{i:05}.jpg" for i in range(1, 13)), first=1)
    labels = [[77, 77, 102, 1, 2, 3, 50, 51, 52, 77, 5, 6]]
    save_mat(folder / "imagelabels.mat", labels=np.array(labels))
    save_mat(folder / "setid.mat", trnid=[[1, 3, 5]], valid=[[2, 4]], tstid=[[12, 3, 10, 7]])
    return root


def make_food(root: Path, split: str = "test", first: int = 0) -> Path:
    # the order of the classes in the file is not that of the labels
    numbers = {"waffles": (7, 12), "apple_pie": (3,), "baby_back_ribs": (4,)}
    if split == "train":
        numbers = {"waffles": (1,), "apple_pie": (2,), "baby_back_ribs": (9,)}
    meta = {name: [f"{name}/{number}" for number in some] for name, some in numbers.items()}
    folder = root / "food-101"
    draw(folder / "images", *(f"{one}.jpg" for some in meta.values() for one in some), first=first)
    write(folder / "meta" / f"{split}.json", json.dumps(meta))
    return root


def make_cars(root: Path) -> Path:
    folder = root / "stanford_cars"
    names = np.array([f"Maker Model{i} 2012" for i in range(196)], dtype=object)
    save_mat(folder / "devkit" / "cars_meta.mat", class_names=names)
    labels = [181, 103, 196, 1]  # from 1
    files = [f"{i:05}.jpg" for i in range(1, 5)]
    rows = structs("bbox_x1 class fname", *zip([39] * 4, labels, files, strict=True))
    save_mat(folder / "cars_test_annos_withlabels.mat", annotations=rows)
    draw(folder / "cars_test", *files, first=1)
    return root


def write_idx(path: Path, values: np.ndarray) -> None:
    """An IDX file, as MNIST and its followers have them, gzipped where the name says so."""
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content += values.tobytes()
    write(path, gzip.compress(content) if path.suffix == ".gz" else content)


def make_idx(root: Path, prefix: str, number: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    images = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
    labels = (np.arange(number) % 10).astype(np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        write_idx(root / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}", values)
    return images, labels


def synsets(name: str) -> list[str]:
    """ImageNet's 1,000 WordNet ids, or the 200 of a set, from clip_benchmark's source."""
    source = (class_names.benchmark_folder() / "builder.py").read_text()  # type: ignore[operator]
    variable = {"1k": "all_imagenet_wordnet_ids"}.get(name, f"imagenet_{name}_wnids")
    text = source.split(f"{variable} = ", 1)[1].split("\n", 1)[0]
    return sorted(text.strip("[]{}").replace("'", "").split(", "))


def make_class_folders(root: Path, names: list[str], suffix: str = "JPEG") -> Path:
    draw(root, *(f"{name}/{name}_{i}.{suffix}" for i, name in enumerate(names)))
    write(root / "README.txt", b"not an image")
    (root / ".cache").mkdir()
    return root


def make_pets(root: Path) -> Path:
    """All 37 classes, as the publisher names and numbers them; some images more than once."""
    names = class_names.benchmark_lists("en_classnames.json")["pets"]
    rows = [(f"{name.replace(' ', '_')}_{i}", i) for i, name in enumerate(names, 1)]
    rows = [*rows[5:], *rows[:5], ("Bombay_201", 8)]  # in another order than the classes'
    folder = root / "oxford-iiit-pet"
    draw(folder / "images", *(f"{name}.jpg" for name, _ in rows))
    lines = "".join(f"{name} {label} 1 1\n" for name, label in rows)
    write(folder / "annotations" / "test.txt", lines)
    write(folder / "annotations" / "trainval.txt", "Bombay_8 8 1 2\nSphynx_34 34 1 12\n")
    return root
