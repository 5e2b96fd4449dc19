"""The command line as a person meets it: quick, one line, said once."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PRETRAIN

from alignclip.runtime.arguments import Parser

HERE = """
import sys
from alignclip.training.command import main
try:
    main(sys.argv[1:])
finally:
    print("composer" in sys.modules, "torch" in sys.modules)
"""


def call(
    *arguments: str | Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HERE, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environ or {"LOCAL_RANK": "0"}, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lr=1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["--lr=1"], "write 'lr=1', without dashes"),
        (["-n", "2"], "override '-n'"),
        (["--batch-size", "64"], "docs/migration.md"),
    ],
)
def test_a_typo_is_one_line_before_anything_large_is_imported(
    arguments: list[str], says: str
) -> None:
    done = call(PRETRAIN.parent / "yamls" / "alignclip.yaml", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "False False\n"


def test_help_shows_examples() -> None:
    done = call("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert done.stdout.endswith("False False\n")


@pytest.mark.slow
def test_other_processes_of_the_machine_wait_for_the_first_to_speak() -> None:
    """The launcher ends them meanwhile; where the first one is well, they speak for themselves."""
    start = time.monotonic()
    environ = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}
    first = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env=environ | {"LOCAL_RANK": "0"}
    )
    try:
        done = call("nowhere.yaml", environ=environ)
    finally:
        first.kill()
        first.wait()
    assert time.monotonic() - start > 5
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (
            "conversion.cc12m",
            ["--inputs", "a", "--captoin-key", "c"],
            "--captoin-key: did you mean '--caption-key'?",
        ),
        ("conversion.cc12m", ["--no-nex=1"], "--no-next: ignored explicit argument '1'"),
        ("conversion.cc12m", ["--inputs", "a"], "the following arguments are required: --out"),
        ("conversion.retrieval", ["coco", "--skip-mising"], "did you mean '--skip-missing'?"),
        ("conversion.classification", ["--limit", "many"], "--limit many: this is no whole number"),
        ("verification.command", ["set", "--decode", "all"], "--decode all: this is no number"),
        ("verification.command", ["set", "--to"], "--to: expected one argument"),
        (
            "weights.export_command",
            ["a", "--out", "b", "--to", "openclip"],
            "--to openclip: did you mean 'open_clip'?",
        ),
        ("search", ["a", "b", "--modle=x"], "--modle: did you mean '--model'?"),
    ],
)
def test_a_mistyped_flag_is_one_line(
    module: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"alignclip.{module}").main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(f"{says}\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"), [("3", "--n 3: valid: 10, 200"), ("20", "--n 20: did you mean '200'?")]
)
def test_a_number_that_is_no_choice_is_told_with_the_nearest(
    text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("prog", None)
    parser.add_argument("--n", type=int, choices=(10, 200))
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
    assert capsys.readouterr().err == f"error: {says}\n"
