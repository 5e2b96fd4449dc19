"""The command that a conversion ends with: it fits the set and the machine, and is one that the
product takes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tarballs import draw, pairs, quick, write_tar

from alignclip.config.reading import load, load_evaluation
from alignclip.config.schema import RunConfig
from alignclip.conversion import next_step
from alignclip.conversion.cc12m import parse, summary
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts

REPOSITORY = Path(__file__).parents[1]
Propose = Callable[..., str]


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> Propose:
    """What the summary of a conversion says last."""
    monkeypatch.chdir(REPOSITORY)

    def propose(out: str, gpu: bool, *more: str, inputs: str = "x.tar", **counts: int) -> str:
        monkeypatch.setattr(next_step, "has_gpu", lambda: gpu)
        sides = [counts.pop("side", 256)] * 5
        options = parse(["--inputs", inputs, "--out", out, *more])
        given = {"written": 20_000, "converted": 1, "seconds": 1.0, **counts}
        return summary(Counts(sides=sides, **given), options).split("\nnext: ")[1]

    return propose


@pytest.fixture(params=[False, True])
def gpu(request: pytest.FixtureRequest) -> bool:
    """Whether the machine has one."""
    return bool(request.param)


def parsed(command: str) -> RunConfig:
    """The configuration of the run that a command starts."""
    words = shlex.split(command)
    assert words[1] == "pretrain.py"
    return load(REPOSITORY / words[2], words[3:])


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("side", [24, 72, 159, 500])
@pytest.mark.parametrize("out", ["s3://bucket/a b", "/data/cc12m", "/data/scenes", "/data/..."])
def test_the_command_is_one_that_the_product_takes(
    proposed: Propose, gpu: bool, semantic: bool, side: int, out: str
) -> None:
    for written in (1_000, 99_999, 2_000_000):
        more = [] if semantic else ["--no-semantic"]
        config = parsed(proposed(out, gpu, *more, written=written, side=side))
        ((_, stream),) = config.data.streams.items()
        assert (stream.remote if "://" in out else stream.local) == out
        assert (config.device == "cpu") != gpu
        assert (config.loss.beta > 0) == semantic
        recipe = 224 if gpu else 64
        size = config.model.vision_cfg.image_size
        assert size == recipe if side >= 160 else 32 <= size <= recipe
        assert gpu or size <= max(side, 32) or side >= 64
        assert config.global_train_batch_size * 10 <= written
        if gpu:
            assert (config.model.vision_cfg.width == 256) == (side < 160 and written < 100_000)


@pytest.mark.parametrize(
    ("gpu", "written", "batch", "warmup"),
    [
        (True, 5_000, 256, 57),
        (True, 6_000, 512, 33),
        (True, 99_999, 512, 100),
        (False, 1_000, 64, 15),
        (False, 20_000, 64, 100),
    ],
)
def test_batch_and_warm_up_fit(
    proposed: Propose, gpu: bool, written: int, batch: int, warmup: int
) -> None:
    config = parsed(proposed("/data/mine", gpu, written=written))
    assert (config.global_train_batch_size, config.scheduler.t_warmup) == (batch, f"{warmup}ba")


@pytest.mark.parametrize(
    ("out", "inputs", "whose"),
    [
        ("/data/coco-test", "x.tar", "The output's name, coco-test, says"),
        ("/data/val", "x.tar", "The output's name, val, says"),
        ("s3://bucket/Flickr_Val", "x.tar", "The output's name, Flickr_Val, says"),
        ("/data/mine", "in/val2017.tar", "The input's name, val2017.tar, says"),
        ("/data/docs", "test/", "The input's name, test, says"),
    ],
)
def test_a_test_set_is_to_be_evaluated_on(
    proposed: Propose, gpu: bool, out: str, inputs: str, whose: str
) -> None:
    command, why = proposed(out, gpu, inputs=inputs, written=5_000).split("\n")
    assert why.startswith(f"{whose} that it is a test set. RUN stands for a run's folder")
    words = shlex.split(command)
    assert words[1] == "evaluate.py"
    config = load_evaluation(REPOSITORY / words[2], words[3:])
    ((_, evaluator),) = config.evaluators.items()
    assert (evaluator.remote if "://" in out else evaluator.local) == out
    assert (config.device == "cpu") != gpu
    settings = [word for word in words if word.startswith("evaluators.")]
    assert load(REPOSITORY / "yamls" / "alignclip.yaml", settings).evaluators == config.evaluators


def test_a_small_set_is_a_first_try_or_a_test_set(proposed: Propose, gpu: bool) -> None:
    command, other, _ = proposed("/data/mine", gpu, written=400).split("\n")
    assert parsed(command).global_train_batch_size <= 40
    why = "400 samples show that all works, and teach little. If they are a test set: "
    assert other.startswith(why)
    assert " evaluate.py " in other
    assert "evaluators.mine.local=/data/mine" in other


@pytest.mark.parametrize(
    "out", ["/data/latest", "/data/contest", "/data/valley", "/data/devices", "/data/evaluator-x"]
)
def test_names_that_only_contain_such_a_word(proposed: Propose, out: str) -> None:
    assert parsed(proposed(out, True)).data.streams


def test_sizes_of_images_are_looked_at(tmp_path: Path) -> None:
    members = []
    for i in range(30):
        members += [(f"{i}.png", draw(i, "PNG", (90, 72))), (f"{i}.txt", b"a caption")]
    path, out = write_tar(tmp_path / "a.tar", members), tmp_path / "out"
    assert quick(path, out).sides == [72] * 20
    assert quick(path, out).sides == [72] * 20, "of what was complete already"


@pytest.mark.parametrize("out", ["s3://bucket/mine", "/data/mine"])
def test_of_a_set_with_a_held_out_split_the_rest_is_trained_on(
    proposed: Propose, gpu: bool, out: str
) -> None:
    held = parsed(proposed(out, gpu, "--held-out", "0.1", written=6_000, held_out=600))
    less = parsed(proposed(out, gpu, written=5_400))
    assert held.global_train_batch_size == less.global_train_batch_size
    assert held.scheduler.t_warmup == less.scheduler.t_warmup
    assert less.evaluators == {}
    ((name, evaluator),) = held.evaluators.items()
    assert (name, evaluator.task, evaluator.split) == ("mine-val", "retrieval", "val")
    assert (evaluator.remote if "://" in out else evaluator.local) == out
    assert held.data.streams == less.data.streams


# a second input


def test_more_inputs_say_what_is_there_and_what_is_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_tar(tmp_path / f"{i}.tar", pairs(10 * i, 5 + i)) for i in range(2))
    out = tmp_path / "out"
    quick(first, out, progress=True)
    assert "holds" not in capsys.readouterr().err
    counts = quick([first, second], out, progress=True)
    said = f"{out} holds 5 samples from 1 input; 1 input added ({second})\n"
    assert said in capsys.readouterr().err
    words = summary(counts, ConvertOptions([str(second)], str(out), semantic=False)).split()
    assert " there before 5 added 6 " in " ".join(words)
    quick([first, second], out, progress=True)
    assert "holds" not in capsys.readouterr().err, "nothing is added"
    for name in ("index.json", "1/counts.json"):  # as a kill leaves it
        (out / name).unlink()
    third = write_tar(tmp_path / "2.tar", pairs(20, 1))
    quick([first, second, third], out, progress=True)
    said = (
        f"{out} holds 5 samples from 1 input; 1 input added ({third}), 1 input of its own left "
        f"to convert\n"
    )
    assert said in capsys.readouterr().err
