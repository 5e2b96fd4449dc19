"""Which parameters decay, which optimizers can be named, and the published learning rates."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import timm
import torch
from models import EVERYTHING, small_batch, small_config
from torch import nn

from alignclip.config.schema import ModelConfig, OptimizerConfig, SharedConfig, TextConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.model.optimization import (
    _timm_depths,
    build_optimizer,
    lr_multiplier,
    parameter_groups,
)


def shared_vit_b_16() -> nn.Module:
    text, shared = TextConfig(width=768, heads=12), SharedConfig(**EVERYTHING)
    with torch.device("meta"):
        return build_encoders(ModelConfig(768, text_cfg=text, shared=shared))


def test_decayed_parameters_of_the_published_model() -> None:
    model = shared_vit_b_16()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    members = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    blocks = [f"visual.transformer.resblocks.{i}." for i in range(12)]
    projections, norms = ("mlp.c_fc.", "mlp.c_proj."), ("ln_1.", "ln_2.")
    weights = ["attn.in_proj_weight", "attn.out_proj.weight", *(f"{p}weight" for p in projections)]
    others = ["attn.in_proj_bias", "attn.out_proj.bias", *(f"{p}bias" for p in projections)]
    others += [f"{norm}{name}" for norm in norms for name in ("weight", "bias")]
    embeddings = {"positional_embedding", "visual.positional_embedding", "token_embedding.weight"}
    around = [
        f"visual.{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")
    ]
    assert members == {
        0.1: {f"{block}{name}" for block in blocks for name in weights}
        | {"visual.conv1.weight", "text_projection", *embeddings},
        0.0: {f"{block}{name}" for block in blocks for name in others}
        | {"logit_scale", "visual.class_embedding", *around},
    }
    assert sum(len(group["params"]) for group in groups) == len(names)  # each once


def test_default_optimizer_is_the_published_adamw() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimizerConfig(), model)
    assert type(optimizer) is torch.optim.AdamW
    for group, (parameter, decay) in zip(
        optimizer.param_groups, [(model.bias, 0.0), (model.weight, 0.1)], strict=True
    ):
        assert group["params"] == [parameter]
        assert group["weight_decay"] == decay
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.98), 1e-6)


@pytest.mark.parametrize("opt", ["adamw", "lion", "adan", "sgd", "lamb", "nadamw", "muon"])
def test_optimizers_of_timm_take_a_step(opt: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(OptimizerConfig(opt=opt), model)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        (OptimizerConfig(opt="adahessian"), ["optimizer.opt: adahessian needs gradients of grad"]),
        (OptimizerConfig(opt="adamv"), ["optimizer.opt", "'adamv'", "did you mean 'adam"]),
        (OptimizerConfig(opt="lookahead_adamw"), ["'lookahead_adamw'"]),
        (OptimizerConfig(opt="lion", eps=1e-8), ["optimizer.eps", "lion"]),
        (OptimizerConfig(opt="sgd", betas=[0.9, 0.95]), ["optimizer.betas", "sgd takes none"]),
        (OptimizerConfig(opt="adan", betas=[0.9, 0.95]), ["adan takes 3 values"]),
        (OptimizerConfig(betas=[0.9]), ["adamw takes 2 values"]),
        (OptimizerConfig(betas=[0.9, 1.5]), ["adamw", "1.5"]),
    ],
)
def test_unusable_settings_are_named(config: OptimizerConfig, mentions: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_optimizer(config, nn.Linear(3, 2))
    for words in mentions:
        assert words in str(error.value)


def test_three_betas_reach_an_optimizer_that_takes_three() -> None:
    optimizer = build_optimizer(OptimizerConfig(opt="adan", betas=[0.9, 0.8, 0.7]), nn.Linear(3, 2))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.8, 0.7)


TOTAL = 587_700  # 30 epochs of 19,590 batches
MIDDLE, QUARTER = (10_000 + TOTAL) // 2, 10_000 + (TOTAL - 10_000) // 4


@pytest.mark.parametrize(
    ("warmup", "total", "alpha_f", "expected"),
    [
        (10_000, TOTAL, 0.0, {0: 1e-4, 1: 2e-4, 9_999: 1.0, 10_000: 1.0}),  # as published
        (10_000, TOTAL, 0.0, {QUARTER: 0.5 + math.sqrt(0.5) / 2, MIDDLE: 0.5, TOTAL - 1: 0.0}),
        (10, 110, 0.0, {110: 0.0, 200: 0.0}),
        (10, 110, 0.1, {10: 1.0, 60: 0.55, 110: 0.1, 200: 0.1}),
        (0, 100, 0.0, {0: 1.0}),
        (2, 2, 0.0, {0: 0.5, 1: 1.0, 2: 0.0}),  # nothing but warm-up
    ],
)
def test_learning_rates(
    warmup: int, total: int, alpha_f: float, expected: dict[int, float]
) -> None:
    found = {step: lr_multiplier(step, warmup, total, alpha_f) for step in expected}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert lr_multiplier(total - 1, warmup, total, alpha_f) > alpha_f


# --- layer decay ----------------------------------------------------------------------------------


def settings_of_each(optimizer: torch.optim.Optimizer, key: str) -> dict[int, float]:
    """A setting of the group that each parameter is in, by the parameter's id."""
    return {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("shared", [{}, {"blocks": 2, "ln_final": True}, EVERYTHING], ids=str)
def test_layer_decay_counts_from_the_top_of_each_tower(shared: dict[str, Any]) -> None:
    """Towers of five and three blocks where that can be.

    Every parameter once, with the rate that its name gives it.
    """
    layers = {"visual": 3 if shared == EVERYTHING else 5, "": 3}
    model = build_encoders(small_config(vision={"layers": layers["visual"]}, shared=shared))
    config = OptimizerConfig(lr=0.5, weight_decay=0.1, layer_decay=0.8)
    optimizer = build_optimizer(config, model)
    rates, decays = (settings_of_each(optimizer, key) for key in ("lr", "weight_decay"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    assert optimizer.param_groups[0]["lr"] == 0.5
    for name, parameter in model.named_parameters(remove_duplicate=False):
        number = layers["visual" if name.startswith("visual.") else ""]
        if found := re.search(r"resblocks\.(\d+)\.", name):
            depth = number - int(found[1])
        elif any(part in name for part in ("embedding", "conv1", "ln_pre")):
            depth = number + 1
        else:
            assert any(part in name for part in ("proj", "ln_post", "ln_final", "logit_scale")), (
                name
            )
            depth = 0
        assert rates[id(parameter)] == pytest.approx(0.5 * 0.8**depth), name
        assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0), name


def test_layer_decay_of_one_is_none() -> None:
    """The same steps as without, and with less the first blocks move less."""

    def steps(layer_decay: float | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_encoders(small_config())
        optimizer = build_optimizer(
            OptimizerConfig(opt="sgd", lr=0.1, layer_decay=layer_decay), model
        )
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            image, text, scale = model(*small_batch())
            (scale * image @ text.T).diagonal().sum().backward()
            optimizer.step()
        return {name: value.detach() - before[name] for name, value in model.named_parameters()}

    none, one, half = steps(None), steps(1.0), steps(0.5)
    for name, value in none.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=0)
    first = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert half[first].norm() < 0.3 * none[first].norm()


def timm_tower(name: str) -> CLIP:
    return build_encoders(small_config(vision={"timm_model_name": name, "image_size": 160}))


def test_layer_decay_of_a_timm_tower() -> None:
    """As of a ViT of open_clip's: norm and projection, then the six blocks, then what lies below
    them.
    """
    model = timm_tower("test_vit")
    optimizer = build_optimizer(OptimizerConfig(lr=1.0, layer_decay=0.5), model)
    rates = settings_of_each(optimizer, "lr")
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.visual.named_parameters():
        depth = 7  # cls_token, pos_embed, patch_embed
        if found := re.match(r"trunk\.blocks\.(\d)\.", name):
            depth = 6 - int(found[1])
        elif name.startswith(("trunk.norm.", "head.")):
            depth = 0
        assert rates[id(parameter)] == 0.5**depth, name
    assert rates[id(model.logit_scale)] == 1.0
    assert rates[id(model.transformer.resblocks[-1].ln_1.weight)] == 0.5


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_efficientnet", "test_resnet", "test_convnext"]
)
def test_layer_decay_of_timm_towers_is_timms(name: str) -> None:
    """With its classifier, which is where our projection is.

    What timm counts to the last block lies behind it here.
    """
    trunk = timm_tower(name).visual.trunk
    depths = _timm_depths(trunk)
    whole = timm.create_model(name)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(whole, layer_decay=0.5)
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    behind = re.compile(r"norm\.|fc_norm|head\.norm|conv_head|bn2\.")
    for key, parameter in trunk.named_parameters():
        if behind.match(key):
            assert depths[parameter] == 0, key
        else:
            assert 0.5 ** depths[parameter] == theirs[key], key
    assert min(depth for p, depth in depths.items() if depth) == 1
