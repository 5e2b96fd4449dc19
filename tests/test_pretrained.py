"""``pretrained``: checkpoints of every origin into models that share nothing, something or everything."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.utils import get_device
from models import EVERYTHING, FIXTURES, config_of, reference, small_config
from omegaconf import OmegaConf
from runs import run, write_config, write_set
from safetensors.torch import save_file
from torch import Tensor

from alignclip.config import reading
from alignclip.config.schema import ModelConfig, StartConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.training.build import build_trainer
from alignclip.training.locking import lock_towers
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.formats.release import renamed
from alignclip.weights.start_from import load_pretrained

TOWERS = {  # of a tensor that can be shared: its name in the text tower, in the vision tower
    "blocks": ("transformer.", "visual.transformer."),
    "ln_final": ("ln_final.", "visual.ln_post."),
    "projection": ("text_projection", "visual.proj"),
}


def stock(config: ModelConfig, seed: int = 1) -> open_clip.CLIP:
    """open_clip's own model, every tensor random: both towers differ everywhere."""
    torch.manual_seed(seed)
    vision, text = dataclasses.asdict(config.vision_cfg), dataclasses.asdict(config.text_cfg)
    model = open_clip.CLIP(config.embed_dim, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.logit_scale.fill_(1.5)
    return model


def training_checkpoint(model: torch.nn.Module, path: Path) -> Path:
    """As open_clip_train's main writes ``epoch_N.pt`` of a distributed run."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.save(
        {"epoch": 32, "name": "x", "state_dict": weights, "optimizer": optimizer.state_dict()}, path
    )
    return path


def fresh(config: ModelConfig) -> CLIP:
    torch.manual_seed(7)
    return build_encoders(config)


def start(config: ModelConfig, place: Path | str, shared_from: str = "text") -> tuple[CLIP, str]:
    model = fresh(config)
    state = torch.get_rng_state()
    report = load_pretrained(model, str(place), shared_from, config).text
    assert torch.equal(torch.get_rng_state(), state)
    return model, report


def refusal(config: ModelConfig, place: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_pretrained(fresh(config), str(place), "text", config)
    assert str(error.value).startswith("pretrained: ")
    assert "\n" not in str(error.value)
    return str(error.value)


# --- where the weights come from --------------------------------------------------------------------------------------


def test_a_training_checkpoint_of_open_clip(tmp_path: Path) -> None:
    """open_clip's own text tower with its own parameter names, nothing beside the file."""
    config = small_config()
    source = stock(config)
    path = tmp_path / "epoch_32.pt"
    before = {name: value.clone() for name, value in source.state_dict().items()}
    torch.save({"epoch": 32, "state_dict": {f"module.{k}": v for k, v in before.items()}}, path)
    model, report = start(config, path)
    assert report == f"pretrained: {path}: loaded {len(before)} of {len(before)} tensors"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].reshape(value.shape)), name
    assert model.logit_scale.shape == (1,)


def test_with_the_optimizer_in_it(tmp_path: Path) -> None:
    _, report = start(
        small_config(), training_checkpoint(stock(small_config()), tmp_path / "epoch_32.pt")
    )
    assert "left over" not in report


def test_text_tower_of_its_own_and_half_precision(tmp_path: Path) -> None:
    """open_clip's CustomTextCLIP has ``text.`` before the names."""
    config = small_config()
    vision, text = dataclasses.asdict(config.vision_cfg), dataclasses.asdict(config.text_cfg)
    source = open_clip.CustomTextCLIP(config.embed_dim, vision_cfg=vision, text_cfg=text).half()
    torch.save(source.state_dict(), tmp_path / "custom.pt")
    model, report = start(config, tmp_path / "custom.pt")
    assert re.fullmatch(r"pretrained: \S+: loaded (\d+) of \1 tensors", report)
    weights = source.state_dict()
    assert torch.equal(model.token_embedding.weight, weights["text.token_embedding.weight"].float())
    assert torch.equal(model.visual.proj, weights["visual.proj"].float())


@pytest.mark.parametrize("shared", [EVERYTHING, {"blocks": 1}, {}], ids=["all", "some", "none"])
def test_a_release(tmp_path: Path, shared: dict[str, Any]) -> None:
    published = reference("micro")
    path = Path(shutil.copy(FIXTURES / "model_micro.pt", tmp_path))
    config = config_of(published["config"], **shared)
    # its heads are 16 wide, which the file doesn't say
    assert "heads are 64 wide, but with model.text_cfg.heads" in (said := refusal(config, path))
    assert said.endswith(
        "as all published ones; if these are others, say so with a config.yaml beside the file"
    )
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(config)})
    )
    model, report = start(config, path)
    # one set of numbers for both towers: nothing to choose, and nothing to say but whose they are
    assert re.fullmatch(
        r"pretrained: \S+: loaded (\d+) of \1 tensors\n  licence: cc-by-nc-nd-4.0, .*", report
    )
    weights = renamed(published["state_dict"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name].reshape(value.shape)), name


def test_an_export_that_we_could_not_load(tmp_path: Path) -> None:
    config = small_config()
    model_cfg = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": dataclasses.asdict(config.vision_cfg),
    }
    model_cfg["text_cfg"] = dataclasses.asdict(config.text_cfg) | {"pool_type": "last"}
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}})
    (tmp_path / "open_clip_config.json").write_text(text)
    save_file(stock(config).state_dict(), tmp_path / "open_clip_model.safetensors")
    _, report = start(config, tmp_path)
    assert "it was trained with what our encoders don't have: text_cfg.pool_type" in report
    assert "it was trained with quick_gelu: set model.quick_gelu=true" in report
    assert "normalised with another mean: [0.5, 0.5, 0.5]" in report
    assert "quick_gelu" not in start(dataclasses.replace(config, quick_gelu=True), tmp_path)[1]
    # settings that are none
    for key, wrong, words in (
        ("preprocess_cfg", {"mean": 0.5}, ""),
        ("preprocess_cfg", ["mean"], "images can't be prepared"),
        ("preprocess_cfg", {"mean": [0.5, 0.5]}, "mean has 2 numbers, not 3"),
        ("model_cfg", {"vision_cfg": "ViT-B-16"}, "its vision_cfg is a str, not a section"),
    ):
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({**json.loads(text), key: wrong})
        )
        if words:
            assert words in refusal(config, tmp_path)
        else:
            assert "normalised with another mean: [0.5, 0.5, 0.5]" in start(config, tmp_path)[1]
    (tmp_path / "open_clip_config.json").write_text(text)
    # the same shapes, other heads
    other = small_config(vision={"head_width": 8})
    assert (
        "the checkpoint's vision heads are 16 wide, but with model.vision_cfg.head_width=8 they are 8"
        in refusal(other, tmp_path)
    )
    assert "with model.text_cfg.heads=4 they are 8" in refusal(
        small_config(text={"heads": 4}), tmp_path
    )


def test_open_clip_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config()
    assert (
        "open_clip's ViT-B-16 has no weights 'openia'; write ViT-B-16/TAG; did you mean 'openai'?"
        in refusal(config, "ViT-B-16/openia")
    )
    assert "write ViT-B-16/TAG" in refusal(config, "ViT-B-16")
    assert "no model ViT-B16 with weights 'openai'; did you mean 'ViT-B-16'?" in refusal(
        config, "ViT-B16/openai"
    )
    # offline, as every test is: the Hub's cache has no such thing
    assert "hf-hub:timm/vit_base_patch16_clip_224.openai" in refusal(config, "ViT-B-16/openai")
    # a file of that name is a file
    (tmp_path / "ViT-B-16").mkdir()
    torch.save(stock(config).state_dict(), tmp_path / "ViT-B-16" / "openai")
    assert "loaded" in start(config, "ViT-B-16/openai")[1]


def test_the_recipes_example_fits() -> None:
    """What yamls/finetune-retrieval.yaml says that open_clip's ViT-B-16/openai wants."""
    recipe = Path(__file__).parent.parent / "yamls" / "finetune-retrieval.yaml"
    text = recipe.read_text()
    assert (
        "ViT-B-16/openai has a text tower 512 wide, so it wants embed_dim 512, text_cfg.width 512"
        in text
    )
    assert (
        "text_cfg.heads 8, quick_gelu true, and shared {blocks: 0, ln_final: false, projection: false}"
        in text
    )
    overrides = ["pretrained=ViT-B-16/openai", "model.embed_dim=512", "model.text_cfg.width=512"]
    overrides += ["model.text_cfg.heads=8", "model.quick_gelu=true", "model.shared.blocks=0"]
    overrides += ["model.shared.ln_final=false", "model.shared.projection=false", "run_name=r"]
    config = reading.load(recipe, overrides).model
    theirs = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        ours, model = build_encoders(config), open_clip.CLIP(**theirs)
    shapes = {name: value.shape for name, value in model.state_dict().items()} | {
        "logit_scale": torch.Size([1])
    }
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"]
    assert (config.vision_cfg.head_width, config.text_cfg.width // config.text_cfg.heads) == (
        64,
        64,
    )


# --- what fits ---------------------------------------------------------------------------------------------------


SHARED = {
    "all": EVERYTHING,
    "blocks": {"blocks": 2},
    "the rest": {"ln_final": True, "projection": True},
}


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_two_towers_into_shared_modules(tmp_path: Path, shared: dict[str, Any], tower: str) -> None:
    """Of unequal depth: the last two text blocks are the last two of the image tower, three deep."""
    layers = 3 if shared.get("blocks") == -1 else 2
    config = small_config(shared=shared, text={"layers": layers})
    weights = stock(config).state_dict()
    torch.save(weights, tmp_path / "two.pt")
    model, report = start(config, tmp_path / "two.pt", tower)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    assert any(len(group) == 2 for group in names.values())
    for group in names.values():
        chosen = next(
            n for n in group if len(group) == 1 or n.startswith("visual.") == (tower == "vision")
        )
        assert torch.equal(parameters[chosen], weights[chosen].reshape(parameters[chosen].shape)), (
            group
        )
    expected = {"all": "transformer.resblocks.0-2", "blocks": "transformer.resblocks.0-1"}
    told = [line for line in report.splitlines() if "shared modules" in line]
    assert len(told) == 1
    assert f"from the {tower} tower: " in told[0]
    for key, value in SHARED.items():
        if value == shared and key in expected:
            assert expected[key] in told[0]
        if value == shared and key != "blocks":
            assert "ln_final" in told[0]
    assert "left over" not in report


def test_the_other_tower_where_one_does_not_fit(tmp_path: Path) -> None:
    """A ViT-B-16 of open_clip has a text tower two thirds as wide: everything shared comes from the image tower."""
    source = stock(small_config(text={"width": 16, "heads": 1}))
    torch.save(source.state_dict(), tmp_path / "narrow.pt")
    model, report = start(small_config(shared=EVERYTHING), tmp_path / "narrow.pt")
    vision = source.state_dict()
    for name, value in model.visual.state_dict().items():
        assert torch.equal(value, vision[f"visual.{name}"]), name
    assert (
        "shared modules from the vision tower: text_projection, transformer.resblocks.0-2, ln_final"
        in report
    )
    assert (
        "of another shape: positional_embedding ([12, 16], not [12, 32]), token_embedding" in report
    )
    assert "([64, 16], not [64, 32])" in report
    untouched = fresh(small_config(shared=EVERYTHING))
    assert torch.equal(model.token_embedding.weight, untouched.token_embedding.weight)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_shared_block_comes_from_one_tower(tmp_path: Path, tower: str) -> None:
    """Where the other tower's MLPs don't fit, its attention isn't taken either."""
    config = small_config(shared=EVERYTHING)
    part = {"text": "vision", "vision": "text"}[tower]  # the one that has narrow MLPs
    weights = stock(small_config(**{part: {"mlp_ratio": 2.0}})).state_dict()
    torch.save(weights, tmp_path / "narrow.pt")
    model, report = start(config, tmp_path / "narrow.pt", part)
    prefix = TOWERS["blocks"][tower == "vision"]
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, weights[f"{prefix}{name}"]), name
    assert f"shared modules from the {tower} tower: transformer.resblocks.0-2" in report
    # what stands alone is the one that was asked for
    assert torch.equal(model.text_projection, weights[TOWERS["projection"][part == "vision"]])


def test_what_is_missing_left_over_or_of_another_shape_is_listed(tmp_path: Path) -> None:
    config = small_config()
    weights = stock(small_config(vision={"layers": 5})).state_dict()
    for name in [n for n in weights if n.startswith("transformer.resblocks.1.")]:
        del weights[name]
    weights["token_embedding.weight"] = torch.randn(60, 32)
    weights["logit_bias"] = torch.zeros(())
    torch.save(weights, tmp_path / "odd.pt")
    model, report = start(config, tmp_path / "odd.pt")
    lines = report.splitlines()
    total = len(model.state_dict())
    assert lines[0].endswith(f"loaded {total - 13} of {total} tensors")
    assert "  not in the checkpoint: transformer.resblocks.1" in lines
    assert "  of another shape: token_embedding ([60, 32], not [64, 32])" in lines
    assert "  left over: logit_bias, visual.transformer.resblocks.3-4" in lines
    untouched = fresh(config).state_dict()
    for name, value in model.state_dict().items():
        initial = name.startswith("transformer.resblocks.1.") or name == "token_embedding.weight"
        assert torch.equal(value, (untouched if initial else weights)[name].reshape(value.shape)), (
            name
        )


def test_position_embeddings_are_resized_as_open_clip_does(tmp_path: Path) -> None:
    small, large = (
        small_config(),
        small_config(vision={"image_size": 64}, text={"context_length": 20}),
    )
    source = stock(small)
    torch.save(source.state_dict(), tmp_path / "small.pt")
    model, report = start(large, tmp_path / "small.pt")
    assert "resized: visual.positional_embedding 5 → 17, positional_embedding 12 → 20" in report
    theirs = stock(large, seed=2)
    open_clip.load_checkpoint(theirs, str(tmp_path / "small.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name].reshape(value.shape)), name
    assert torch.equal(model.visual.positional_embedding[0], source.visual.positional_embedding[0])


@pytest.mark.parametrize(
    "positions", [torch.randn(7, 32), torch.randn(4), torch.randn(0, 32)], ids=["6", "1-D", "0"]
)
def test_position_embeddings_that_are_no_grid(tmp_path: Path, positions: Tensor) -> None:
    weights = stock(small_config()).state_dict() | {"visual.positional_embedding": positions}
    torch.save(weights, tmp_path / "odd.pt")
    assert (
        "of another shape: visual.positional_embedding"
        in start(small_config(), tmp_path / "odd.pt")[1]
    )


def test_what_is_not_this_model(tmp_path: Path) -> None:
    config = small_config()
    says = {
        "other.pt": "loaded 0 of",
        "text.pt": "holds hello",
        "alone.pt": "loaded 1 of",
        "bad.pt": "could run code",
    }
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"hello": "world"}, tmp_path / "text.pt")
    torch.save({"logit_scale": torch.ones(())}, tmp_path / "alone.pt")
    torch.save({"state_dict": {}, "args": functools.partial(print)}, tmp_path / "bad.pt")
    for name, text in says.items():
        assert text in refusal(config, tmp_path / name)
    assert "which is not this model" in refusal(config, tmp_path / "other.pt")
    assert "no such file" in refusal(config, tmp_path / "missing.pt")
    # an integer is no weight
    weights = stock(config).state_dict()
    weights["visual.proj"] = weights["visual.proj"].long()
    torch.save(weights, tmp_path / "integers.pt")
    assert "of another shape: visual.proj" in start(config, tmp_path / "integers.pt")[1]


# --- in a run --------------------------------------------------------------------------------------------------------


FIXED = (
    "max_duration=8ba",
    "data.num_workers=0",
    "run_name=r",
    "scheduler.t_warmup=1ba",
    "save_interval=3ba",
)
START = ("lock_image=true", "lock_image_unlocked_groups=2", "optimizer.layer_decay=0.5", "model.shared.blocks=0",
         "model.shared.ln_final=false", "model.shared.projection=false")  # fmt: skip


def test_a_run_goes_on_without_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked, decayed by layer, started from open_clip's checkpoint, which is gone when it goes on."""
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved"))
    path = tmp_path / "epoch_32.pt"
    logger = "loggers.InMemoryLogger={}"
    config = reading.load(yaml, (*FIXED, *START, logger, f"pretrained={path}"))
    source = stock(config.model).eval()
    torch.save({"state_dict": source.state_dict()}, path)

    losses, ends = [], []
    for part in range(2):
        folder = SaveFolder(config)
        folder.check_config()
        trainer = build_trainer(config, get_device("cpu"), folder)
        folder.write_config()
        trainer.fit()
        (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
        losses.append([float(value) for _, value in memory.data["loss/train/total"]])
        ends.append({n: v.clone() for n, v in trainer.state.model.encoders.state_dict().items()})
        rates = [group["initial_lr"] for group in trainer.state.optimizers[0].param_groups]
        assert rates[0] == 1e-3
        assert min(rates) == 1e-3 * 0.5**3
        trainer.close()
        printed = capsys.readouterr().out
        assert ("pretrained: " in printed) == (part == 0)
        path.unlink(missing_ok=True)
        (tmp_path / "saved" / "latest-rank0.pt").unlink()
        (tmp_path / "saved" / "latest-rank0.pt").symlink_to("ep0-ba3-rank0.pt")
    assert len(losses[0]) == 8
    assert losses[1] == losses[0][3:]
    weights = source.state_dict()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        locked = name.startswith("visual.") and not name.startswith(
            ("visual.proj", "visual.ln_post", "visual.transformer.resblocks.1.")
        )
        assert torch.equal(value, weights[name].reshape(value.shape)) == locked, name

    # as part of what the run is
    for override, says in (
        ("pretrained=other.pt", f"pretrained: {path} → other.pt"),
        ("lock_image_unlocked_groups=1", "lock_image_unlocked_groups: 2 → 1"),
        ("optimizer.layer_decay=0.6", "optimizer.layer_decay: 0.5 → 0.6"),
    ):
        changed = reading.load(yaml, (*FIXED, *START, logger, f"pretrained={path}", override))
        with pytest.raises(UserError, match=re.escape(says)):
            SaveFolder(changed).check_config()
    # a new one needs the file
    new = reading.load(
        yaml, (*FIXED, *START, "run_name=n", f"pretrained={path}", f"save_folder={tmp_path}/new")
    )
    with pytest.raises(UserError, match=r"pretrained: no such file"):
        build_trainer(new, get_device("cpu"), SaveFolder(new))


def test_locked_towers_are_as_they_were_trained(tmp_path: Path) -> None:
    """What is locked comes from the checkpoint whole, with its pixels and its activation, or not at all."""
    config = small_config()
    path = tmp_path / "open_clip_model.safetensors"
    weights = stock(config).state_dict()
    settings = {"embed_dim": 16, "vision_cfg": dataclasses.asdict(config.vision_cfg)}
    settings["text_cfg"] = dataclasses.asdict(config.text_cfg)

    def lock(
        lacking: tuple[str, ...] = (), pixels: Any = None, locks: str = "lock_image", **given: Any
    ) -> str:
        save_file(
            {name: value for name, value in weights.items() if not name.startswith(lacking or " ")},
            path,
        )
        described = {"model_cfg": settings | given, "preprocess_cfg": pixels or {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        model = fresh(config)
        report = load_pretrained(model, str(tmp_path), "text", config)
        groups = {"lock_image_unlocked_groups": 1} if locks == "lock_image" else {}
        try:
            lock_towers(model, StartConfig(pretrained="x", **{locks: True}, **groups), report)
        except UserError as error:
            return str(error)
        return ""

    assert lock() == ""
    assert lock(lacking=("visual.proj", "transformer.")) == ""
    said = lock(lacking=("visual.transformer.resblocks.1.ln",))
    assert "would lock 4 tensors that x doesn't have in this shape" in said
    assert (
        "visual.transformer.resblocks.1.ln_1.bias, visual.transformer.resblocks.1.ln_1.weight"
        in said
    )
    assert "keeps a tower as x has it, but its pixels were normalised with another std" in lock(
        pixels={"std": 0.5}
    )
    assert lock(pixels={"std": 0.5}, locks="lock_text") == ""
    for locks in ("lock_image", "lock_text"):
        said = lock(quick_gelu=True, locks=locks)
        assert (
            said
            == f"{locks} keeps a tower as x has it, but it was trained with quick_gelu: set model.quick_gelu=true"
        )


def test_an_error_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    """A checkpoint that only one of two processes can read; the other one doesn't wait for ever."""
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    script = tmp_path / "one.py"
    script.write_text(
        "import os, sys\nfrom alignclip.config import reading\nfrom alignclip.training import run, starting_weights\n"
        "from alignclip.errors import UserError, one_line_errors\n"
        "def load(*_):\n    if os.environ['RANK'] == sys.argv[2]:\n        raise UserError('only here')\n"
        "starting_weights.load_pretrained = load\nwith one_line_errors():\n"
        "    run.run(reading.load(sys.argv[1], ['pretrained=x', 'run_name=r', 'data.num_workers=0']))\n"
    )
    for rank in ("0", "1"):
        output = run(script, yaml, rank, processes=2, cwd=tmp_path / rank, status=2)
        assert "error: only here" in output


def test_a_run_of_ours_into_another_model(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved"))
    config = reading.load(yaml, (*FIXED, "max_duration=3ba"))
    folder = SaveFolder(config)
    trainer = build_trainer(config, get_device("cpu"), folder)
    folder.write_config()
    trainer.fit()
    trainer.close()
    trained = trainer.state.model.encoders.state_dict()
    apart = reading.load(yaml, ("model.shared.blocks=1", "run_name=x")).model
    model, report = start(apart, tmp_path / "saved")
    assert re.fullmatch(r"pretrained: \S+: loaded (\d+) of \1 tensors", report)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    heads = reading.load(
        yaml, ("model.text_cfg.heads=1", "model.vision_cfg.head_width=32", "run_name=x")
    ).model
    assert "heads are 16 wide" in refusal(heads, tmp_path / "saved")
