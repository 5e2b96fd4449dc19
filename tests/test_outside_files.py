"""Thousands of damaged files of every kind that is read from outside: each works, or gets a line.

``tests/test_convert_fuzz.py`` has the inputs of the converter: tars, tables, images, captions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import write_labelled
from mds_sets import edit, pair_rows, shards_of, write_rows
from models import drawn, small_config, write_export, write_run
from mutations import damage, damage_json
from outside import Damage, Trials, damage_lines, damage_safetensors, damage_yaml, damage_zip
from runs import write_config
from safetensors.torch import save_file
from save_folders import Place
from streaming.base.hashing import get_hash
from tarballs import items_of, pairs, quick, write_images, write_tar

import alignclip
from alignclip.config.reading import load, to_yaml
from alignclip.config.schema import SetConfig
from alignclip.conversion.class_names import choose_classnames, choose_templates
from alignclip.conversion.image_finder import ImageFinder
from alignclip.conversion.retrieval_sets import Wanted, read_annotations
from alignclip.errors import UserError
from alignclip.evaluation.history import records_in
from alignclip.evaluation.json_lines import lines_in
from alignclip.evaluation.sets import EvaluationSet, OpenSets, read_classes
from alignclip.evaluation.zero_shot import build_classifier
from alignclip.runtime.environment import Start
from alignclip.training.curve_page import charts
from alignclip.training.resume import choose_checkpoint, read_checkpoint
from alignclip.training.run_record import add_start, check_config, record_config, starts_of
from alignclip.verification.command import VerifyOptions, verify
from alignclip.weights.figures import read_figures, results_table
from alignclip.weights.formats.hugging_face import HuggingFace
from alignclip.weights.load import open_model

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]
Try = Callable[[int, dict[Path, Damage], Callable[[], object]], None]


@pytest.fixture
def attempt(fuzz: Any, request: pytest.FixtureRequest) -> Try:
    """Try so many damaged files with ``--full``, a thirtieth of them otherwise."""
    rng = random.Random(f"{fuzz.seed} {request.node.name}")

    def run(count: int, files: dict[Path, Damage], act: Callable[[], object]) -> None:
        Trials(rng, files, act).run(count if fuzz.is_full else count // 30)

    return run


def json_files(folder: Path) -> dict[Path, Damage]:
    return dict.fromkeys(sorted(folder.rglob("*.json")), damage_json)


# sets


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A set of ours, of two tars beside it."""
    for i in range(2):
        write_tar(tmp_path / "in" / f"{i:05}.tar", pairs(10 * i, 4))
    quick([tmp_path / "in"], tmp_path / "out", size_limit="4kb")
    return tmp_path / "out"


def verified(folder: Path) -> Callable[[], object]:
    return lambda: verify(VerifyOptions(str(folder), processes=1, progress=False, decode=1.0))


def test_a_set_that_is_verified(converted: Path, attempt: Try) -> None:
    attempt(1500, json_files(converted), verified(converted))


def test_a_set_whose_conversion_goes_on(converted: Path, attempt: Try) -> None:
    before = {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()}

    def convert() -> None:
        try:
            quick([converted.parent / "in"], converted, size_limit="4kb")
        finally:
            for path in [path for path in converted.rglob("*") if path.is_file()]:
                if path not in before:
                    path.unlink()
            for path, content in before.items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)

    attempt(150, json_files(converted), convert)


def test_the_index_of_a_set_that_is_evaluated(tmp_path: Path, attempt: Try) -> None:
    write_labelled(tmp_path / "set", 6)
    attempt(600, {tmp_path / "set" / "index.json": damage_json}, lambda: read_all(tmp_path / "set"))


def read_all(folder: Path, column: str = "label") -> None:
    samples = EvaluationSet(SetConfig(local=str(folder)), column, OpenSets())
    samples.image_size = 32
    try:
        for i in range(len(samples)):
            samples[i]
    except RuntimeError as error:  # which the evaluation tells
        raise UserError(str(error)) from None


def test_class_names_and_templates(tmp_path: Path, attempt: Try) -> None:
    write_labelled(tmp_path / "set", 2)

    def read() -> None:
        names, templates = read_classes(SetConfig(local=str(tmp_path / "set")))
        build_classifier(lambda texts: torch.ones(len(texts), 4), names, templates)

    attempt(900, {tmp_path / "set" / "classes.json": damage_json}, read)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_whose_hashes_are_right(
    tmp_path: Path, compression: str | None, attempt: Try
) -> None:
    """A stranger's shards: what the index says of the file is true."""
    folder = write_rows(tmp_path / "set", pair_rows(4), compression=compression)
    (shard,) = folder.glob("*.mds*")
    stored = "zip_data" if compression else "raw_data"

    def read() -> None:
        content = shard.read_bytes()

        def say(index: Any) -> None:
            hashes = {"xxh64": get_hash("xxh64", content)}
            index["shards"][0][stored] |= {"bytes": len(content), "hashes": hashes}

        edit(folder / "index.json", say)
        for raw in folder.glob("*.mds"):
            if compression:
                raw.unlink()
        verified(folder)()
        read_all(folder, "caption")

    assert len(shards_of(folder)) == 1
    attempt(400, {shard: damage}, read)


# runs


def test_the_records_of_a_run(tmp_path: Path, attempt: Try) -> None:
    place = Place(tmp_path, str(tmp_path / "saved"))
    folder, saved = place.folder(), tmp_path / "saved"
    record_config(folder)
    for batch in (0, 2):
        add_start(folder, Start(batch, 1, "cpu"))
    (saved / "latest-rank0.pt").unlink()
    (saved / "latest-rank0.pt.symlink").write_text("ep0-ba6-rank0.pt")
    names = ("starts.json", "config.yaml", "latest-rank0.pt.symlink")
    before = {name: (saved / name).read_bytes() for name in names}

    def read() -> None:
        folder = place.folder()
        try:
            check_config(folder)
            choose_checkpoint(folder, tmp_path / "download")
            add_start(folder, Start(4, 1, "cpu"))
            assert starts_of(folder)
        finally:
            (saved / "latest-rank0.pt").unlink(missing_ok=True)
            for name, content in before.items():
                (saved / name).write_bytes(content)

    how = zip((saved / name for name in names), (damage_json, damage_yaml, damage), strict=True)
    attempt(120, dict(how), read)


CURVES = [
    {"batch": 1, "start": True},
    {"batch": 1, "losses": {"total": 1.0, "a": 2.0}, "lr": 0.1, "logit_scale": 3.0},
    {"batch": 2, "losses": {"total": 1.0, "a": None}, "lr": 0.1},
    {"batch": 2, "metrics": {"e/acc1": 0.1}, "chance": {"e/acc1": 0.1}},
]
EVALUATIONS = [
    {"batch": batch, "evaluator": "e", "metrics": {"acc1": 0.1, "margin": None},
     "chance": {"acc1": 0.1}, "verdict": None}
    for batch in (1, 2)
]  # fmt: skip


def test_curves_and_evaluations_of_a_run(tmp_path: Path, attempt: Try) -> None:
    history, evaluations = tmp_path / "history.jsonl", tmp_path / "evaluations.jsonl"
    for path, lines in ((history, CURVES), (evaluations, EVALUATIONS)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read() -> None:
        charts(lines_in(history.read_text(errors="replace")))
        records_in(evaluations.read_text(errors="replace"))

    attempt(1500, dict.fromkeys((history, evaluations), damage_lines), read)


def test_a_runs_yaml(tmp_path: Path, attempt: Try) -> None:
    path = write_config(tmp_path, str(tmp_path / "set"))
    path.write_text(to_yaml(load(path, ["run_name=x"])))
    attempt(300, {path: damage_yaml}, lambda: load(path))


# weights


def test_a_checkpoint_to_go_on_from(tmp_path: Path, attempt: Try) -> None:
    state = {
        "model": {"a": torch.ones(3)},
        "algorithms": [("EMA", {"repr": "EMA(half_life='2ba')", "ema": torch.ones(2)})],
        "timestamp": {"batch": 3},
    }
    path = tmp_path / "x.pt"
    torch.save({"state": state, "rng": [{"python": (3, (1, 2), None)}]}, path)
    attempt(900, {path: damage_zip}, lambda: read_checkpoint(path, "x.pt"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = small_config(
        vision={"width": 64, "head_width": 64},
        text={"width": 64, "heads": 1, "vocab_size": 49408, "context_length": 77},
    )
    return write_run(tmp_path / "run", config, drawn(config))


def test_a_run_that_is_loaded(run_folder: Path, attempt: Try) -> None:
    how = {run_folder / "config.yaml": damage_yaml, run_folder / "latest-rank0.pt": damage_zip}
    attempt(200, how, lambda: alignclip.load(run_folder))


def test_an_export_of_open_clip(tmp_path: Path, attempt: Try) -> None:
    config = small_config()
    folder = write_export(tmp_path / "x", config, drawn(config).state_dict(), mean=[0.5, 0.5, 0.5])
    weights = {folder / "open_clip_model.safetensors": damage_safetensors}
    attempt(400, json_files(folder) | weights, lambda: alignclip.load(folder))


def test_an_export_of_transformers(run_folder: Path, tmp_path: Path, attempt: Try) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    HuggingFace().write(open_model(run_folder), folder)
    names = ("config.json", "preprocessor_config.json")
    how = dict.fromkeys((folder / name for name in names), damage_json)
    attempt(150, how, lambda: alignclip.load(folder))


def test_an_index_of_several_files(tmp_path: Path, attempt: Try) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"x": 1}, "weight_map": {"a": "1.safetensors"}}))

    def read() -> None:
        from alignclip.weights.weight_files import read as read_weights

        read_weights(index, "x")

    attempt(400, {index: damage_json, tmp_path / "1.safetensors": damage_safetensors}, read)


# lists that a person names

NAMES = [f"{i}.jpg" for i in range(5)]
COCO = {
    "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
    "annotations": [{"image_id": i, "id": i, "caption": f"c {i}"} for i in range(5)],
}
KARPATHY = {
    "images": [
        {"filename": name, "split": "test" if i < 3 else "val", "sentences": [{"raw": f"c {i}"}]}
        for i, name in enumerate(NAMES)
    ]
}
TABLE = "".join(f'"[""c {i}""]",test,{name}\n' for i, name in enumerate(NAMES))
ANNOTATIONS: dict[str, tuple[str, str, str, Damage]] = {
    "coco": ("coco2017", "a.json", json.dumps(COCO), damage_json),
    "karpathy": ("coco", "a.json", json.dumps(KARPATHY), damage_json),
    "flickr": ("flickr30k", "a.json", json.dumps(KARPATHY), damage_json),
    "token": ("flickr30k", "a.token", "".join(f"{n}#0\tc\n" for n in NAMES), damage),
    "plain": ("flickr30k", "a.txt", "".join(f"{name},c\n" for name in NAMES), damage),
    "table": ("flickr30k", "a.csv", f"raw,split,filename\n{TABLE}", damage),
    "pairs": ("pairs", "a.csv", "image,caption\n" + "".join(f"{n},c\n" for n in NAMES), damage),
}


@pytest.mark.parametrize("layout", ANNOTATIONS)
def test_annotations(tmp_path: Path, layout: str, attempt: Try) -> None:
    dataset, name, text, how = ANNOTATIONS[layout]
    path, listed = tmp_path / name, tmp_path / "split.txt"
    path.write_text(text)
    listed.write_text("0.jpg\n1.jpg\n")
    images = write_images(tmp_path / "images")
    wanted = Wanted(dataset, path, "test" if dataset != "coco2017" else "val")
    if layout == "token":
        wanted = Wanted(dataset, path, "test", str(listed))

    def read() -> None:
        find = ImageFinder(images, published=dataset != "pairs").find
        for image, captions in read_annotations(wanted).captions.items():
            find(image).is_file()
            assert all(caption.encode() is not None for caption in captions)

    attempt(300, {path: how}, read)


def test_json_lines(tmp_path: Path, attempt: Try) -> None:
    folder = write_images(tmp_path / "in", 3)
    rows = [{"image": f"{i}.jpg", "caption": f"c {i}", "key": f"k{i}"} for i in range(3)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt(600, {folder / "a.jsonl": damage_lines}, lambda: items_of(folder / "a.jsonl"))


def test_files_that_options_name(tmp_path: Path, attempt: Try) -> None:
    files = {
        "t": ["a {c}.", "the {}"],
        "c": ["a", "b"],
        "r": {
            "results": {"x": {"e": {"acc1": 0.5}}},
            "weights": {"x": "abc"},
            "checkpoints": {"x": "p"},
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def read() -> None:
        choose_templates("x", str(tmp_path / "t.json"))
        choose_classnames(["u", "v"], str(tmp_path / "c.json"))
        results_table(read_figures(str(tmp_path / "r.json")).results)

    attempt(900, json_files(tmp_path), read)
