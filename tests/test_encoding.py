"""Encoding a batch: trimmed text, recomputed chunks, several ranks, and the logit scale's bound."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import EVERYTHING, MODELS, load_published, reference, small_batch, small_config
from processes import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alignclip.losses import AlignCLIPLoss
from alignclip.model.encoders import CLIP, build_encoders, clamp_logit_scale_

# --- text length ----------------------------------------------------------------------------------


def untrimmed(model: CLIP, tokens: Tensor) -> Tensor:
    features: Tensor = open_clip.CLIP.encode_text(model, tokens, normalize=True)
    return features


@pytest.mark.parametrize("name", MODELS)
def test_trimmed_text_has_the_features_of_untrimmed(name: str) -> None:
    published = reference(name)
    model = load_published(published)
    tokens = published["tokens"][:3]  # the short captions
    lengths: list[int] = []
    handle = model.transformer.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with torch.no_grad():
        trimmed = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(trimmed, untrimmed(model, tokens), rtol=0, atol=1e-6)
        end = int(tokens.argmax(dim=1).max()) + 1
        assert end < tokens.shape[1]
        assert torch.equal(model.encode_text(tokens[:, :end], normalize=True), trimmed)
    assert lengths == [end, model.context_length, end]
    handle.remove()


def test_trimming_does_not_count_zeros() -> None:
    """Id 0 inside of a caption is a token, and what stands behind the end of text is no part of
    it, zero or not.
    """
    model = build_encoders(small_config())
    tokens = torch.tensor(
        [[62, 0, 0, 0, 5, 0, 63, 0, 0, 0, 0, 0], [62, 7, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    other_padding = tokens.clone()
    other_padding[0, 7:] = 9
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(tokens, normalize=True), untrimmed(model, tokens)
        )
        assert torch.equal(model.encode_text(tokens), model.encode_text(other_padding))


def test_too_long_text_is_refused_and_too_much_padding_is_not() -> None:
    model = build_encoders(small_config())
    tokens = torch.zeros(2, 20, dtype=torch.long)
    tokens[:, 5] = 63
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens[:, :12]))
    tokens[1, 5], tokens[1, 15] = 1, 63
    with pytest.raises(ValueError, match="16 tokens, but context_length is 12"):
        model.encode_text(tokens)


# --- chunks ---------------------------------------------------------------------------------------


def loss_and_gradients(model: CLIP, chunk_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    images, tokens = small_batch()
    torch.manual_seed(7)  # of patch dropout
    image, text = model.encode(images, tokens, chunk_size)
    loss = AlignCLIPLoss()(image, text, model.logit_scale.exp(), images.flatten(1)[:, :20])["total"]
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert float((ours[name] - value).norm() / value.norm()) < 1e-5, name


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_chunks_have_the_gradients_of_the_batch(chunk_size: int) -> None:
    torch.manual_seed(0)
    model = build_encoders(small_config(shared=EVERYTHING))
    loss, expected = loss_and_gradients(model, 0)
    chunked_loss, chunked = loss_and_gradients(model, chunk_size)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    assert len(expected) == len(list(model.parameters()))
    assert_same_gradients(chunked, expected)


def test_chunks_of_text_share_one_length() -> None:
    model = build_encoders(small_config())
    images, tokens = small_batch()
    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    model.encode(images, tokens, 2)
    assert (
        lengths == [9] * 4
    )  # the longest caption's, though the first two chunks hold only shorter ones


def test_recomputed_chunks_drop_the_same_patches() -> None:
    """The reference: chunks of the same draws, kept rather than recomputed."""
    torch.manual_seed(0)
    model = build_encoders(small_config(vision={"patch_dropout": 0.5, "patch_size": 4}))
    images, tokens = small_batch()
    features = []
    for chunked in (True, False):
        model.zero_grad()
        torch.manual_seed(7)
        if chunked:
            image, text = model.encode(images, tokens, 2)
        else:
            image = torch.cat(
                [model.encode_image(chunk, normalize=True) for chunk in images.split(2)]
            )
            text = model.encode_text(tokens, normalize=True)
        AlignCLIPLoss(beta=0)(image, text, model.logit_scale.exp())["total"].backward()
        features.append((image.detach(), gradients(model)))
    assert torch.equal(features[0][0], features[1][0])
    assert_same_gradients(features[0][1], features[1][1])


def test_chunks_keep_the_activations_of_one_and_work_without_gradients() -> None:
    """Of the last texts, with which the backward pass begins."""
    model = build_encoders(small_config())
    images, tokens = small_batch()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def saved_numbers(pairs: slice, chunk_size: int) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encode(images[pairs], tokens[pairs], chunk_size)
        return sum(numbers for place, numbers in saved.items() if place not in weights)

    everything, last = slice(0, 8), slice(6, 8)
    features = 4 * 8 * 16
    assert saved_numbers(everything, 2) <= saved_numbers(last, 0) + images.numel() + features
    assert saved_numbers(everything, 2) < saved_numbers(everything, 0) / 3
    with torch.no_grad():
        for chunked, whole in zip(
            model.encode(images, tokens, 3), model.encode(images, tokens), strict=True
        ):
            torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_features_are_normalised_in_fp32_under_autocast() -> None:
    model = build_encoders(small_config())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for features in model.encode(*small_batch()):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


class Step(nn.Module):
    """Encoding and loss inside one forward, as DDP needs it."""

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = build_encoders(small_config(shared=EVERYTHING))
        self.loss, self.chunk_size = AlignCLIPLoss(), chunk_size

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image, text = self.encoders.encode(images, tokens, self.chunk_size)
        total: Tensor = self.loss(
            image, text, self.encoders.logit_scale.exp(), images.flatten(1)[:, :20]
        )["total"]
        return total


def distributed_gradients() -> dict[str, Any]:
    """DDP's gradients with and without chunks, and what FSDP2 makes of a logit scale beyond its
    bound.
    """
    images, tokens = small_batch()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    found: dict[str, Any] = {}
    for chunk_size in (0, 2):
        step = Step(chunk_size)
        ddp = DistributedDataParallel(step)  # gradients are averaged as long as it lives
        loss = ddp(images[mine], tokens[mine])
        loss.backward()
        found[f"loss {chunk_size}"] = loss.detach()
        found[f"gradients {chunk_size}"] = gradients(step.encoders)
    model = build_encoders(small_config(init_logit_scale=9.0))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    clamp_logit_scale_(model)
    found["logit_scale"] = model.logit_scale.full_tensor().tolist()
    return found


@pytest.mark.world_size(2)
def test_two_ranks_have_the_gradients_of_one_process() -> None:
    ranks = run(2, distributed_gradients)
    single = Step(0)
    loss = single(*small_batch())
    loss.backward()
    expected = gradients(single.encoders)
    for chunk_size in (0, 2):
        mean = (ranks[0][f"loss {chunk_size}"] + ranks[1][f"loss {chunk_size}"]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-6, atol=0)
        for rank in ranks:
            assert_same_gradients(rank[f"gradients {chunk_size}"], expected)
    assert ranks[0]["logit_scale"] == ranks[1]["logit_scale"] == pytest.approx([math.log(100)])


def test_clamp_logit_scale() -> None:
    model = build_encoders(small_config())
    for value, clamped in ((-1.0, 0.0), (2.5, 2.5), (7.0, math.log(100))):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        clamp_logit_scale_(model)
        assert model.logit_scale.tolist() == pytest.approx([clamped])
        assert model.logit_scale.requires_grad


def test_normalisation_is_l2() -> None:
    model = build_encoders(small_config())
    images, tokens = small_batch()
    with torch.no_grad():
        image, text = model.encode(images, tokens)
        assert torch.allclose(image, F.normalize(model.encode_image(images), dim=1))
        assert torch.allclose(text, F.normalize(model.encode_text(tokens), dim=1))
