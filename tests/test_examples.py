"""The examples, on a tiny model, a tiny set and a folder of pictures: each runs as its head
says.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from evaluations import write_captioned
from models import EVERYTHING, drawn, small_config, write_export
from PIL import Image
from processes import python
from runs import jpeg

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = 70  # more than a batch of examples/search.py


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(text={"context_length": 32, "vocab_size": 49408}, shared=EVERYTHING)
    folder = tmp_path_factory.mktemp("model") / "export"
    return write_export(folder, config, drawn(config).state_dict())


def test_search_prints_the_best_images_first(model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        (pictures / f"{number:02}.jpg").write_bytes(jpeg(np.random.default_rng(number)))
    (pictures / "notes.txt").write_text("no picture")

    done = python(EXAMPLES / "search.py", model, pictures, "a red bicycle", "--top", "4")

    assert done.returncode == 0, done.stderr
    rows = [line.split("  ", 1) for line in done.stdout.splitlines()]
    cosines = [float(cosine) for cosine, _ in rows]
    assert cosines == sorted(cosines, reverse=True)
    assert len({path for _, path in rows}) == 4
    assert all(Path(path).parent == pictures for _, path in rows)


def test_search_in_a_folder_without_pictures_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    done = python(EXAMPLES / "search.py", "no model is read", tmp_path, "a red bicycle")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no .jpg, .jpeg, .png, .webp file\n"


def test_search_with_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "A.JPG").write_bytes(b"never opened")
    done = python(EXAMPLES / "search.py", "nowhere/run", tmp_path, "a red bicycle")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere/run" in line


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one caption", "several captions"])
def test_embed_and_plot_measures_the_gap_and_draws(
    several: bool, model: Path, tmp_path: Path
) -> None:
    write_captioned(tmp_path / "set", 20, several)

    done = python(EXAMPLES / "embed_and_plot.py", model, tmp_path / "set", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert re.search(r"^modality gap \d\.\d\d, alignment -?\d\.\d\d$", done.stdout, re.MULTILINE)
    with Image.open(tmp_path / "embeddings.png") as drawing:
        assert drawing.width > 500
