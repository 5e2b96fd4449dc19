"""The command that comes after a conversion: a recipe that fits the set and this machine."""

from __future__ import annotations

import math
import re
import shlex
import statistics
import sys
from pathlib import Path

from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.storage.staging import VAL

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL_SET = (
    100_000  # samples: below, the recipe's warm-up and canonical nodes would be most of the run
)
FEW = 1_000  # samples: fewer may be a test set as well as a first try
RECIPE_SIDE = 224  # pixels of the published recipes' images
SMALL_SIDE = 160  # pixels: the recipes would mostly enlarge smaller pictures
CPU_SIDE = 64  # pixels of the CPU recipe's images
SMALL_MODEL = [
    *("model.embed_dim=256", "model.vision_cfg.width=256", "model.vision_cfg.layers=6"),
    *("model.text_cfg.width=256", "model.text_cfg.layers=6", "model.text_cfg.heads=4"),
]
TEST_NAME = re.compile(
    r"(?<![a-z])(test|testing|val|valid|validation|dev|eval|evaluation)\d*(?![a-z])", re.IGNORECASE
)


def next_step(out: str, counts: Counts, options: ConvertOptions) -> str:
    """Return the command that trains on the set, to be pasted where this one was started.

    For a test set return the command that evaluates a model on it.

    Args:
        out: the set's place.
        counts: of the whole set.
        options: of this conversion.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", out.rpartition("/")[2]).strip("-") or "mine"
    settings = [
        "evaluators=null",
        f"evaluators.{name}.task=retrieval",
        *_place_settings(f"evaluators.{name}", name, out),
    ]
    words = [] if has_gpu() else ["device=cpu", "precision=fp32"]
    evaluate = _command(
        "evaluate.py", [_recipe_path("evaluate"), "checkpoint=RUN", *words, *settings]
    )
    run = f"RUN stands for a run's folder; a run takes the settings evaluators.{name}.…, too"
    if whose := _named_for_tests(out, options):
        return f"{evaluate}\n{whose} that it is a test set. {run}."
    train = _command("pretrain.py", _training_words(name, out, counts, options))
    if _trained_on(counts) >= FEW:
        return train
    small = f"{_trained_on(counts):,} samples show that all works, and teach little"
    return f"{train}\n{small}. If they are a test set: {evaluate}\n{run}."


def recipe_side(counts: Counts) -> int:
    """Return the size of the images that a published recipe trains on, in pixels."""
    side = _side(counts)
    return RECIPE_SIDE if side >= SMALL_SIDE else _multiple(side)


def has_gpu() -> bool:
    """Say whether this machine has a GPU that PyTorch can use."""
    import torch

    return torch.cuda.is_available()


def _command(script: str, words: list[str]) -> str:
    composer = Path(sys.executable).with_name("composer")
    start = str(_from_here(composer)) if composer.exists() else "composer"
    return shlex.join([start, str(_from_here(REPOSITORY / script)), *words])


def _named_for_tests(out: str, options: ConvertOptions) -> str:
    """Say whose name tells that a set is for evaluation; "" for nobody's."""
    if TEST_NAME.search(name := out.rpartition("/")[2]):
        return f"The output's name, {name}, says"
    inputs = [Path(place.split("?")[0]).name for place in options.inputs]
    if not inputs or not all(map(TEST_NAME.search, inputs)):
        return ""
    if not inputs[1:]:
        return f"The input's name, {inputs[0]}, says"
    return f"The inputs' names ({', '.join(inputs[:3])}{', …' if inputs[3:] else ''}) say"


def _trained_on(counts: Counts) -> int:
    """Return the number of samples outside of the held-out split."""
    return counts.written - counts.held_out


def _training_words(name: str, out: str, counts: Counts, options: ConvertOptions) -> list[str]:
    """Return a recipe and its settings: on a GPU the published one, else the one of laptop size."""
    gpu, samples, side = has_gpu(), _trained_on(counts), _side(counts)
    published = "alignclip" if options.semantic else "sharedclip"
    stream = "cc12m" if gpu else "scenes"  # of the recipe
    words = [_recipe_path(published if gpu else "quickstart"), f"run_name={name}"]
    words += [] if gpu else ["save_folder=runs/{run_name}"]
    words += [] if name == stream else [f"data.streams.{stream}=null"]
    words += _place_settings(f"data.streams.{name}", name, out)
    if counts.held_out:
        section = f"evaluators.{name}-{VAL}"
        words += [f"{section}.task=retrieval", *_place_settings(section, name, out)]
        words += [f"{section}.split={VAL}"]
    words += [] if gpu or options.semantic else ["loss.beta=0"]
    words += _image_size(side, SMALL_SIDE if gpu else CPU_SIDE)
    if not gpu:
        return words + _fitting(samples, batch=64, epochs=5, share=0.2)
    if samples < SMALL_SET:
        words += SMALL_MODEL if side < SMALL_SIDE else []
        words += ["data.num_canonical_nodes=1"]
        words += _fitting(samples, batch=512, epochs=30, share=0.1)
    return words


def _recipe_path(name: str) -> str:
    return str(_from_here(REPOSITORY / "yamls" / f"{name}.yaml"))


def _place_settings(section: str, name: str, out: str) -> list[str]:
    if "://" in out:
        return [f"{section}.remote={out}", f"{section}.local=/tmp/{name}"]
    return [f"{section}.local={out}"]


def _side(counts: Counts) -> int:
    """Return the shorter side of most pictures in pixels."""
    return int(statistics.median(counts.sides)) if counts.sides else RECIPE_SIDE


def _image_size(side: int, least: int) -> list[str]:
    """Return the size of what the model sees, where pictures are smaller than ``least`` pixels."""
    if side >= least:
        return []
    side = _multiple(side)
    return [
        f"model.vision_cfg.image_size={side}",
        f"model.vision_cfg.patch_size={16 if side >= 128 else 8}",
    ]


def _multiple(side: int) -> int:
    """Return the size of a model's images for pictures of this side."""
    return max(32, side // 16 * 16)


def _fitting(samples: int, batch: int, epochs: int, share: float) -> list[str]:
    """Return a batch that leaves ten in an epoch, and a warm-up of a share of the run.

    Args:
        samples: that are trained on.
        batch: the recipe's.
        epochs: of the recipe's run.
        share: of the run that is its warm-up.
    """
    fitting = batch if samples >= 10 * batch else max(2, 2 ** int(math.log2(max(samples, 20) / 10)))
    warmup = min(100, max(1, int(epochs * (samples // fitting) * share)))
    return ([] if fitting == batch else [f"global_train_batch_size={fitting}"]) + [
        f"scheduler.t_warmup={warmup}ba"
    ]


def _from_here(path: Path) -> Path:
    """Return a path relative to the working directory where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
