"""The benchmarks' figures: how they are written, and how a run is held beside a baseline."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import measuring
import pytest
import run_all
from comparison import Comparison, compare, comparison_lines, read_baseline, save_baseline
from measuring import CHECKOUT, Direction, Figure, Figures, Record, parser_of
from processes import python

FOLDER = Path(run_all.__file__).parent
NOT_RUN = {"measuring", "comparison", "run_all", "small_set", "scaling", "network_counter"}
NOT_RUN |= {"memory_counter"}


def written(folder: Path, *, batch: int = 64, **runs: list[float]) -> Record:
    """The record that a script writes: times of something."""
    figures = Figures("loss", Namespace(batch=batch, quick=True, json=folder))
    for name, each in runs.items():
        figures.add(f"{name}/time", each, "s", "lower")
    figures.write()
    return Record.parse(json.loads((folder / "loss.json").read_text(encoding="utf-8")))


def test_a_record_says_what_was_measured_and_where(tmp_path: Path) -> None:
    record = written(tmp_path, ours=[1.0, 2.0, 1.5])
    assert record.script == "loss"
    assert record.settings == {"batch": 64}
    assert record.figures == {"ours/time": Figure(1.5, "s", "lower", pytest.approx(1 / 3))}
    assert record.cores >= 1
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-cores?", record.hardware)
    assert {"python", "torch"} <= record.versions.keys()
    assert len(record.load) == 2
    assert re.match(r"20\d\d-\d\d-\d\dT", record.date)


def test_a_ratio_is_of_the_runs_in_turn_and_is_compared_instead_of_both() -> None:
    figures = Figures("loader", Namespace(json=None))
    figures.add("ours/rate", [90, 40, 60], "samples/s", "higher")
    figures.add("bare/rate", [100, 80, 100], "samples/s", "higher")
    assert figures.add_ratio("ours/rate", "bare/rate") == 0.6
    assert figures.figures["ours/rate ÷ bare/rate"] == Figure(
        0.6, "×", "higher", pytest.approx(1 / 3)
    )
    assert [figure.compared for figure in figures.figures.values()] == [False, False, True]
    figures.add("ours/time", [1.0], "s", "lower")
    with pytest.raises(ValueError, match="in s, bare/rate in samples/s"):
        figures.add_ratio("ours/time", "bare/rate")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 7763 64-Core Processor, 2 cores", "amd-epyc-7763-2-cores"),
        (
            "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz, 1 core",
            "intel-xeon-platinum-8480c-1-core",
        ),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_hardware_has_a_readable_name(
    monkeypatch: pytest.MonkeyPatch, name: str, slug: str
) -> None:
    monkeypatch.setattr(measuring, "_hardware", lambda device: name)
    assert measuring.hardware_name() == slug


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([], (8192, "all")),
        (["--quick"], (512, "speed")),
        (["--batch", "16", "--quick"], (16, "speed")),
        (["--quick", "--only", "memory"], (512, "memory")),
    ],
)
def test_quick_replaces_the_sizes_that_are_not_typed(words: list[str], sizes: object) -> None:
    quick = {"batch": 512, "only": "speed"}
    parser = parser_of("loss.py", "", "", {"batch": (8192, "pairs")}, quick)
    parser.add_argument("--only", default="all")
    options = parser.parse_args(words)
    assert (options.batch, options.only) == sizes


def record_of(figures: dict[str, Figure], **changes: object) -> Record:
    """A record of these figures."""
    plain = Record("loss", "a-cpu", "A CPU", 2, {}, (0.0, 0.0), "", "", {"batch": 8}, figures)
    return replace(plain, **changes)


def time_of(median: float, spread: float = 0.0, better: Direction = "lower") -> Figure:
    """A figure in seconds."""
    return Figure(median, "s", better, spread)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (time_of(1.0), time_of(1.2), Comparison(fell=["x: 1 → 1.2 s (20% worse)"])),
        (time_of(1.0), time_of(0.8), Comparison(rose=["x: 1 → 0.8 s (20% better)"])),
        (time_of(1.0), time_of(1.09), Comparison(same=1)),
        (time_of(1.0), time_of(0.95), Comparison(same=1)),
        (
            time_of(1000, better="higher"),
            time_of(850, better="higher"),
            Comparison(fell=["x: 1,000 → 850 s (15% worse)"]),
        ),
        (
            time_of(1.0, spread=0.3),
            time_of(1.2),
            Comparison(noisy=["x: 1 → 1.2 s (20% worse), and its runs differ by ±30%"]),
        ),
        (
            time_of(1.0),
            time_of(1.2, spread=0.25),
            Comparison(noisy=["x: 1 → 1.2 s (20% worse), and its runs differ by ±25%"]),
        ),
        # a fall that is larger than the noise is a fall
        (time_of(1.0), time_of(2.0, 0.25), Comparison(fell=["x: 1 → 2 s (100% worse)"])),
        (
            time_of(100, better="higher"),
            time_of(5, spread=1.2, better="higher"),
            Comparison(fell=["x: 100 → 5 s (95% worse)"]),
        ),
        (time_of(1.0), time_of(0.8, spread=0.3), Comparison(same=1)),
        (time_of(1.0), Figure(1000.0, "ms", "lower", 0.0), Comparison(missing=["x"], new=["x"])),
        (time_of(1.0), None, Comparison(missing=["x"])),
        (None, time_of(1.0), Comparison(new=["x"])),
        (time_of(1.0), replace(time_of(9.0), compared=False), Comparison()),
        (time_of(0.0), time_of(9.0), Comparison()),
    ],
)
def test_figures_are_sorted_by_what_became_of_them(
    before: Figure | None, now: Figure | None, expected: Comparison
) -> None:
    old, new = ({} if figure is None else {"x": figure} for figure in (before, now))
    assert compare(record_of(old), record_of(new)) == expected


def test_other_settings_are_not_compared() -> None:
    old, new = record_of({"x": time_of(1.0)}), record_of({"x": time_of(9.0)})
    found = compare(old, replace(new, settings={"batch": 16}))
    assert found == Comparison(refused="the baseline has other settings: batch 8 → 16")
    assert [*comparison_lines("loss", found)] == [f"loss: not compared, {found.refused}"]


def test_a_baseline_keeps_the_scripts_that_were_not_run(tmp_path: Path) -> None:
    old = record_of({"x": time_of(1.0)})
    other = replace(old, script="step")
    save_baseline([old, other], tmp_path)
    new = record_of({"x": time_of(2.0)})
    elsewhere = replace(new, hardware="a-gpu")
    paths = save_baseline([new, elsewhere], tmp_path)
    assert paths == [tmp_path / "a-cpu.json", tmp_path / "a-gpu.json"]
    assert read_baseline(paths[0]) == {"loss": new, "step": other}
    assert read_baseline(tmp_path / "none.json") == {}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts of a line each, and no baseline yet."""
    write = "import sys, pathlib; pathlib.Path(sys.argv[3]).write_text(pathlib.Path(__file__)"
    sources = {
        "good": f"{write}.with_suffix('.json').read_text())",
        "below": f"{write}.with_suffix('.json').read_text()); sys.exit(1)",
        "broken": "raise ValueError('no such thing')",
        "lacking": "import no_such_package",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    save_baseline(
        [record_of({"x": time_of(1.0)}, script=name) for name in ("good", "below")], tmp_path
    )
    content = json.loads((tmp_path / "a-cpu.json").read_text(encoding="utf-8"))
    for name, record in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "a-cpu.json").unlink()
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "SCRIPTS", tuple(sources))
    monkeypatch.setattr(run_all, "BASELINES", tmp_path)
    return tmp_path


def test_all_scripts_run_whatever_becomes_of_one(
    scripts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_all.main([]) == 1
    said = capfd.readouterr().out
    assert "a-cpu has no baseline to compare with; make bench ARGS=--save writes one" in said
    assert "below: status 1: a figure is not as it should be" in said
    assert "broken: failed with status 1: ValueError: no such thing" in said
    assert "lacking: the package no_such_package is not installed" in said


def test_the_exit_status_says_whether_a_figure_fell(
    scripts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_all.main(["--only", "good", "lacking"]) == 0
    assert run_all.main(["--only", "good", "--save"]) == 0
    assert run_all.main(["--only", "good"]) == 0
    record = record_of({"x": time_of(0.5)}, script="good")
    save_baseline([record], scripts)
    capfd.readouterr()
    assert run_all.main(["--only", "good"]) == 1
    assert "good: fell    x: 0.5 → 1 s (100% worse)" in capfd.readouterr().out


def test_a_script_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(600)", encoding="utf-8")
    record, why = run_all.run_script(script, seconds=0.5)
    assert record is None
    assert why == "failed: it was killed, or took more than 0.5 s"


def test_every_script_is_run_or_said_not_to_be() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("gpu")}
    assert scripts == {*run_all.SCRIPTS, *NOT_RUN}


@pytest.mark.slow
def test_a_small_set_is_trained_and_evaluated(tmp_path: Path) -> None:
    sizes = ("--beta", "0.5", "--batch", "8", "--warmup", "1", "--batches", "2")
    small = CHECKOUT / "tests" / "fixtures" / "debug" / "mds"
    places = ("--train", small, "--test", small, "--out", tmp_path)
    done = python(FOLDER / "small_set.py", *places, *sizes)
    assert done.returncode == 0, done.stderr
    _, line = done.stdout.splitlines()
    assert re.fullmatch(r" +0\.5 +8 +1 +2( +-?[\d.]+){6}", line)
