"""Checkpoints read without executing anything: all that a run writes, and what no run would."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import refused
from small_runs import EMA, trained
from torch import nn

from alignclip.errors import UserError
from alignclip.weights.safe_pickle import Machine, Refused
from alignclip.weights.safe_read import read_pickled
from alignclip.weights.safe_types import CheckpointTypes


def taken_apart(content: Any) -> list[Any]:
    """What torch writes of a value: its types, numbers, order and states, and what is shared."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        pickled = pickletools.genops(archive.read("archive/data.pkl"))
        storages = [name for name in archive.namelist() if name.startswith("archive/data/")]
        return [*((code.name, value) for code, value, _ in pickled), *map(archive.read, storages)]


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "zip, protocol 4": partial(torch.save, pickle_protocol=4),
    "zip, protocol 5": partial(torch.save, pickle_protocol=5),
    "old": partial(torch.save, _use_new_zipfile_serialization=False),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's last one, with EMA and clipped gradients."""
    folder = tmp_path_factory.mktemp("run")
    clipping = "algorithms.GradientClipping.clipping"
    overrides = [f"{clipping}_type=norm", f"{clipping}_threshold=1.0"]
    trained(folder, *EMA, *overrides, "callbacks.SpeedMonitor={}", "callbacks.LRMonitor={}")
    return folder / "saved" / "latest-rank0.pt"


@pytest.mark.parametrize("mapped", [False, True])
def test_a_runs_checkpoint_is_what_torch_reads(checkpoint: Path, mapped: bool) -> None:
    ours = read_pickled(checkpoint, mapped=mapped)
    theirs = torch.load(checkpoint, weights_only=False)
    parts = {"model", "optimizers", "schedulers", "algorithms", "callbacks", "timestamp"}
    assert parts <= ours["state"].keys()
    assert {name for name, _ in ours["state"]["algorithms"]} == {"GradientClipping", "EMA"}
    assert taken_apart(ours) == taken_apart(theirs)
    model = ours["state"]["model"]
    shared = (model[f"encoders.{name}"].data_ptr() for name in ("visual.proj", "text_projection"))
    assert len({*shared}) == 1


@pytest.mark.parametrize("format", list(FORMATS))
def test_what_people_have_beside_weights(tmp_path: Path, format: str) -> None:
    base = torch.arange(24, dtype=torch.float32)
    dtypes = "float64 float16 bfloat16 int64 uint8 bool complex64"
    content = {
        "weights": collections.OrderedDict(
            a=base[4:12].view(2, 4).t(), b=base, c=nn.Parameter(torch.ones(2))
        ),
        "dtypes": [torch.tensor([0, 1]).to(getattr(torch, name)) for name in dtypes.split()],
        "others": [torch.tensor([1, 2], dtype=torch.uint16), torch.ones(2).to(torch.float8_e4m3fn)],
        "empty": [torch.zeros(0, 3), torch.tensor(1.5)],
        "numbers": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True), np.array(1.0)],
        "arrays": [
            np.arange(3, dtype=np.float32),
            np.asfortranarray(np.eye(3)),
            np.arange(3, dtype=">i4"),
        ],
        "words": np.array(["a", "bc"]),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=pathlib.Path("a/b"))),
        "d": collections.defaultdict(list, {"a": [1]}),
        "q": collections.deque([1, 2], 3),
        "c": collections.Counter("aab"),
        "sets": [{1, 2}, frozenset("a")],
        "bytes": [b"\x00\xff", bytearray(b"ab")],
        "Python's": [1, -1, 2**40, 2**200, 1.5, float("inf"), 1j, True, None, (), (1, (2,))],
        "torch": [torch.float32, torch.Size([1, 2]), torch.device("cuda", 1), torch.device("cpu")],
        "when": [datetime.timedelta(1, 2, 3), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)],
        "state": [random.Random(0).getstate(), np.random.get_state(), torch.random.get_rng_state()],
        (0, "key"): "text \u20ac\n",
    }
    if format == "old":
        del content["others"]  # torch itself can't read them
    content["weights"]._metadata = {"": {"version": 1}}
    FORMATS[format](content, tmp_path / "x.pt")
    ours = read_pickled(tmp_path / "x.pt")
    theirs = torch.load(tmp_path / "x.pt", weights_only=False)
    assert taken_apart(ours) == taken_apart(theirs)


def test_names_of_numpy_1(tmp_path: Path) -> None:
    torch.save({"a": np.arange(3), "b": np.float32(1)}, tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", lambda pickled: pickled.replace(b"numpy._core.", b"numpy.core."))
    assert read_pickled(tmp_path / "x.pt")["b"] == np.float32(1)


def rewrite(path: Path, change: Callable[[bytes], bytes], record: str = "data.pkl") -> None:
    """Change a record of a checkpoint, whose checksum is right then."""
    with zipfile.ZipFile(path) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in held.items():
            archive.writestr(name, change(content) if name.endswith(f"/{record}") else content)


# --- what no run would write ----------------------------------------------------------------------


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class Mine:
    """A class of somebody's program."""

    def __setstate__(self, state: Any) -> None:
        Path(state).mkdir()


def mine(folder: str) -> Mine:
    made = Mine()
    made.__dict__["x"] = folder
    return made


HOSTILE: dict[str, Callable[[str], Any]] = {
    "a function": lambda folder: Calls(os.mkdir, folder),
    "eval": lambda folder: Calls(eval, f"__import__('os').mkdir({folder!r})"),
    "getattr": lambda folder: Calls(getattr, Calls(__import__, "os"), "mkdir"),
    "a class of a program": lambda folder: Calls(Mine, state=folder),
    "a partial": lambda folder: Calls(__import__("functools").partial, os.mkdir, folder),
    "a module": lambda folder: nn.Linear(1, 1),
    "a defaultdict of a function": lambda folder: Calls(collections.defaultdict, os.getcwd),
    "an array of objects": lambda folder: np.array([Calls(os.mkdir, folder)], dtype=object),
    "a record array": lambda folder: np.zeros(2, dtype=[("a", "f4")]),
    "a dtype of objects": lambda folder: np.dtype("O"),
    "torch.load itself": lambda folder: Calls(torch.load, folder),
    "memory": lambda folder: Calls(torch.empty, (10**12,)),
    "a list of callables": lambda folder: Calls(map, os.mkdir, [folder]),
    "an lru_cache": lambda folder: Calls(__import__("functools").lru_cache),
    "a random state": lambda folder: np.random.default_rng(),
    "a key that takes for ever": lambda folder: {nested(200): 1},
    "a set of it": lambda folder: {nested(200)},
}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = Slow((value, value))
    return value


class Slow(tuple[Any, ...]):
    """A tuple of tuples of …, which no program could hash."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return tuple, ([*self],)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("what", list(HOSTILE))
def test_hostile_pickles_get_a_line(tmp_path: Path, what: str, format: str) -> None:
    path = tmp_path / "x.pt"
    FORMATS[format](
        {"state_dict": {"a": torch.ones(2)}, "x": HOSTILE[what](str(tmp_path / "made"))}, path
    )
    for mapped in (False, True):
        with refused(r"x\.pt is refused: (beside weights )?it holds"):
            read_pickled(path, mapped=mapped)
    assert not (tmp_path / "made").exists()


def test_the_line_says_what_was_refused_and_the_way_out(tmp_path: Path) -> None:
    torch.save({"x": Calls(os.mkdir, "made")}, tmp_path / "x.pt")
    said = "the checkpoint is refused: beside weights it holds "
    said += f"'{os.mkdir.__module__}.mkdir', which could run code; ask its author"
    with refused(f"^{said}$"):
        read_pickled(tmp_path / "x.pt", what="the checkpoint", way_out="ask its author")


def long(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
NUMBERS = FLOATS + b"K\x04tQ"


def tensor(
    offset: bytes = b"K\x00",
    size: bytes = b"K\x04\x85",
    stride: bytes = b"K\x01\x85",
    storage: bytes = NUMBERS,
    hooks: bytes = b"}",
) -> bytes:
    """A view of a storage of 4 numbers, as torch writes it."""
    rest = offset + size + stride + b"\x89" + hooks + b"tR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
FLOAT_32 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR"
# opcodes that no pickler writes, around a storage of 4 numbers
CRAFTED: dict[str, bytes] = {
    "an item of a tensor": tensor() + b"K\x00K\x01s",
    "an item of a storage": NUMBERS + b"K\x00K\x01s",
    "an item of a list": b"]K\x00K\x01s",
    "append to a dict": b"}K\x00a",
    "append to a tensor": tensor() + b"K\x00a",
    "a state of a tensor": tensor() + b"}b",
    "a state of a dict": b"}}b",
    "a longer storage": FLOATS + b"K\x08tQ",
    "a huge storage": FLOATS + long(2**61) + b"tQ",
    "a negative storage": FLOATS + long(-4) + b"tQ",
    "a tensor beyond its storage": tensor(size=b"K\x05\x85"),
    "an offset beyond": tensor(offset=b"K\x01"),
    "a negative offset": tensor(offset=long(-1)),
    "a negative size": tensor(size=long(-1) + b"\x85"),
    "a negative stride": tensor(stride=long(-1) + b"\x85"),
    "a stride beyond": tensor(stride=b"K\x02\x85"),
    "an overflowing stride": tensor(stride=long(2**62) + b"\x85"),
    "sizes whose product overflows": tensor(
        size=long(2**32) * 2 + b"\x86", stride=b"K\x00K\x00\x86"
    ),
    "a petabyte that repeats a number": tensor(size=long(2**50) + b"\x85", stride=b"K\x00\x85"),
    "hooks": tensor(hooks=b"}K\x01K\x01s"),
    "a tensor of a dtype": tensor(storage=b"ctorch\nfloat32\n"),
    "a call of a tensor": tensor() + b")R",
    "an extension": b"\x82\x01",
    "an instance by name": b"(ios\nmkdir\n",
    "an object of a class": b"(cos\nmkdir\no",
    "a persistent id as text": b"P0\n",
    "another persistent id": b"X\x01\x00\x00\x00aQ",
    "a memo of any size": b"K\x01r\xff\xff\xff\xff" + b"0h\x00",
    "a text of 4 GB": b"X\xff\xff\xff\xffa",
    "bytes of 2**60": b"\x8e" + struct.pack("<Q", 2**60) + b"a",
    "an array filled twice": ARRAY + 2 * (b"(K\x01K\x00\x85" + FLOAT_32 + b"\x89C\x00tb"),
    "an array longer than its bytes": ARRAY + b"(K\x01K\x09\x85" + FLOAT_32 + b"\x89C\x00tb",
    "a dtype of another size": FLOAT_32 + b"(K\x03X\x01\x00\x00\x00<NNNK\x00K\x00K\x00tb",
    "a method of a dict": b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb",
    "a class behind a dot": b"\x8c\x05torch\x8c\x0fnn.Module.apply\x93",
    "a tuple as a dict": b")K\x00K\x01s",
    "a nested key": b"}" + b"K\x00\x85" + 60 * b"q\x00h\x00\x86" + b"K\x01s",
}

BEYOND = {"a tensor beyond its storage", "an offset beyond", "a stride beyond"}


def crafted(path: Path, pickled: bytes) -> None:
    torch.save({"a": torch.ones(4)}, path)
    rewrite(path, lambda _: b"\x80\x02" + pickled + b".")


@pytest.mark.parametrize("what", list(CRAFTED))
def test_crafted_pickles_get_a_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.pt"
    crafted(path, CRAFTED[what])
    for mapped in (False, True):
        with refused(r"x\.pt is (refused: |not a PyTorch checkpoint)") as error:
            read_pickled(path, mapped=mapped)
        assert "MemoryError" not in str(error.value)
        if what in BEYOND:
            assert "reaches beyond its storage" in str(error.value)


def test_the_crafted_pickles_differ_from_a_good_one_by_what_they_say(tmp_path: Path) -> None:
    crafted(tmp_path / "x.pt", tensor())
    assert torch.equal(read_pickled(tmp_path / "x.pt"), torch.ones(4))


def test_truth_values_that_are_none(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([True, False])}, tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", lambda _: b"\x01\x07", "data/0")
    with refused("truth values that are neither 0 nor 1"):
        read_pickled(tmp_path / "x.pt")


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 1000) + 2000] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    for mapped in (False, True):
        with refused(r"x\.pt is damaged: the checksum of its part x/data/0 doesn't match"):
            read_pickled(tmp_path / "x.pt", mapped=mapped)


def small(path: Path, format: str) -> None:
    content = {
        "state_dict": collections.OrderedDict(
            a=torch.arange(6.0).view(2, 3), b=torch.tensor([True])
        ),
        "rng": np.random.RandomState(0).get_state(),
        "when": datetime.timedelta(1),
        "numbers": [np.float32(1), (1, 2.5), {"x": None}],
    }
    FORMATS[format](content, path)


@pytest.mark.parametrize("format", ["zip", "old"])
def test_a_file_cut_anywhere(tmp_path: Path, format: str) -> None:
    path = tmp_path / "x.pt"
    small(path, format)
    whole = path.read_bytes()
    for length in {0, 1, 10, *range(20, len(whole) - 1, 37), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with refused(""):
            read_pickled(path)


@pytest.mark.parametrize("format", ["zip", "old"])
def test_any_changed_bytes_give_a_value_or_a_line(tmp_path: Path, format: str) -> None:
    """Of the pickle, with its checksum right; and of the whole file."""
    path = tmp_path / "x.pt"
    small(path, format)
    whole = path.read_bytes()
    pickled = b""
    if format == "zip":
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read("x/data.pkl")
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        in_pickle = bool(pickled) and draw.random() < 0.7
        content = bytearray(pickled if in_pickle else whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(whole)
        if in_pickle:
            rewrite(path, lambda _, new=bytes(content): new)  # type: ignore[misc]
        else:
            path.write_bytes(content)
        try:
            read_pickled(path)
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)


def test_random_opcodes() -> None:
    """The machine raises one of a few errors, whatever it is given; and calls nothing."""
    draw = random.Random(0)
    opcodes = b"( t } ] K\x01 s u a e R b Q q\x00 h\x00 \x85 2 0 1 \x81 N \x8f \x90 \x91".split(
        b" "
    )
    names = b"torch._utils\n_rebuild_tensor_v2|numpy\ndtype|collections\nOrderedDict"
    names += b"|torch\nFloatStorage|argparse\nNamespace"
    pieces = [*opcodes, b"X\x01\x00\x00\x00a", *(b"c" + n + b"\n" for n in names.split(b"|"))]
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(5000):
        pickled = b"".join(draw.choices(pieces, k=draw.randrange(2, 30))) + b"."
        try:
            Machine(CheckpointTypes(lambda key, length: torch.UntypedStorage(4))).run(
                io.BytesIO(pickled)
            )
            ends["value"] += 1
        except (Refused, IndexError, KeyError, TypeError, ValueError) as error:
            ends[type(error).__name__] += 1
    assert ends["value"] > 10
    assert ends["Refused"] > 100
