"""benchmarks/gpu.py at tiny sizes on the CPU: each step runs and leaves its figures."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest

pytestmark = pytest.mark.slow
STEP = ("rate", "speed", "MFU", "first")
FIGURES = {
    "ceilings": {"product/rate", "copy/rate"},
    "exactness": set(),
    "set": set(),
    "loader": {"loader, 1 workers/rate", "loader, 2 workers/rate"},
    "eager": {f"eager, batch {n}/{what}" for n in (8, 16) for what in STEP},
    "chunked": {f"chunks of 8, batch 16/{what}" for what in STEP},
    "compiled": {f"compiled, batch 8/{what}" for what in STEP},
    "regional": {f"regional, batch 8/{what}" for what in STEP},
    "beside": {
        "open_clip, batch 8/rate",
        *(f"{name}/{what}" for name in ("SharedCLIP", "CLIP") for what in STEP),
    },
    "profile": set(),
    "loss": {"loss/time"},
    "waits": {"host/waits"},
    "train": {"train/rate", "train/data wait"},
    "train_regional": {"train, regional/rate", "train, regional/data wait"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the drawn set and the ceilings, which other steps read."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ("ceilings", "set"):
        run(name, folder)
    return folder


def run(name: str, folder: Path) -> int:
    """Run a step in this process."""
    words = [
        "--cpu",
        "--step",
        name,
        "--folder",
        str(folder),
        "--json",
        str(folder / f"{name}.json"),
    ]
    return gpu.main(words)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full) if name == "train_regional" else name
        for name in gpu.STEPS
        if name not in ("ceilings", "set")
    ],
)
def test_a_step_runs_and_leaves_its_figures(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, folder) == 0
    assert capsys.readouterr().out.strip()
    assert gpu.figures_of(folder, name).keys() == FIGURES[name]


def test_every_step_has_its_figures_named() -> None:
    assert FIGURES.keys() == gpu.STEPS.keys()


def test_the_next_step_begins_whatever_becomes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.STEPS, "set", gpu.Step("gpu_loading", "draw_set", 0.1))
    place = tmp_path / "figures.json"
    words = ["--cpu", "--folder", str(tmp_path / "work"), "--json", str(place)]
    assert gpu.main([*words, "--only", "set", "loader", "ceilings"]) == 1
    late, failed, good = capsys.readouterr().out.splitlines()[-3:]
    assert "FAILED  no time was left" in late
    assert "FAILED  RuntimeError: No `remote` provided" in failed
    assert "ok  bf16 product of 256³" in good
    figures = json.loads(place.read_text(encoding="utf-8"))["figures"]
    assert figures.keys() == FIGURES["ceilings"]


def test_a_machine_without_a_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "has no GPU that PyTorch can use; --cpu runs tiny sizes" in capsys.readouterr().err
