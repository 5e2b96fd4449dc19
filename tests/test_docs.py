"""The documents: every key, command and file that they name is there, and docs/migration.md forgets
no flag.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

from alignclip.config.keys import keys_of
from alignclip.config.plugged import LOSS_TERMS
from alignclip.config.reading import load, load_evaluation
from alignclip.config.schema import EvaluatorConfig, RunConfig
from alignclip.config.typed import SettingError, UnknownKeyError, convert_section
from alignclip.errors import UserError
from alignclip.runtime.arguments import read_arguments
from alignclip.training import plugins

ROOT = Path(__file__).parent.parent
MIGRATION = ROOT / "docs" / "migration.md"
READERS: dict[str, Callable[[Path, list[str]], object]] = {
    "pretrain.py": load,
    "evaluate.py": load_evaluation,
}

# Of main/params.py of https://github.com/sarahESL/AlignCLIP at commit a18e805, besides those that
# open_clip has, too.
PUBLISHED = """
alpha beta cifar10 cifar100 clip-inModality-loss clip-loss flickr flickr-annot flowers-102
food-101 imagenet-a imagenet-o imagenet-r imagenet-sketch imagenet-train linear_probe_num_epochs
linear_probing ms-coco ms-coco-annot nl_semantic_supervision separate_image separate_text stanford
"""


def tables() -> dict[str, list[tuple[str, ...]]]:
    """The rows of each section's table, as cells, without its head and the rows that are
    headings.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    section = ""
    for line in MIGRATION.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| **"):
            found.setdefault(section, []).append(
                tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
            )
    return {name: rows[1:] for name, rows in found.items()}


_, OWN, OPEN_CLIP = tables().values()
CODE = re.compile(r"`([^`]+)`")


def flags(rows: list[tuple[str, ...]]) -> set[str]:
    return {code.removeprefix("--") for row in rows for code in CODE.findall(row[0])}


def open_clips_flags() -> set[str]:
    """What open_clip's parser is given, read from its source: it builds the parser and parses in
    one function.
    """
    spec = importlib.util.find_spec("open_clip_train.params")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    adds = [call for call in calls if ast.unparse(call.func).endswith(".add_argument")]
    return {ast.literal_eval(call.args[0]).removeprefix("--") for call in adds}


def test_every_flag_of_open_clip_has_a_row() -> None:
    assert flags(OPEN_CLIP) == open_clips_flags()


def test_every_flag_of_the_published_script_has_a_row() -> None:
    assert set(PUBLISHED.split()) <= flags(OWN)
    assert not set(PUBLISHED.split()) & open_clips_flags()
    assert flags(OWN) - set(PUBLISHED.split()) <= open_clips_flags()


def check_key(key: str) -> None:
    """Raise what a run says of a key that it doesn't have."""
    tree: object = None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    try:
        convert_section(tree, RunConfig, "")
    except SettingError as error:
        if isinstance(error, UnknownKeyError):  # and not that null is no value of the key's
            raise


def is_command(code: str) -> bool:
    return code.split()[0] in ("composer", "python") or code.endswith(".py") or ".py " in code


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    done = processes.command(*command, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_command(code: str) -> None:
    """The script is there, and it, or the launcher, has the options."""
    program, *arguments = shlex.split(re.sub(r"[\[\]]", "", code), comments=True)
    if program == "python" and arguments[0] != "-m":
        program, *arguments = arguments
    if program == "composer":
        command: tuple[str, ...] = (str(Path(sys.executable).with_name("composer")),)
    elif program == "python":
        command, arguments = (sys.executable, *arguments[:2]), arguments[2:]
        assert importlib.util.find_spec(command[-1]), code
    else:
        command = (sys.executable, str(ROOT / program))
        assert (ROOT / program).exists(), code
    for option in [argument for argument in arguments if argument.startswith("-")]:
        assert re.search(rf"(^|[\s,]){option}\b", help_of(command)), f"{code}: no option {option}"


@pytest.mark.parametrize("row", [*OWN, *OPEN_CLIP], ids=lambda row: row[0])
def test_keys_exist_and_values_are_taken(row: tuple[str, ...]) -> None:
    """``key=value`` of a row are read together, over the recipe.

    Of other keys it is enough that they are there.
    """
    where, overrides = row[1], []
    if where == "not kept":
        assert row[2]
        return
    codes = CODE.findall(where)
    assert codes
    for code in codes:
        if is_command(code):
            check_command(code)
        elif "=" in code:
            overrides.append(code)
        else:
            check_key(code)
    if any(override.startswith("evaluators.") for override in overrides):
        evaluated = overrides[0].split(".")[1]
        task = next((o.partition("=")[2] for o in overrides if ".task=" in o), "retrieval")
        keys = keys_of(EvaluatorConfig, task).items()
        needed = [f"{name}." for name, key in keys if key.default() is dataclasses.MISSING]
        sets = [f"evaluators.{evaluated}.{part}local=x" for part in ("", *needed)]
        overrides += [f"evaluators.{evaluated}.task={task}", *sets]
    config = load(ROOT / "yamls" / "alignclip.yaml", overrides)
    plugins.check(config)


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "convert" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WITHOUT_COMMANDS = {
    "python.md",
    "configuration.md",
    "resume.md",
    "architecture.md",
    "clusters.md",
}  # of docs
SECTIONS = (
    "model|loss|data|optimizer|scheduler|evaluators|keep_best|parallelism_config|compile_config"
)
each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def commands(path: Path) -> list[str]:
    """Lines of the fenced shell blocks, joined where they go on, and what stands in backticks and
    is a command.
    """
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # $((…)) is arithmetic of the shell's
    lines = [re.sub(r"\$\(\(.*?\)\)", "0", line).replace(".venv/bin/", "") for line in lines]
    codes = CODE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    starts = re.compile(r"composer |python (?!-c)|(convert|benchmarks)/\w+\.py")
    return [line for line in [*lines, *codes] if starts.match(line)]


def check_whole_command(command: str) -> None:
    """Options are the script's, settings are read with its YAML."""
    words = [word for word in shlex.split(command, comments=True) if word != "…"]
    script = next((word for word in words if word in READERS), None)
    if script is None or words[-1] == script:
        check_command(command)
        return
    asked = read_arguments(
        words[words.index(script) + 1 :], script, "", "", has_dry_run=script == "pretrain.py"
    )
    yaml, overrides = asked.config, asked.overrides
    if "://" in yaml:  # what a run has left
        yaml = "yamls/alignclip.yaml"
    yaml = yaml if yaml != "my.yaml" else "yamls/evaluate.yaml"
    if script == "evaluate.py" and not any(
        override.startswith("checkpoint") for override in overrides
    ):
        overrides.append("checkpoint=any")
    READERS[script](ROOT / yaml, overrides)


@each_document
def test_commands_can_be_given(path: Path) -> None:
    found = commands(path)
    assert bool(found) == (path.name not in WITHOUT_COMMANDS)
    for command in found:
        check_whole_command(command)


SCRIPTS = [
    *READERS,
    *(
        f"convert/{name}.py"
        for name in ("cc12m", "classification", "retrieval", "verify", "checkpoint")
    ),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_of_the_help_can_be_given(script: str) -> None:
    """In an example a trailing backslash joins two lines; ``#`` begins a remark."""
    text = help_of((sys.executable, str(ROOT / script)))
    # a backslash that Python ate leaves one long line
    assert max(map(len, text.splitlines())) <= 120
    lines = text.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
    examples = [line.strip() for line in lines if re.match(r"\s+(composer|python) ", line)]
    assert examples
    for example in examples:
        check_whole_command(example)


@each_document
def test_keys_in_the_text_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in CODE.findall(text):
        key = re.match(rf"({SECTIONS})(\.\w[\w-]*)+(?=$|=|:)", code)
        if key:
            check_key(key[0])


@each_document
def test_files_that_are_named_are_there(path: Path) -> None:
    """Scripts, YAMLs and links to files."""
    text = path.read_text(encoding="utf-8")
    names = set(
        re.findall(r"(?:convert|yamls|benchmarks|docs|alignclip)/[\w/.-]+\.(?:py|yaml|md)", text)
    )
    names |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    missing = {
        name for name in names if not (ROOT / name).exists() and not (path.parent / name).exists()
    }
    assert not missing


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_the_document_has_every_loss_term(term: str) -> None:
    module = importlib.import_module(LOSS_TERMS[term])
    keys = ", ".join(f"`{one.name}`" for one in dataclasses.fields(module.Settings))
    sentence = str(module.__doc__).partition("\n")[0].removesuffix(".")
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert f"| `{term}` | {keys} | {sentence} |" in page


def test_a_key_that_is_not_there_would_be_found() -> None:
    with pytest.raises(UserError, match="did you mean 'lr'"):
        check_key("optimizer.lrr")


def test_each_fault_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 80
    for file, name in named:
        assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
