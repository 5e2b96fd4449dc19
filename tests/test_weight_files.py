"""What people have as files of weights: read, or told what it is and what to do."""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import sys
import tarfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip as theirs
import pytest
import torch
from models import drawn, refused, sections, small_batch, small_config, stock
from omegaconf import OmegaConf
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn

import alignclip
from alignclip.weights.formats import hugging_face, hugging_face_settings, open_clip

Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the settings of a small model."""
    export = {"model_cfg": sections(small_config())}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(export), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def weights() -> Weights:
    return dict(drawn(small_config()).state_dict())


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def trained(weights: Weights) -> dict[str, Any]:
    """An optimizer that has made a step."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    beside = {"epoch": 3, "name": "x", "scaler": {"scale": 1.0}}
    return beside | {"state_dict": weights, "optimizer": optimizer.state_dict()}


class Attributes(dict[str, Any]):
    """Lightning's ``AttributeDict``, by its name."""

    __module__ = "lightning_fabric.utilities.data"
    __qualname__ = "AttributeDict"


READ: dict[str, Callable[[Weights], Any]] = {
    "a bare state dict": lambda weights: weights,
    "numbers in it": lambda weights: {"epoch": 3, "best": np.float32(0.5), "name": "x", **weights},
    "numpy beside": lambda weights: {
        "state_dict": weights,
        "a": np.arange(3, dtype=np.float32),
        "b": np.int64(3),
    },
    "open_clip's": trained,
    "a namespace": lambda weights: {
        "state_dict": weights,
        "args": argparse.Namespace(out=pathlib.Path("x")),
    },
    "omegaconf": lambda weights: {
        "state_dict": weights,
        "cfg": OmegaConf.create({"a": [1, {"b": 2}]}),
    },
    "a defaultdict": lambda weights: {
        "model": weights,
        "d": collections.defaultdict(list, {"a": [1]}),
    },
    "model_state_dict": lambda weights: {"model_state_dict": weights, "epoch": 1},
    "DeepSpeed's": lambda weights: {"module": prefixed(weights, "module."), "dp_world_size": 2},
    "compiled": lambda weights: {"state_dict": prefixed(weights, "module._orig_mod.")},
    "Lightning's": lambda weights: {
        "state_dict": prefixed(weights, "model.clip.") | {"loss.weight": torch.ones(1)},
        "pytorch-lightning_version": "2.0",
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "a wrapper's of ours": lambda weights: prefixed(weights, "encoders."),
    "bf16": lambda weights: {name: value.bfloat16() for name, value in weights.items()},
    "fp16": lambda weights: {name: value.half() for name, value in weights.items()},
    "fp64": lambda weights: {name: value.double() for name, value in weights.items()},
    "numpy arrays": lambda weights: {
        "state_dict": {name: value.numpy() for name, value in weights.items()}
    },
    "big-endian": lambda weights: {
        name: value.numpy().astype(">f4") for name, value in weights.items()
    },
    "parameters": lambda weights: {name: nn.Parameter(value) for name, value in weights.items()},
    "a mask": lambda weights: weights | {"attn_mask": torch.zeros(12, 12)},
}


def check_same(path: Path, weights: Weights) -> None:
    found = alignclip.load(path)[0].state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0.01, atol=0.001)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", list(READ))
def test_read(folder: Path, weights: Weights, what: str, old: bool) -> None:
    torch.save(READ[what](weights), folder / "x.pt", _use_new_zipfile_serialization=not old)
    check_same(folder / "x.pt", weights)


def test_lightnings_own_types_are_passed_over(
    folder: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Attributes.__module__
    with monkeypatch.context() as there:
        for module in ("lightning_fabric", "lightning_fabric.utilities", name):
            there.setitem(sys.modules, module, types.ModuleType(module))
        there.setattr(sys.modules[name], "AttributeDict", Attributes, raising=False)
        torch.save({"state_dict": weights, "hyper_parameters": Attributes(lr=1)}, folder / "x.ckpt")
    check_same(folder / "x.ckpt", weights)


def test_safetensors_under_another_name(folder: Path, weights: Weights) -> None:
    save_file({name: value.clone() for name, value in weights.items()}, folder / "x.pt")
    check_same(folder / "x.pt", weights)


def test_custom_text_towers(folder: Path) -> None:
    model = CustomTextCLIP(**sections(small_config())).eval()
    content = {"state_dict": prefixed(model.state_dict(), "module."), "epoch": 3}
    torch.save(content, folder / "epoch_30.pt")
    ours = alignclip.load(folder / "epoch_30.pt")[0]
    images, tokens = small_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), model.encode_image(images))
        torch.testing.assert_close(ours.encode_text(tokens), model.encode_text(tokens))


def test_torch_script(folder: Path, weights: Weights) -> None:
    theirs = stock(small_config())
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    theirs.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    example = torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(theirs.eval(), example, check_trace=False).save(folder / "x.pt")
    check_same(folder / "x.pt", weights)
    (folder / "open_clip_config.json").unlink()
    with refused(r"a TorchScript archive without settings: no open_clip_config\.json.*config="):
        alignclip.load(folder / "x.pt")


def in_two(weights: Weights, folder: Path) -> Path:
    """Write a model in two files; return their index."""
    folder.mkdir(exist_ok=True)
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        held = {name: value.clone() for name, value in weights.items() if names[name] == file}
        save_file(held, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    return index


def test_several_files_and_an_index(folder: Path, weights: Weights) -> None:
    index = in_two(weights, folder)
    check_same(index, weights)
    clip_model = in_two(hugging_face.their_tensors(weights), folder / "theirs").parent
    settings = {"model_type": "clip"} | hugging_face_settings.their_config(small_config())
    (clip_model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    check_same(clip_model, weights)
    (folder / "part-1.safetensors").unlink()
    with refused(r"lists part-1\.safetensors, which isn't there"):
        alignclip.load(index)
    for name in ("../x.safetensors", "/etc/passwd", "x.txt", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
        with refused(r"which is no file of weights beside it|is no index"):
            alignclip.load(index)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "x")


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


TOLD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "git lfs pull",
    ),
    "a web page": (lambda p: p.write_text("\n<!doctype html><html>"), "is a web page"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 100)), "compressed with gzip; unpack it"),
    "tar": (write_tar, "is a tar archive; unpack it"),
    "npz": (write_npz, r"is NumPy's \(.npz\)"),
    "npy": (lambda p: np.save(p.open("wb"), np.ones(3)), "is one NumPy array"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF" + bytes(100)), "is a GGUF file"),
    "two models": (
        lambda p: torch.save(
            {f"{who}.token_embedding.weight": torch.ones(2, 2) for who in "ab"}, p
        ),
        r"holds several models: a\., b\.; save the state_dict of one alone",
    ),
    "a module": (
        lambda p: torch.save(nn.Linear(1, 1), p),
        r"linear\.Linear', which could run code.*state_dict",
    ),
    "a loss": (
        lambda p: torch.save({"loss": torch.ones(1)}, p),
        "it lacks|no open_clip_config.json",
    ),
    "an optimizer": (
        lambda p: torch.save({"state": {}, "param_groups": []}, p),
        "is not a model's weights|Composer",
    ),
}


@pytest.mark.parametrize("what", list(TOLD))
def test_told(folder: Path, what: str) -> None:
    write, words = TOLD[what]
    write(folder / "x.pt")
    with refused(words):
        alignclip.load(folder / "x.pt")


def on_meta(name: str) -> Weights:
    """The state dict of one of open_clip's models, without its numbers."""
    with torch.device("meta"):
        return dict(theirs.CLIP(**theirs.get_model_config(name)).state_dict())


def test_models_that_shapes_tell() -> None:
    weights = on_meta("ViT-B-32")
    assert open_clip.like(weights) == ["ViT-B-32", "ViT-B-32-quickgelu"]
    named = "2024_01_01-00_00_00-model_ViT-B-32-lr_0.001-b_64-j_4-p_amp"
    assert open_clip.like(weights, named) == ["ViT-B-32"]
    assert open_clip.like(on_meta("ViT-L-16")) == ["ViT-L-16"]
    assert open_clip.like({"a": torch.ones(1)}) == []
    assert open_clip.named("ViT-B-32").text_cfg.heads == 8
    assert open_clip.named("ViT-B-32-quickgelu").quick_gelu
    with refused(r"config=ViT-B32 is none of open_clip's models; did you mean 'ViT-B-32'"):
        open_clip.named("ViT-B32")
    with refused("our encoders can't be that model"):
        open_clip.named("coca_ViT-B-32")


def test_a_training_checkpoint_alone(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read where its shapes are one open_clip model's alone; else the line names them."""
    config = small_config()
    for names in (["ViT-X"], ["ViT-X", "ViT-X-quickgelu"], []):
        monkeypatch.setattr(
            "alignclip.weights.formats.open_clip.like", lambda *_, names=names: names
        )
        monkeypatch.setattr("alignclip.weights.formats.open_clip.named", lambda name: config)
        torch.save({"state_dict": weights, "epoch": 30}, tmp_path / "epoch_30.pt")
        if len(names) == 1:
            check_same(tmp_path / "epoch_30.pt", weights)
            continue
        first = names[0] if names else "MODEL"
        with refused(rf"no open_clip_config\.json.*pass config='{first}'"):
            alignclip.load(tmp_path / "epoch_30.pt")
