"""``pretrained``: checkpoints of every origin into models that share nothing, something or
everything.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from models import (
    EVERYTHING,
    FIXTURES,
    assert_equal_weights,
    config_of,
    reference,
    refused,
    sections,
    small_config,
    write_export,
    write_model_yaml,
)
from models import stock as freshly_built
from runs import run, write_config, write_set
from safetensors.torch import save_file
from small_runs import SmallRuns, logged, trained, turn_back

from alignclip.config import reading
from alignclip.config.schema import ModelConfig, StartConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.training.locking import lock_towers
from alignclip.weights.formats.release import renamed
from alignclip.weights.start_from import load_pretrained

TOWERS = {  # of a tensor that can be shared: its name in the text tower, in the vision tower
    "blocks": ("transformer.", "visual.transformer."),
    "ln_final": ("ln_final.", "visual.ln_post."),
    "projection": ("text_projection", "visual.proj"),
}
ALL_OF_IT = r"pretrained: \S+: loaded (\d+) of \1 tensors"


def stock(config: ModelConfig, seed: int = 1) -> open_clip.CLIP:
    """open_clip's own model, every tensor random: both towers differ everywhere."""
    torch.manual_seed(seed)
    model = freshly_built(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.logit_scale.fill_(1.5)
    return model


def fresh(config: ModelConfig) -> CLIP:
    torch.manual_seed(7)
    return build_encoders(config)


def start(config: ModelConfig, place: Path | str, shared_from: str = "text") -> tuple[CLIP, str]:
    model = fresh(config)
    state = torch.get_rng_state()
    report = load_pretrained(model, str(place), shared_from, config).text
    assert torch.equal(torch.get_rng_state(), state)
    return model, report


def start_refused(config: ModelConfig, place: Path | str, words: str) -> None:
    with refused(words) as error:
        load_pretrained(fresh(config), str(place), "text", config)
    assert str(error.value).startswith("pretrained: ")


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- where the weights come from --------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    ["", "foo: 1", "model: {arch: vit}", "a: [", "model: {quick_gelu: true, text_cfg: {heads: 1}}"],
)
def test_a_training_checkpoint_of_open_clip(tmp_path: Path, beside: str) -> None:
    """In half precision, of a distributed run, whatever ``config.yaml`` lies beside it."""
    source = stock(small_config()).half().state_dict()
    weights = {f"module.{name}": value for name, value in source.items()}
    path = saved({"epoch": 32, "name": "x", "state_dict": weights}, tmp_path / "epoch_32.pt")
    if beside:
        (tmp_path / "config.yaml").write_text(beside, encoding="utf-8")
    model, report = start(small_config(), path)
    assert report == f"pretrained: {path}: loaded {len(source)} of {len(source)} tensors"
    assert_equal_weights(model, {name: value.float() for name, value in source.items()})
    assert model.logit_scale.shape == (1,)


@pytest.mark.parametrize("shared", [EVERYTHING, {"blocks": 1}, {}], ids=["all", "some", "none"])
def test_a_release(tmp_path: Path, shared: dict[str, Any]) -> None:
    published = reference("micro")
    path = Path(shutil.copy(FIXTURES / "model_micro.pt", tmp_path))
    config = config_of(published["config"], **shared)
    # its heads are 16 wide, which the file doesn't say
    assumed = "as all published ones; if these are others, say so with a config.yaml beside the fil"
    start_refused(config, path, f"heads are 64 wide, but with model.text_cfg.heads.*{assumed}e$")
    write_model_yaml(tmp_path / "config.yaml", config)
    model, report = start(config, path)
    # one set of numbers for both towers: nothing to choose, and nothing to say but whose they are
    assert re.fullmatch(ALL_OF_IT + r"\n  licence: cc-by-nc-nd-4.0, .*", report)
    assert_equal_weights(model, renamed(published["state_dict"]))


def test_an_export_that_we_could_not_load(tmp_path: Path) -> None:
    config = small_config()
    folder = write_export(tmp_path / "export", config, stock(config).state_dict())
    model_cfg = sections(config) | {"quick_gelu": True}
    model_cfg["text_cfg"]["pool_type"] = "last"

    def write(**changed: Any) -> None:
        settings = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": 0.5}} | changed
        (folder / "open_clip_config.json").write_text(json.dumps(settings))

    write()
    report = start(config, folder)[1]
    assert "it was trained with what our encoders don't have: text_cfg.pool_type" in report
    assert "it was trained with quick_gelu: set model.quick_gelu=true" in report
    assert "normalised with another mean: [0.5, 0.5, 0.5]" in report
    assert "quick_gelu" not in start(dataclasses.replace(config, quick_gelu=True), folder)[1]
    # the same shapes, other heads
    other = "with model.vision_cfg.head_width=8 they are 8"
    narrow = small_config(vision={"head_width": 8})
    start_refused(narrow, folder, f"the checkpoint's vision heads are 16 wide, but {other}")
    four = small_config(text={"heads": 4})
    start_refused(four, folder, "with model.text_cfg.heads=4 they are 8")
    # a vision tower that is no ViT: the text tower's heads and activation are known
    write(model_cfg=model_cfg | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 64}})
    assert "set model.quick_gelu=true" in start(narrow, folder)[1]
    start_refused(four, folder, "with model.text_cfg.heads=4 they are 8")
    # settings that are none
    write(model_cfg={"vision_cfg": "ViT-B-16"})
    start_refused(config, folder, "its vision_cfg is a str, not a section")
    write(preprocess_cfg={"mean": [0.5, 0.5]})
    start_refused(config, folder, "mean has 2 numbers, not 3")


def test_open_clip_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config()
    for place, words in (
        ("ViT-B-16/openia", "ViT-B-16 has no weights 'openia'; write ViT-B-16/TAG; did you"),
        ("ViT-B-16", "write ViT-B-16/TAG"),
        ("ViT-B16/openai", r"no model ViT-B16 with weights 'openai'; did you mean 'ViT-B-16'\?"),
        # offline, as every test is: the Hub's cache has no such thing
        ("ViT-B-16/openai", "hf-hub:timm/vit_base_patch16_clip_224.openai"),
    ):
        start_refused(config, place, words)
    # a file of that name is a file
    (tmp_path / "ViT-B-16").mkdir()
    saved(stock(config).state_dict(), tmp_path / "ViT-B-16" / "openai")
    assert "loaded" in start(config, "ViT-B-16/openai")[1]


def test_a_model_of_open_clips_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the list says of a download is known: heads, activation, pixels."""
    config = small_config(quick_gelu=False)
    path = saved(stock(config).state_dict(), tmp_path / "x.pt")
    listed = {"url": "x", "quick_gelu": True, "mean": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: listed)
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: sections(config))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: str(path))
    report = start(config, "ViT-B-16/openai")[1]
    assert "it was trained with quick_gelu: set model.quick_gelu=true" in report
    assert "normalised with another mean: [0.5, 0.5, 0.5]" in report
    words = "vision heads are 16 wide, but with model.vision_cfg.head_width=8"
    start_refused(small_config(vision={"head_width": 8}), "ViT-B-16/openai", words)


def test_the_recipes_example_fits() -> None:
    """What yamls/finetune-retrieval.yaml says that open_clip's ViT-B-16/openai wants."""
    recipe = Path(__file__).parent.parent / "yamls" / "finetune-retrieval.yaml"
    for text in (
        "ViT-B-16/openai has a text tower 512 wide, so it wants embed_dim 512, text_cfg.width 512",
        "text_cfg.heads 8, quick_gelu true, and shared {blocks: 0, ln_final: false, projection: "
        "fal",
    ):
        assert text in recipe.read_text()
    overrides = ["pretrained=ViT-B-16/openai", "model.embed_dim=512", "model.text_cfg.width=512"]
    overrides += ["model.text_cfg.heads=8", "model.quick_gelu=true", "model.shared.blocks=0"]
    overrides += ["model.shared.ln_final=false", "model.shared.projection=false", "run_name=r"]
    config = reading.load(recipe, overrides).model
    with torch.device("meta"):
        ours = build_encoders(config)
        theirs = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    shapes["logit_scale"] = torch.Size([1])
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"]
    assert config.vision_cfg.head_width == config.text_cfg.width // config.text_cfg.heads == 64


# --- what fits --------------------------------------------------------------------------------


SHARED: dict[str, tuple[dict[str, Any], str]] = {  # and what is told of it
    "all": (EVERYTHING, "text_projection, transformer.resblocks.0-2, ln_final"),
    "blocks": ({"blocks": 2}, "transformer.resblocks.0-1"),
    "the rest": ({"ln_final": True, "projection": True}, "text_projection, ln_final"),
}


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("name", SHARED)
def test_two_towers_into_shared_modules(tmp_path: Path, name: str, tower: str) -> None:
    """Of unequal depth: the last two text blocks are the last two of the image tower, three
    deep.
    """
    shared, told = SHARED[name]
    config = small_config(shared=shared, text={"layers": 3 if name == "all" else 2})
    weights = stock(config).state_dict()
    model, report = start(config, saved(weights, tmp_path / "two.pt"), tower)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for key, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(key)
    assert any(len(group) == 2 for group in names.values())
    for group in names.values():
        of_tower = [key for key in group if key.startswith("visual.") == (tower == "vision")]
        chosen = of_tower[0] if len(group) > 1 else group[0]
        expected = weights[chosen].reshape(parameters[chosen].shape)
        assert torch.equal(parameters[chosen], expected), group
    lines = [line for line in report.splitlines() if "shared modules" in line]
    assert lines == [f"  shared modules from the {tower} tower: {told}"]
    assert "left over" not in report


def test_the_other_tower_where_one_does_not_fit(tmp_path: Path) -> None:
    """A ViT-B-16 of open_clip has a text tower two thirds as wide: shared is the image tower's."""
    weights = stock(small_config(text={"width": 16, "heads": 1})).state_dict()
    config = small_config(shared=EVERYTHING)
    model, report = start(config, saved(weights, tmp_path / "narrow.pt"))
    vision = {f"visual.{name}": weights[f"visual.{name}"] for name in model.visual.state_dict()}
    found = {f"visual.{name}": value for name, value in model.visual.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in vision.items())
    for text in (
        f"shared modules from the vision tower: {SHARED['all'][1]}",
        "of another shape: positional_embedding ([12, 16], not [12, 32]), token_embedding",
        "([64, 16], not [64, 32])",
    ):
        assert text in report
    assert torch.equal(model.token_embedding.weight, fresh(config).token_embedding.weight)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_shared_block_comes_from_one_tower(tmp_path: Path, tower: str) -> None:
    """Where the other tower's MLPs don't fit, its attention isn't taken either."""
    part = {"text": "vision", "vision": "text"}[tower]  # the one that has narrow MLPs
    weights = stock(small_config(**{part: {"mlp_ratio": 2.0}})).state_dict()
    path = saved(weights, tmp_path / "narrow.pt")
    model, report = start(small_config(shared=EVERYTHING), path, part)
    prefix = TOWERS["blocks"][tower == "vision"]
    chosen = {
        name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)
    }
    assert_equal_weights(model.transformer, chosen)
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
    weights["visual.proj"] = weights["visual.proj"].long()  # an integer is no weight
    model, report = start(config, saved(weights, tmp_path / "odd.pt"))
    total, proj = len(model.state_dict()), "visual.proj ([32, 16], not [32, 16])"
    assert report.splitlines()[0].endswith(f"loaded {total - 14} of {total} tensors")
    assert {*report.splitlines()[1:]} == {
        "  not in the checkpoint: transformer.resblocks.1",
        f"  of another shape: {proj}, token_embedding ([60, 32], not [64, 32])",
        "  left over: logit_bias, visual.transformer.resblocks.3-4",
    }
    initial = ("transformer.resblocks.1.", "token_embedding.weight", "visual.proj")
    untouched = fresh(config).state_dict()
    kept = {name: value for name, value in untouched.items() if name.startswith(initial)}
    assert_equal_weights(model, weights | kept)


def test_position_embeddings_are_resized_as_open_clip_does(tmp_path: Path) -> None:
    source = stock(small_config())
    large = small_config(vision={"image_size": 64}, text={"context_length": 20})
    path = saved(source.state_dict(), tmp_path / "small.pt")
    model, report = start(large, path)
    assert "resized: visual.positional_embedding 5 → 17, positional_embedding 12 → 20" in report
    theirs = stock(large, seed=2)
    open_clip.load_checkpoint(theirs, str(path))
    assert_equal_weights(model, theirs.state_dict())
    assert torch.equal(model.visual.positional_embedding[0], source.visual.positional_embedding[0])


@pytest.mark.parametrize("shape", [(7, 32), (4,), (0, 32)], ids=["6", "1-D", "0"])
def test_position_embeddings_that_are_no_grid(tmp_path: Path, shape: tuple[int, ...]) -> None:
    positions = {"visual.positional_embedding": torch.randn(shape)}
    path = saved(stock(small_config()).state_dict() | positions, tmp_path / "odd.pt")
    assert "of another shape: visual.positional_embedding" in start(small_config(), path)[1]


@pytest.mark.parametrize(("name", "loaded"), [("layer.weight", 0), ("logit_scale", 1)])
def test_what_is_not_this_model(tmp_path: Path, name: str, loaded: int) -> None:
    path = saved({name: torch.ones(())}, tmp_path / "x.pt")
    start_refused(small_config(), path, f"loaded {loaded} of .*, which is not this model")


# --- in a run ---------------------------------------------------------------------------------


LOCKED = ["lock_image=true", "lock_image_unlocked_groups=2", "optimizer.layer_decay=0.5"]
LOCKED += ["model.shared.blocks=0", "model.shared.ln_final=false", "model.shared.projection=false"]


@pytest.mark.slow
def test_a_run_goes_on_without_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Locked, decayed by layer, started from a checkpoint that is gone when the run goes on."""
    write_set(str(tmp_path / "set"), 64)
    path, saves = tmp_path / "epoch_32.pt", ["max_duration=8ba", "save_interval=3ba"]
    given = [*saves, *LOCKED, f"pretrained={path}"]
    runs = SmallRuns(tmp_path, tmp_path / "set", tmp_path / "saved", *given)
    weights = stock(reading.load(runs.yaml, [*runs.settings]).model).state_dict()
    torch.save({"state_dict": weights}, path)

    losses, ends = [], []
    for part in range(2):
        trainer = runs.train()
        losses.append(logged(trainer))
        ends.append({n: v.clone() for n, v in trainer.state.model.encoders.state_dict().items()})
        rates = [group["initial_lr"] for group in trainer.state.optimizers[0].param_groups]
        assert (rates[0], min(rates)) == (1e-3, 1e-3 * 0.5**3)
        assert ("pretrained: " in capsys.readouterr().out) == (part == 0)
        path.unlink(missing_ok=True)
        turn_back(tmp_path / "saved", "ep0-ba3-rank0.pt")
    assert len(losses[0]) == 8
    assert losses[1] == losses[0][3:]
    unlocked = ("visual.proj", "visual.ln_post", "visual.transformer.resblocks.1.")
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        locked = name.startswith("visual.") and not name.startswith(unlocked)
        assert torch.equal(value, weights[name].reshape(value.shape)) == locked, name

    # as part of what the run is
    for override, says in (
        ("pretrained=other.pt", f"pretrained: {path} → other.pt"),
        ("lock_image_unlocked_groups=1", "lock_image_unlocked_groups: 2 → 1"),
        ("optimizer.layer_decay=0.6", "optimizer.layer_decay: 0.5 → 0.6"),
        # a new one needs the file
        (f"save_folder={tmp_path}/new", "pretrained: no such file"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            runs.build(override)


def test_locked_towers_are_as_they_were_trained(tmp_path: Path) -> None:
    """What is locked comes from the checkpoint whole, with its pixels and activation, or not."""
    config = small_config()
    weights = stock(config).state_dict()

    def lock(
        *lacking: str, pixels: Any = None, locks: str = "lock_image", words: str = "", **given: Any
    ) -> None:
        """Start from an export, then lock a tower, which is refused with these words, if any."""
        kept = {name: v for name, v in weights.items() if not name.startswith(lacking or " ")}
        save_file(kept, tmp_path / "open_clip_model.safetensors")
        described = {"model_cfg": sections(config) | given, "preprocess_cfg": pixels or {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        model = fresh(config)
        report = load_pretrained(model, str(tmp_path), "text", config)
        groups = {"lock_image_unlocked_groups": 1} if locks == "lock_image" else {}
        start = StartConfig(pretrained="x", **{locks: True}, **groups)
        if words:
            with refused(words):
                lock_towers(model, start, report)
        else:
            lock_towers(model, start, report)

    block, as_trained = "visual.transformer.resblocks.1.ln", "keeps a tower as x has it, but"
    lock()
    lock("visual.proj", "transformer.")
    told = f"would lock 4 tensors that x doesn't have in this shape.*{block}_1.bias, {block}_1.weig"
    lock(block, words=told)
    lock(pixels={"std": 0.5}, words=f"{as_trained} its pixels were normalised with another std")
    lock(pixels={"std": 0.5}, locks="lock_text")
    for locks in ("lock_image", "lock_text"):
        told = f"^{locks} {as_trained} it was trained with quick_gelu: set model.quick_gelu=true$"
        lock(quick_gelu=True, locks=locks, words=told)


@pytest.mark.slow
def test_an_error_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    """A checkpoint that one of two processes can't read; the other one doesn't wait for ever."""
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    script = tmp_path / "one.py"
    script.write_text(
        "import os, sys\n"
        "from alignclip.config import reading\n"
        "from alignclip.training import run, starting_weights\n"
        "from alignclip.errors import UserError, one_line_errors\n"
        "def load(*_):\n"
        "    if os.environ['RANK'] == sys.argv[2]:\n"
        "        raise UserError('only here')\n"
        "starting_weights.load_pretrained = load\n"
        "overrides = ['pretrained=x', 'run_name=r', 'data.num_workers=0']\n"
        "with one_line_errors():\n"
        "    run.run(reading.load(sys.argv[1], overrides))\n"
    )
    for rank in ("0", "1"):
        output = run(script, yaml, rank, processes=2, cwd=tmp_path / rank, status=2)
        assert "error: only here" in output


def test_a_run_of_ours_into_another_model(tmp_path: Path) -> None:
    weights = trained(tmp_path).state.model.encoders.state_dict()
    yaml = tmp_path / "tiny.yaml"
    apart = reading.load(yaml, ["model.shared.blocks=1", "run_name=x"]).model
    model, report = start(apart, tmp_path / "saved")
    assert re.fullmatch(ALL_OF_IT, report)
    assert_equal_weights(model, weights)
    one_head = ["model.text_cfg.heads=1", "model.vision_cfg.head_width=32", "run_name=x"]
    start_refused(reading.load(yaml, one_head).model, tmp_path / "saved", "heads are 16 wide")
