"""Wrong places are told before anything large is imported, all of them at once, and leave
nothing behind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import refused
from runs import TINY, write_set
from s3 import S3Server
from streaming import MDSWriter

import alignclip
from alignclip.config.reading import load
from alignclip.config.schema import EvaluateConfig, EvaluatorConfig, RunConfig
from alignclip.errors import UserError
from alignclip.evaluation.comparison import without_name
from alignclip.storage import leaving_nothing
from alignclip.weights import early
from alignclip.weights.locate import why_no_weights

EVALUATE = (
    "evaluators: {a: {task: gap, local: nowhere}, b: {task: sts, local: none.csv}}\nout: x/y\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_set(str(folder / "set"), count=16)
    return folder


@pytest.fixture
def yaml(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    text = TINY.replace("data: {", f"data: {{streams: {{e: {{local: {data / 'set'}}}}}, ")
    path.write_text(text + "run_name: a\nsave_folder: runs/deep/{run_name}\n", encoding="utf-8")
    return path


@pytest.fixture
def near(yaml: Path) -> None:
    """What was meant by the places that are mistyped below."""
    files = "runs/clipart/best-rank0.pt eval/coco/val/index.json eval/sts-test.csv weights/x.pt"
    for file in map(Path, files.split()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pretrained=runs/clippart", "no such file: runs/clippart; did you mean 'runs/clipart'?"),
        ("pretrained=Runs/clippart/best.pt", "did you mean 'runs/clipart/best-rank0.pt'?"),
        ("checkpoint=./rnus/clippart/best", "did you mean 'runs/clipart/best-rank0.pt'?"),
        ("load_path=weigths/x.pt", "load_path=weigths/x.pt: no such file: weigths/x.pt; did you"),
        ("load_path=wholly/other.pt", "no such file: wholly/other.pt; no weights lie there"),
        ("load_path=run.yaml", "load_path=run.yaml is no checkpoint"),
        ("save_folder=run.yaml/{run_name}", "run.yaml is a file, not a folder"),
        ("data.streams.e.split=val", "data.streams.e: no MDS set at"),
        ("data.streams.e.local=evil/cocoa/val", "(no index.json there); did you mean"),
        ("data.streams.e.local=eval/coco", "(no index.json there); there is one in eval/coco/val"),
        ("data.streams.e.local=all/other", "; set data.streams.e.remote or .local, or take it out"),
        ("evaluators.x={task: gap, local: eval/cocco, split: val}", "MDS set at eval/cocco/val ("),
        ("evaluators.x={task: sts, local: evl/sts_test.csv}", "; did you mean 'eval/sts-test.csv'"),
        ("evaluators.x={task: sts, local: s.csv}", "evaluators.x: there is no s.csv"),
    ],
)
def test_a_wrong_place_is_told_with_the_nearest(
    near: None, yaml: Path, override: str, says: str
) -> None:
    early.check_run(load(yaml))
    before = names()
    key, _, place = override.partition("=")
    with refused(re.escape(says)):
        if key == "checkpoint":
            early.check_evaluation(EvaluateConfig(checkpoint=place))
        else:
            early.check_run(load(yaml, [override]))
    assert names() == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "history.jsonl", "curves.html", "results.json", "notes.TXT"]
)
def test_a_file_that_holds_no_weights_offers_its_folder(yaml: Path, name: str) -> None:
    folder = Path("runs/emoji")
    folder.mkdir(parents=True)
    for file in (name, "latest-rank0.pt"):
        (folder / file).touch()
    place, suffix = str(folder / name), Path(name).suffix.lower()
    says = f"{place} is no checkpoint, but a {suffix} file; did you mean its folder, 'runs/emoji'?"
    with refused(f"^checkpoint: {re.escape(says)}$"):
        early.check_evaluation(EvaluateConfig(checkpoint=place))
    with refused(f"^{re.escape(says)}$"):
        alignclip.load(place)
    with refused("is no checkpoint, or only a part of one; did you mean its folder, 'runs/emo"):
        early.check_local_checkpoint(place)
    (folder / "latest-rank0.pt").unlink()  # nor has the folder anything to load
    with refused(rf"is no checkpoint, but a {suffix} file$"):
        early.check_weights("checkpoint", place)


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("s3://bucket/run/config.yaml", "s3://bucket/run"),
        ("hf-hub:org/name/config.json", "hf-hub:org/name"),
        ("hf-hub:org/name.txt", None),
        ("model.safetensors.index.json", None),
        ("folder.txt", None),
        ("config.yaml", None),  # there is no such file
    ],
)
def test_a_name_that_says_that_no_weights_are_there(
    yaml: Path, place: str, folder: str | None
) -> None:
    Path("folder.txt").mkdir()
    Path("model.safetensors.index.json").touch()
    why = why_no_weights(place)
    assert (why is None) == (folder is None)
    assert why is None or why.endswith(f"; did you mean its folder, '{folder}'?")


@pytest.mark.parametrize("name", ["best", "best-rank0.pt"])
def test_a_run_without_a_best_checkpoint_says_what_keeps_one(yaml: Path, name: str) -> None:
    Path("runs/emoji").mkdir(parents=True)
    for file in ("latest-rank0.pt", "ep0-ba20-rank0.pt"):
        Path("runs/emoji", file).touch()
    nearest = "latest" if name == "best" else "latest-rank0.pt"
    said = f"no such file: runs/emoji/{name} (best needs keep_best in the run); did you mean "
    with refused(re.escape(f"{said}'{nearest}'?")):
        early.check_weights("checkpoint", f"runs/emoji/{name}")


@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_set_without_embeddings(yaml: Path, tmp_path: Path, place: str) -> None:
    """The look takes no import of Streaming, so that a person hears of it within seconds."""
    write_set(str(tmp_path / "plain"), count=4, columns="plain")
    stream = f"data.streams.e={{{place}: {tmp_path / 'plain'}}}"
    with refused("data.streams.e has no 'semantic' column, and loss.beta > 0 needs it"):
        early.check_run(load(yaml, [stream]))
    early.check_run(load(yaml, [stream, "loss.beta=0"]))


def test_of_several_machines_none_ends_before_the_others_can_hear(
    yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for the first one until they time out; it speaks once all have met."""
    wrong = load(yaml, ["data.streams.e.local=nowhere"])
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    early.check_run(wrong)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with refused("no MDS set at nowhere"):
        early.check_run(wrong)
    monkeypatch.setenv("RANK", "1")  # of one machine's processes the first one speaks
    early.check_run(wrong)
    assert early.check_evaluation(EvaluateConfig(checkpoint="nowhere")) == {}


def test_sets_that_lack_what_their_task_reads(data: Path) -> None:
    evaluator = EvaluatorConfig(local=str(data / "set"), task="gap")
    early.check_evaluator("x", evaluator, contents=True)
    evaluator.task = "zero_shot"
    with refused(r"evaluators\.x lacks the columns \['label'\]"):
        early.check_evaluator("x", evaluator, contents=True)


PAIRS, LABELS = ("caption", "str"), ("label", "int")


NO_PAIRS = "; the set has classes and no captions: zero_shot and linear_probe read classes"


@pytest.mark.parametrize(
    ("task", "column", "says"),
    [
        ("zero_shot", PAIRS, "; the set has pairs and no classes: retrieval and gap read pairs"),
        ("retrieval", LABELS, NO_PAIRS),
        ("gap", LABELS, NO_PAIRS),
        ("zero_shot", LABELS, "there is no set/classes.json; convert/classification.py writes it"),
        ("zero_shot", ("text", "str"), "x lacks the columns ['label']; it has ['image', 'text']"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_set_of_the_other_kind_is_said_to_be_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    column: tuple[str, str],
    says: str,
    remote: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    with MDSWriter(out="set", columns=dict([("image", "bytes"), column])) as writer:
        writer.write({"image": b"", column[0]: 1 if column == LABELS else "a dog"})
    Path("set/dataset.json").touch()  # looks like classes.json, and is something else
    evaluator = EvaluatorConfig(task=task, **{"remote" if remote else "local": "set"})  # type: ignore[arg-type]
    with refused(f"{re.escape(says)}$"):
        early.check_evaluator("x", evaluator)


@pytest.mark.parametrize(
    "checkpoint", ["latest-rank0.pt", "ep0-ba2-rank0.pt"]
)  # the second: latest was lost
def test_what_a_run_starts_from_may_be_gone_when_it_goes_on(checkpoint: str, yaml: Path) -> None:
    config = load(yaml, ["pretrained=gone.pt"])
    with refused("pretrained"):
        early.check_run(config)
    folder = Path(str(early.save_folder(config)))
    folder.mkdir(parents=True)
    (folder / checkpoint).touch()
    early.check_run(config)


def test_evaluators_that_cannot_be_run_are_told_and_the_others_run(
    yaml: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (yaml.parent / "model.pt").touch()
    bad = EvaluatorConfig(local="mistyped", task="gap")
    sets = {"good": EvaluatorConfig(local=str(data / "set"), task="gap"), "bad": bad}

    def check(**changes: Any) -> dict[str, str]:
        given = {"checkpoint": "model.pt", "evaluators": sets} | changes
        return early.check_evaluation(EvaluateConfig(**given))

    failed = check()
    assert failed.keys() == {"bad"}
    assert failed["bad"].startswith("evaluators.bad: no MDS set at mistyped")
    assert "error: evaluators.bad: no MDS set at mistyped" in capsys.readouterr().err
    with refused(r"nothing can be evaluated: evaluators\.bad"):
        check(evaluators={"bad": bad})
    with refused(r"checkpoints\.x: no such file: x\.pt.*; checkpoints\.y: no such file"):
        check(checkpoint=None, checkpoints={"x": "x.pt", "y": "y.pt"})
    with refused(r"out=run\.yaml/b"):
        check(out="run.yaml/b")


@pytest.mark.parametrize(
    ("why", "rest"),
    [
        ("evaluators.d: no MDS set at x", "no MDS set at x"),
        ("evaluators.d.train: no MDS set at x", "train: no MDS set at x"),
        ("evaluators.d lacks the columns ['label']", "lacks the columns ['label']"),
        ("evaluators.dogs: no MDS set at x", "evaluators.dogs: no MDS set at x"),
        ("the set x: can't be read", "the set x: can't be read"),
    ],
)
def test_what_is_wrong_with_an_evaluator_whose_name_is_said(why: str, rest: str) -> None:
    assert without_name("d", why) == rest


def test_places_in_a_bucket(s3: S3Server, yaml: Path, data: Path) -> None:
    """All that is wrong is told in one go."""
    bucket = s3.bucket()
    wrong = [f"data.streams.e.remote={bucket}/nowhere", "data.streams.e.local=cache"]
    wrong += [f"pretrained={bucket}/none.pt", "evaluators.y={task: gap, local: two}"]
    wrong += [f"evaluators.x={{task: sts, remote: {bucket}/none.csv}}"]
    with refused(f"{bucket}/nowhere.*at two .*{bucket}/none.csv.*{bucket}/none.pt"):
        early.check_run(load(yaml, wrong))
    assert not Path("cache").exists()


def test_a_link_in_a_bucket_stands_for_its_checkpoint(
    s3: S3Server, yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    s3.client.put_object(
        Bucket=bucket.split("/")[2], Key="run/latest-rank0.pt.symlink", Body=b"run/ep0-ba2-rank0.pt"
    )
    early.check_weights("checkpoint", f"{bucket}/run/latest-rank0.pt")
    with refused(r"checkpoint: there is no .*/run/best-rank0\.pt"):
        early.check_weights("checkpoint", f"{bucket}/run/best-rank0.pt")
    goes_on = load(yaml, [f"save_folder={bucket}/run"])
    assert early._goes_on(goes_on, f"{bucket}/run")
    assert not early._goes_on(goes_on, f"{bucket}/other")
    # not every kind of store tells; what it keeps to itself may be there
    monkeypatch.setattr("alignclip.storage.clouds.S3._size", lambda *_: None)
    early.check_weights("checkpoint", f"{bucket}/run/best-rank0.pt")


def fail_in(place: Path, *files: str) -> None:
    with refused("wrong"), leaving_nothing(str(place)):
        place.mkdir(parents=True, exist_ok=True)
        for name in files:
            (place / name).touch()
        raise UserError("wrong")


def test_a_refused_command_leaves_no_empty_folder(tmp_path: Path) -> None:
    place, empty = tmp_path / "runs" / "deep" / "a", tmp_path / "empty"
    fail_in(place)
    assert list(tmp_path.iterdir()) == []
    fail_in(place, "config.yaml")
    assert (place / "config.yaml").exists()
    empty.mkdir()
    fail_in(empty)
    assert empty.exists()  # it was there before
    with leaving_nothing(str(tmp_path / "kept")):
        (tmp_path / "kept").mkdir()
    assert (tmp_path / "kept").exists()


CALL = """
import sys
from alignclip.{module} import main
try:
    sys.exit(main(sys.argv[1:]))
finally:
    print([name for name in ("torch", "streaming", "composer") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("training.command", "run.yaml data.streams.e.local=nowhere"),
        ("training.command", "run.yaml pretrained=nowhere.pt save_folder=run.yaml/x"),
        ("evaluation.command", "evaluate.yaml checkpoint=nowhere.pt"),
        ("evaluation.command", "evaluate.yaml checkpoint=model.pt"),
        ("search", "nowhere dog"),
        ("search", ". dog --model nowhere.pt"),
        ("conversion.cc12m", "--inputs nowhere --out out"),
        ("conversion.classification", "cifar10 --root nowhere --out out"),
        ("conversion.retrieval", "coco --images nowhere --annotations nowhere --out out"),
        ("verification.command", "nowhere"),
        ("weights.export_command", "nowhere.pt --to open_clip --out out"),
    ],
)
def test_a_wrong_place_is_one_line_before_anything_large_is_imported(
    yaml: Path, module: str, arguments: str
) -> None:
    (yaml.parent / "evaluate.yaml").write_text(EVALUATE, encoding="utf-8")
    for name in ("model.pt", "a.png"):
        Path(name).touch()
    before = names()
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(module=module), *arguments.split()],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout.endswith("[]\n")
    assert names() == before


def test_nobody_knows_a_placeholder_yet() -> None:
    assert early.save_folder(RunConfig(save_folder="a/{nothing}")) is None
