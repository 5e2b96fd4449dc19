"""Which parameters decay, which optimizers can be named, and the published learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from alignclip.config import ModelConfig, OptimizerConfig, SharedConfig, TextConfig
from alignclip.encoders import build_encoders
from alignclip.errors import UserError
from alignclip.optimization import build_optimizer, lr_multiplier, parameter_groups


def shared_vit_b_16() -> nn.Module:
    with torch.device("meta"):
        return build_encoders(
            ModelConfig(768, text_cfg=TextConfig(width=768, heads=12), shared=SharedConfig(-1, True, True))
        )


def test_decayed_parameters_of_the_published_model() -> None:
    model = shared_vit_b_16()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    members = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(12)]
    assert members == {
        0.1: {
            "positional_embedding",
            "visual.positional_embedding",
            "visual.conv1.weight",
            "token_embedding.weight",
            "text_projection",
            *(f"{block}.attn.{name}" for block in blocks for name in ("in_proj_weight", "out_proj.weight")),
            *(f"{block}.mlp.{name}.weight" for block in blocks for name in ("c_fc", "c_proj")),
        },
        0.0: {
            "logit_scale",
            "visual.class_embedding",
            *(f"visual.{norm}.{name}" for norm in ("ln_pre", "ln_post") for name in ("weight", "bias")),
            *(f"{block}.{norm}.{name}" for block in blocks for norm in ("ln_1", "ln_2") for name in ("weight", "bias")),
            *(f"{block}.attn.{name}" for block in blocks for name in ("in_proj_bias", "out_proj.bias")),
            *(f"{block}.mlp.{name}.bias" for block in blocks for name in ("c_fc", "c_proj")),
        },
    }
    assert sum(len(group["params"]) for group in groups) == len(names)  # each once


def test_default_optimizer_is_the_published_adamw() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimizerConfig(), model)
    assert type(optimizer) is torch.optim.AdamW
    for group, (parameter, decay) in zip(optimizer.param_groups, [(model.bias, 0.0), (model.weight, 0.1)], strict=True):
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


def test_published_learning_rates() -> None:
    total = 587_700  # 30 epochs of 19,590 batches
    published = {0: 1e-7, 1: 2e-7, 9_999: 1e-3, 10_000: 1e-3}
    for step, rate in published.items():
        assert 1e-3 * lr_multiplier(step, 10_000, total) == pytest.approx(rate, rel=1e-12)
    middle = (10_000 + total) // 2
    assert lr_multiplier(middle, 10_000, total) == pytest.approx(0.5, abs=1e-12)
    quarter = 10_000 + (total - 10_000) // 4
    assert lr_multiplier(quarter, 10_000, total) == pytest.approx(0.5 + math.sqrt(0.5) / 2, rel=1e-9)
    assert 0 < lr_multiplier(total - 1, 10_000, total) < 1e-10


def test_schedule_ends_at_alpha_f() -> None:
    assert lr_multiplier(10, 10, 110, alpha_f=0.1) == 1.0
    assert lr_multiplier(60, 10, 110, alpha_f=0.1) == pytest.approx(0.55)
    for step in (110, 200):
        assert lr_multiplier(step, 10, 110, alpha_f=0.1) == 0.1
        assert lr_multiplier(step, 10, 110) == 0.0


def test_schedule_without_warmup_and_with_nothing_else() -> None:
    assert lr_multiplier(0, 0, 100) == 1.0
    assert [lr_multiplier(step, 2, 2) for step in range(3)] == [0.5, 1.0, 0.0]
