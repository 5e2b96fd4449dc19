"""What a batch says of itself: the length of its texts, and what a model makes of the length."""

from __future__ import annotations

import pytest
import torch
from models import EVERYTHING, small_batch, small_config
from torch._dynamo.testing import CompileCounter

from alignclip.data.batch import Batch, count_samples, longest_text
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders

LONGEST = 9  # tokens of a caption of small_batch


def batches() -> tuple[Batch, Batch]:
    """The same pairs with the texts' length, and without it."""
    _, text = small_batch()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (len(text), 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = Batch(image=image, text=text, text_length=longest_text(text))
    return batch, Batch(image=image, text=text)


def model_of(chunk_size: int = 0) -> AlignCLIPModel:
    torch.manual_seed(0)
    encoders = build_encoders(small_config(shared=EVERYTHING))
    return AlignCLIPModel(encoders, AlignCLIPLoss(beta=0.0), chunk_size)


def test_the_longest_text_of_a_batch() -> None:
    batch, _ = batches()
    assert batch["text_length"] == LONGEST
    assert batch["text"].shape == (8, 12)
    assert batch["text"][:, : LONGEST - 1].eq(0).any(dim=1).any()  # "!" is a token like any other
    assert count_samples(batch) == 8


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_features_and_gradients_are_the_same(chunk_size: int) -> None:
    model, found = model_of(chunk_size), []
    for batch in batches():
        model.zero_grad()
        image, text, scale = model(batch)
        model.loss((image, text, scale), batch)["total"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([image, text, scale, *gradients])
    for with_length, without in zip(*found, strict=True):
        assert torch.equal(with_length, without)


def test_a_model_takes_the_length_that_it_is_given() -> None:
    """It doesn't look for the length: the end of a text beyond it is cut off."""
    model, (batch, _) = model_of(), batches()
    _, text, _ = model(batch)
    batch["text_length"] = LONGEST - 1
    _, cut, _ = model(batch)
    assert not torch.equal(text, cut)


def test_the_operations_of_a_batch_are_those_of_its_length() -> None:
    model, (batch, without) = model_of(), batches()
    model.count_flops()
    counted = model.flops_per_batch(batch)
    assert counted == model.flops_per_batch(without) > 0
    without["text"] = without["text"].to("meta")  # a device whose tensors have no numbers
    batch["text"] = without["text"]
    assert model.flops_per_batch(batch) == counted < model.flops_per_batch(without)


def test_a_compiled_model_is_one_graph_for_all_lengths() -> None:
    model, (batch, _) = model_of(), batches()
    compiler = CompileCounter()
    compiled, found = torch.compile(model, backend=compiler), []
    for length in (LONGEST, LONGEST + 1, LONGEST + 2):
        batch["text_length"] = length
        found.append(compiled(batch)[1])
    graphs = compiler.frame_count
    torch._dynamo.reset()
    compiler.clear()
    torch.compile(model, backend=compiler)(batch)
    assert graphs == compiler.frame_count > 0
    assert torch.equal(found[0], found[2])
