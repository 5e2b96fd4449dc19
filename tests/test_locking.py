"""Locked towers: what is locked keeps its bits, what is not is trained, and what makes no sense
is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import EVERYTHING, small_config
from omegaconf import OmegaConf
from runs import PRETRAIN, run, write_config
from small_runs import SmallRuns

from alignclip.config import reading
from alignclip.config.schema import StartConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.training.locking import lock_towers
from alignclip.weights.load import load_encoders


def trained(shared: dict[str, Any] | None = None, **settings: Any) -> set[str]:
    """The parameters that a locked model trains, by every name that they have."""
    model = build_encoders(small_config(shared=shared or {}))
    lock_towers(model, StartConfig(**settings))
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def names(*parts: str) -> set[str]:
    model = build_encoders(small_config())
    return {name for name, _ in model.named_parameters() if name.startswith(parts)}


TEXT = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection")


IMAGE_TOP = ("visual.proj", "visual.ln_post", "visual.transformer.resblocks.2.")
TEXT_TOP = ("text_projection", "ln_final", "transformer.resblocks.2.")


@pytest.mark.parametrize(
    ("settings", "locked", "unlocked"),
    [
        ({"lock_image": True}, ("visual.",), ()),
        ({"lock_image": True, "lock_image_unlocked_groups": 1}, ("visual.",), ("visual.proj",)),
        ({"lock_image": True, "lock_image_unlocked_groups": 2}, ("visual.",), IMAGE_TOP),
        ({"lock_text": True}, TEXT, ()),
        ({"lock_text": True, "lock_text_unlocked_layers": 2}, TEXT, TEXT_TOP),
    ],
)
def test_a_tower_but_for_its_topmost_groups(
    settings: dict[str, Any], locked: tuple[str, ...], unlocked: tuple[str, ...]
) -> None:
    everything = names(*TEXT, "visual.", "logit_scale")
    opened = names(*unlocked) if unlocked else set()
    assert trained(**settings) == everything - names(*locked) | opened


TOP = {"blocks": 1, "ln_final": True, "projection": True}


def test_shared_modules_above_what_is_locked() -> None:
    """The last block is one for both towers: it may not be locked for one of them."""
    open_ones = trained(TOP, lock_image=True, lock_image_unlocked_groups=2)
    assert "visual.transformer.resblocks.2.mlp.c_fc.weight" in open_ones
    assert not {name for name in open_ones if name.startswith("visual.transformer.resblocks.1.")}


@pytest.mark.parametrize(
    ("sharing", "settings", "says"),
    [
        (
            TOP,
            {"lock_image": True},
            r"lock_image would lock \d+ tensors for both towers, which share",
        ),
        (
            EVERYTHING,
            {"lock_text": True, "lock_text_unlocked_layers": 1},
            "lock_text would lock .* both",
        ),
        ({}, {"lock_image": True, "lock_text": True}, "leave nothing but logit_scale to train"),
        (
            {},
            {"lock_image": True, "lock_image_unlocked_groups": 99},
            "lock_image_unlocked_groups=99 leaves nothing of the tower locked",
        ),
    ],
)
def test_locks_that_make_no_sense(
    sharing: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        trained(sharing, **settings)


def test_random_weights_are_not_locked(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    for lock in ("lock_image", "lock_text"):
        with pytest.raises(
            UserError, match=f"{lock}=true would lock random weights; set pretrained to what"
        ):
            reading.load(yaml, [f"{lock}=true"])
        for start in ("pretrained=x.pt", "load_path=x.pt"):
            reading.load(yaml, [f"{lock}=true", start])


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_batch_norms_that_keep_their_statistics(tmp_path: Path, name: str, groups: int) -> None:
    """The locked tower computes what it did, in training, too, and its checkpoint loads with the
    same features.
    """
    config = small_config(vision={"timm_model_name": name, "image_size": 64})
    torch.manual_seed(0)
    model = build_encoders(config).eval()
    with torch.no_grad():
        for key, tensor in model.visual.state_dict().items():
            if "running" in key:
                tensor.add_(torch.rand_like(tensor))
        images = torch.randn(2, 3, 64, 64)
        before = model.encode_image(images)
        locks = StartConfig(
            lock_image=True, lock_image_unlocked_groups=groups, lock_image_freeze_bn_stats=True
        )
        lock_towers(model, locks)
        torch.testing.assert_close(model.encode_image(images), before, rtol=0, atol=1e-6)
        statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
        training = model.train().encode_image(images)
        moved = {k for k, v in statistics.items() if not torch.equal(model.state_dict()[k], v)}
        if groups == 0:
            assert not moved
            torch.testing.assert_close(training, before, rtol=0, atol=1e-6)
        else:
            assert moved
            open_ones = {
                n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad
            }
            assert {key.rpartition(".")[0] for key in moved} <= open_ones
            model.load_state_dict(statistics, strict=False)
    state = {"model": {f"encoders.{key}": value for key, value in model.state_dict().items()}}
    torch.save({"state": state}, tmp_path / "latest-rank0.pt")
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(config)})
    )
    found = load_encoders(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found.encode_image(images), before, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_on_two_processes(dataset: Path, tmp_path: Path, how: str) -> None:
    unshared = [
        f"model.shared.{part}" for part in ("blocks=0", "ln_final=false", "projection=false")
    ]
    runs = SmallRuns(tmp_path, dataset, tmp_path / "saved", "save_interval=1ba", *unshared)
    start = tmp_path / "epoch_1.pt"
    torch.save(build_encoders(runs.config().model).state_dict(), start)
    overrides = ["max_duration=3ba", f"pretrained={start}", "lock_image=true"]
    overrides += ["lock_image_unlocked_groups=1"]
    overrides += ["parallelism_config.fsdp2={}"] if how == "fsdp2" else []
    output = run(PRETRAIN, runs.yaml, *runs.settings, *overrides, processes=2, cwd=tmp_path)
    assert "M locked)" in output

    def weights(batch: int) -> dict[str, torch.Tensor]:
        model: CLIP = load_encoders(tmp_path / "saved" / f"ep0-ba{batch}-rank0.pt")
        return model.state_dict()

    first, last = weights(1), weights(3)
    for name, value in first.items():
        locked = name.startswith("visual.") and name != "visual.proj"
        assert torch.equal(last[name], value) == locked, name
