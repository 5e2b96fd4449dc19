"""Hostile files and secrets: nothing is executed, no memory filled, no password shown."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from models import drawn, refused, small_config, write_export
from runs import write_config
from save_folders import Place
from small_runs import SmallRuns
from tarballs import contents, items_of, pairs, quick, serve, write_images, write_tar

import alignclip
from alignclip.checked_json import has_type, parse_json
from alignclip.config.reading import load, load_evaluation
from alignclip.config.yaml_text import parse
from alignclip.conversion.class_folders import read_folder
from alignclip.conversion.classification_sets import LARGEST_IDX, read_fashion_mnist
from alignclip.conversion.encoder_files import check_encoder_folder, check_encoder_weights
from alignclip.conversion.formats import lines
from alignclip.conversion.formats.tars import LONGEST_HEADER
from alignclip.conversion.samples import BROKEN_INPUT, Sample
from alignclip.data.transforms import decode_image
from alignclip.errors import UserError, printable, without_secrets
from alignclip.runtime.environment import Start
from alignclip.storage import open_store
from alignclip.training.resume import read_checkpoint
from alignclip.training.trackers import with_wandb_id

SECRET = "hunter2SECRET"
SIGNED = f"https://h/a.tar?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}"

# --- code -----------------------------------------------------------------------------------------


def test_an_encoder_with_classes_of_its_own_is_not_even_imported(tmp_path: Path) -> None:
    """sentence-transformers imports them from a local folder, whatever it is told."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')", encoding="utf-8")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "own.Model"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    write_tar(tmp_path / "a.tar", pairs(0, 2))
    with refused(r"is refused: its modules\.json names the class own\.Model, which would run"):
        quick([tmp_path / "a.tar"], tmp_path / "out", semantic=True, encoder=str(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["[", "{}", "[5]", '[{"type": 5}]'])
def test_modules_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text, encoding="utf-8")
    with refused("is no sentence encoder: modules.json"):
        check_encoder_folder(tmp_path)


def test_an_encoder_whose_weights_are_a_pickle() -> None:
    safe = ["model.safetensors", "pytorch_model.bin", "2_Dense/model.safetensors", "onnx/a/x.bin"]
    check_encoder_weights("x", safe)
    with refused(r"'x' is refused: 2_Dense/pytorch_model\.bin is a pickle, which could run code"):
        check_encoder_weights("x", ["model.safetensors", "2_Dense/pytorch_model.bin"])


def test_weights_for_openvino_are_no_pickle() -> None:
    """all-mpnet-base-v2 on the hub has them. An index could have PyTorch read them."""
    exported = ["openvino/openvino_model.bin", "openvino/openvino_model.xml"]
    check_encoder_weights("x", ["model.safetensors", *exported])
    for further in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        with refused(r"'x' is refused: openvino/\w+\.bin is a pickle"):
            check_encoder_weights("x", [*exported, f"openvino/{further}"])


def test_an_export_does_not_ask_for_this_machines_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    config = small_config()
    folder = write_export(tmp_path / "x", config, drawn(config).state_dict())
    settings = json.loads((folder / "open_clip_config.json").read_text())
    name = "${oc.env:AWS_SECRET_ACCESS_KEY}"
    settings["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with refused("a setting refers to another place") as error:
        alignclip.load(folder)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"optimizers": "x"},
        {"algorithms": "x"},
        {"algorithms": [1]},
        {"dataset_state": "x"},
        {"rank_zero_seed": "x"},
        None,
    ],
)
def test_a_checkpoint_whose_state_is_none(tmp_path: Path, change: Any) -> None:
    """Its checksum is right: somebody has written it so."""
    state = {"optimizers": {}} if change is None else {"model": {}, **change}
    torch.save({"state": state, "rng": []}, tmp_path / "x.pt")
    with refused("x.pt is no checkpoint of a run: it has no state of one"):
        read_checkpoint(tmp_path / "x.pt", "x.pt")


def test_a_checkpoint_of_another_model(tmp_path: Path, dataset: Path) -> None:
    SmallRuns(tmp_path / "a", dataset, tmp_path / "saved").train("max_duration=2ba")
    other = SmallRuns(tmp_path / "b", dataset, None, "max_duration=3ba")
    with refused(r"latest-rank0\.pt is no checkpoint of this model: size mismatch for encoders"):
        other.build(f"load_path={tmp_path / 'saved' / 'latest-rank0.pt'}", "model.embed_dim=16")


# --- small files that become large ----------------------------------------------------------------


def test_a_yaml_whose_aliases_repeat_aliases() -> None:
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="its aliases repeat lists or mappings too often"):
        parse("\n".join(["a0: &a0 [x, x]", *lists]))
    assert parse("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}")["c"] == {"x": "1", "y": "2"}


def test_a_packed_tar_with_a_name_of_megabytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 2))
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, LONGEST_HEADER + 512
    hostile = info.tobuf() + b"x" * info.size + path.read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(hostile))
    (last,) = items_of(tmp_path / "b.tar.gz")
    assert not isinstance(last, Sample)
    assert last.reason == BROKEN_INPUT


def test_a_packed_list_of_one_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning is looked at a line at a time, and no further than a line that is none."""
    read: list[int] = []
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b"x" * (4 * lines.LONGEST_LINE))
    every_line = lines.every_line

    def counted(file: Any) -> Any:
        for line in every_line(file):
            read.append(len(line))
            yield line

    monkeypatch.setattr(lines, "every_line", counted)
    with refused("is no JSON lines"):
        items_of(tmp_path / "a.jsonl.gz")
    assert sum(read) == lines.LONGEST_LINE


def test_a_packed_idx_file_larger_than_the_set(tmp_path: Path) -> None:
    content = bytes((0, 0, 8, 3)) + bytes(LARGEST_IDX)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content, compresslevel=1))
    with refused(r"t10k-images-idx3-ubyte\.gz is larger than any IDX file of the set"):
        read_fashion_mnist(tmp_path, "test")


def jpeg_of(width: int, height: int) -> bytes:
    """The beginning of a JPEG: a comment with fill bytes before it, and the sides."""
    sides = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes((1, 17, 0, 2, 17, 1, 3, 17, 1))
    return b"\xff\xd8" + b"\xff\xff\xff\xfe\x00\x06abcd" + b"\xff\xc0" + sides + b"\xff\xd9"


def test_a_jpeg_of_more_pixels_than_pil_takes() -> None:
    with pytest.raises(OSError, match="60000 × 50000 pixels, more than 178,956,970"):
        decode_image(jpeg_of(60_000, 50_000))
    for data in (jpeg_of(600, 500), jpeg_of(60_000, 50_000)[:20], b"\xff\xd8\xff", b"\xff\xd8"):
        with pytest.raises(OSError, match=r"^(?!.*more than)"):
            decode_image(data)


# --- folders --------------------------------------------------------------------------------------


def test_links_to_the_folders_around_a_class(tmp_path: Path) -> None:
    """They would bring the other classes' images, and themselves again and again."""
    root, elsewhere = tmp_path / "set", write_images(tmp_path / "more", 1)
    root.mkdir()
    for i in range(4):
        folder = write_images(root / f"c{i}", 2)
        (folder / "up").symlink_to("..")
        (folder / "linked").symlink_to(elsewhere)
    samples = read_folder(root, "test").samples
    names = [sample.key for sample in samples if sample.target == 1]
    assert names == ["c1/0.jpg", "c1/1.jpg", "c1/linked/0.jpg"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "00000", 2)
    (folder / "0.txt").write_text("a caption", encoding="utf-8")
    os.mkfifo(folder / "1.txt")
    for ending in ("jpg", "txt"):
        (folder / f"2.{ending}").symlink_to("/dev/zero")
    (found,) = [item for item in items_of(f"{folder}/") if isinstance(item, Sample)]
    assert found.caption == "a caption"


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"can't reach http://me:{SECRET}@host/b", "can't reach http://me:…@host/b"),
        (f"{SIGNED} is gone", "https://h/a.tar?… is gone"),
        (f"x?sv=1&sig={SECRET}&a=1", "x?sv=1&sig=…&a=1"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} api_key={SECRET}", "AWS_SECRET_ACCESS_KEY=… api_key=…"),
        ("abfss://container@account/x", "abfss://container@account/x"),
        ("max_tokens=5 design=2 a@b max_token=77", "max_tokens=5 design=2 a@b max_token=77"),
    ],
)
def test_errors_show_no_secrets(text: str, shown: str) -> None:
    assert str(UserError(text)) == without_secrets(text) == shown
    assert without_secrets(shown) == shown


def test_an_error_is_one_line_that_a_terminal_shows_as_it_is() -> None:
    assert str(UserError("a\nb\tc\x1b[2J\u202e\ud800 ü\u3000🪲")) == (
        "a b c\\x1b[2J\\u202e\\ud800 ü\u3000🪲"
    )
    assert printable("plain") == "plain"


@pytest.mark.parametrize("name", ["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"])
def test_an_endpoint_with_a_password(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://me:{SECRET}@127.0.0.1:9")
    with refused(f"{name} holds a password, which S3 has no use for") as error:
        open_store("s3://bucket/x")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"data.streams.e.remote=s3://me:{SECRET}@bucket/x", "remote"),
        (f"pretrained={SIGNED}", "pretrained"),
        (f"loggers.CometMLLogger.api_key={SECRET}", "api_key"),
        ("loggers.CometMLLogger.api_key=short", "api_key"),
        (f"loggers.WandBLogger.tags=[https://me:{SECRET}@host]", r"tags\.0"),
    ],
)
def test_a_configuration_holds_no_secrets(tmp_path: Path, override: str, key: str) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    with refused(f"{key} holds a password, a key or a signed URL") as error:
        load(yaml, [override])
    assert SECRET not in str(error.value)


def test_a_setting_in_a_name_is_no_secret(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    assert load(yaml, ["run_name=vit_max_token=77"]).run_name == "vit_max_token=77"


def test_an_evaluation_holds_no_secrets() -> None:
    yaml = Path(__file__).parents[1] / "yamls" / "evaluate.yaml"
    with refused("checkpoint holds a password, a key or a signed URL"):
        load_evaluation(yaml, [f"checkpoint=s3://me:{SECRET}@bucket/x.pt"])


def test_a_record_of_a_start_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain.py", f"loggers.X.api_token={SECRET}"])
    assert Start(0, 1, "cpu").command == "pretrain.py loggers.X.api_token=…"


def test_a_conversion_of_signed_urls(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The set says where it is from without the signature; another signature changes nothing."""
    write_tar(tmp_path / "in" / "a.tar", pairs(0, 3))
    with serve(tmp_path / "in") as url:
        for signature in (SECRET, f"{SECRET}2"):
            counts = quick([f"{url}/a.tar?X-Amz-Signature={signature}"], tmp_path / "out")
            assert counts.written == 3
        assert counts.resumed == 3
        written = contents(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*.json"):  # as an earlier version wrote it
            text = path.read_text(encoding="utf-8").encode().decode("unicode_escape")
            path.write_text(text.replace("?…", f"?X-Amz-Signature={SECRET}"), encoding="utf-8")
        write_tar(tmp_path / "in" / "b.tar", pairs(3, 1))
        quick([f"{url}/{name}.tar?X-Amz-Signature={SECRET}" for name in "ab"], tmp_path / "out")
        with refused("fetch") as error:
            quick([f"{url}/c.tar?X-Amz-Signature={SECRET}"], tmp_path / "other")
    assert SECRET not in str(error.value)
    assert SECRET.encode() not in contents(tmp_path / "out")["dataset.json"]
    assert f"{url}/a.tar?…" in json.loads(written["dataset.json"])["source"]
    assert not [name for name, content in written.items() if SECRET.encode() in content]
    ours = [line for line in "".join(capfd.readouterr()).splitlines() if "GET /" not in line]
    assert not [line for line in ours if SECRET in line]


def test_an_id_that_is_none_becomes_no_files_name(tmp_path: Path) -> None:
    place = Place(tmp_path, str(tmp_path / "saved"), ())
    config = load(
        write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved")),
        ["run_name=first", "loggers.WandBLogger.project=x"],
    )
    (tmp_path / "saved").mkdir(exist_ok=True)
    (tmp_path / "saved" / "wandb-id.txt").write_text("../../../x\n", encoding="utf-8")
    with refused(r"wandb-id\.txt holds no id of Weights & Biases"):
        with_wandb_id(config, place.folder())


# --- JSON -----------------------------------------------------------------------------------------


class Pair(TypedDict):
    a: int


@pytest.mark.parametrize(
    ("value", "expected", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (True, bool, True),
        (1, float, True),
        (None, int | None, True),
        ("x", int | None, False),
        ([1, "x"], list[int], False),
        (["a", "b"], tuple[str, str], True),
        (["a"], tuple[str, str], False),
        ({"x": [1.5]}, dict[str, list[float]], True),
        ([], dict[str, int], False),
        ({"a": 1, "more": None}, Pair, True),
        ({"b": 1}, Pair, False),
        ({"a": []}, Pair, False),
        ({"batch": 0, "world_size": 1, "device": "cpu", "git": None}, Start, True),
        ({"batch": 0, "world_size": 1, "device": "cpu", "git": {"commit": 1}}, Start, False),
        ({"batch": 0}, Start, False),
        ({"anything": []}, Any, True),
    ],
)
def test_types_of_json(value: object, expected: Any, fits: bool) -> None:
    assert has_type(value, expected) == fits


@pytest.mark.parametrize("text", ["[" * 100_000, b"\xff", b"\xff\xfe[\x00]\x00", "", "1" * 5_000])
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
