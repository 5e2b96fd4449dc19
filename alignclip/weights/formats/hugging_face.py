"""Hugging Face's ``CLIPModel``: ``config.json`` + ``model.safetensors``.

Its attention keeps query, key and value apart, and its projections are linear layers, so
transposed. transformers is imported only to write a model and to read it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from alignclip.config.schema import VOCABULARY
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError
from alignclip.weights.formats import hugging_face_settings as settings
from alignclip.weights.formats.base import (
    Description,
    Format,
    Loaded,
    Reopened,
    Weights,
    described,
    preprocess_config,
    weights_of,
)
from alignclip.weights.formats.by_tensors import shared_in
from alignclip.weights.locate import HF_CONFIG, HF_PREPROCESSOR, HF_PROCESSOR
from alignclip.weights.renaming import inverted, replace_prefix
from alignclip.weights.weight_files import Content

BEGINNINGS = {  # of names: theirs → ours
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
}
IN_BLOCK = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}
PROJECTIONS = {"text_projection", "visual.proj"}  # in our words
QKV = "qkv"  # the order in which open_clip has them in one tensor
BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}  # of old
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")  # in transformers


class HuggingFace(Format):
    """Read and write a ``CLIPModel`` with its processor."""

    name = "huggingface"
    library = "transformers"
    last = HF_CONFIG
    usage = (
        "from transformers import CLIPModel, CLIPProcessor\n\n"
        'model = CLIPModel.from_pretrained("{folder}")\n'
        'processor = CLIPProcessor.from_pretrained("{folder}")'
    )

    def detect(self, content: Content) -> bool:
        """Find a ``CLIPModel``'s names of the text's embeddings and of the image projection."""
        names = {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"}
        return names <= content.state_dict.keys()

    def read(self, content: Content) -> Weights:
        """Give the tensors our names."""
        return Weights(content, self, our_tensors(content.state_dict))

    def describe(self, weights: Weights) -> Description:
        """Return what ``config.json`` says, with the sharing that the weights show."""
        content = weights.content
        given = content.json_beside(HF_CONFIG)
        if not given:
            raise UserError(
                f"{content.place} is of a Hugging Face CLIPModel, but no {HF_CONFIG} lies beside it"
            )
        try:
            config = settings.our_config(given)
        except UserError as error:
            raise UserError(f"{content.place}: {HF_CONFIG}: {error}") from None
        config.shared = shared_in(weights.tensors, config)
        return described(config, f"its {HF_CONFIG}")

    def pixels(self, content: Content) -> Mapping[str, Any]:
        """Return what the file of the processor or of the image processor says."""
        name, given = HF_PROCESSOR, content.json_beside(HF_PROCESSOR).get("image_processor")
        if not isinstance(given, dict):
            name, given = HF_PREPROCESSOR, content.json_beside(HF_PREPROCESSOR)
        try:
            found = settings.our_pixels(given)
        except UserError as error:
            raise UserError(f"{content.place}: {name}: {error}") from None
        preprocess_config(found, content.place, image_size=224)
        return found

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Write the model and its processor, as transformers lays them out."""
        transformers = _transformers()
        size, text = loaded.config.vision_cfg.image_size, loaded.config.text_cfg
        pixels = _image_processor(transformers)(
            **settings.processor_settings(loaded.preprocess, size)
        )
        config = transformers.CLIPConfig(**settings.their_config(loaded.config))
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = transformers.CLIPModel(config)
        model.load_state_dict(their_tensors(weights_of(loaded)), assign=True, strict=False)
        lacking = [name for name, value in model.named_parameters() if value.is_meta]
        assert not lacking, lacking
        model.save_pretrained(folder, safe_serialization=True)
        pixels.save_pretrained(folder)  # CLIPProcessor of transformers 5 doesn't
        if text.vocab_size < VOCABULARY:  # CLIP's byte pairs are the only tokenizer there is
            return
        files = _write_tokenizer(folder)
        words = transformers.CLIPTokenizerFast(*files, model_max_length=text.context_length)
        transformers.CLIPProcessor(pixels, words).save_pretrained(folder)

    def reopen(self, folder: Path) -> Reopened:
        """Read the export by stock transformers."""
        transformers = _transformers()
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = _image_processor(transformers).from_pretrained(folder, local_files_only=True)

        def prepare(image: Image.Image) -> Tensor:
            return torch.from_numpy(processor(images=image, return_tensors="np")["pixel_values"][0])

        def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                found = model.get_image_features(images), model.get_text_features(tokens)
                # transformers 5 gives an output of several parts
                image, text = (getattr(one, "pooler_output", one) for one in found)
                return image, text, model.logit_scale.exp().reshape(())

        return Reopened(encode, prepare)


# --- tensors ----------------------------------------------------------------------------------


def our_tensors(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a ``CLIPModel``'s tensors our names; one that has none keeps its own, to be told."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # our name → query, key, value
    for their_name, value in theirs.items():
        name = _in_block(replace_prefix(their_name, BEGINNINGS), IN_BLOCK)
        if part := re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)", name):
            parts.setdefault(f"{part[1]}in_proj_{part[3]}", {})[part[2]] = value
        elif their_name not in BUFFERS:
            ours[name] = value.t().contiguous() if name in PROJECTIONS else value
    for name, values in parts.items():
        if len(values) == len(QKV):  # with one missing, the whole is told as missing
            ours[name] = torch.cat([values[part] for part in QKV])
    return ours


def their_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`our_tensors`, for the state dict of a plain ViT."""
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        parts = {name: value.t() if name in PROJECTIONS else value}
        if whole := re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", name):
            names = (f"{whole[1]}{part}_proj.{whole[2]}" for part in QKV)
            parts = dict(zip(names, value.chunk(len(QKV)), strict=True))
        for part, rows in parts.items():
            their_name = replace_prefix(_in_block(part, inverted(IN_BLOCK)), inverted(BEGINNINGS))
            theirs[their_name] = rows.clone().contiguous()
    return theirs


def _in_block(name: str, names: Mapping[str, str]) -> str:
    """Replace the name of a module within a block."""
    block = re.match(r"(.*resblocks\.\d+\.)?", name)
    before = block[0] if block else ""
    return before + replace_prefix(name.removeprefix(before), names)


# --- transformers -----------------------------------------------------------------------------


def _write_tokenizer(folder: Path) -> tuple[str, str]:
    """Write CLIP's byte pairs as transformers reads them; return the paths of the two files."""
    tokenizer = SimpleTokenizer()
    special = tokenizer.all_special_ids
    ids = {word: number for word, number in tokenizer.encoder.items() if number not in special}
    # each library has its own names for the special tokens
    ids |= dict(zip(SPECIAL_TOKENS, (tokenizer.sot_token_id, tokenizer.eot_token_id), strict=True))
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    merges.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(vocabulary), str(merges)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--to huggingface needs transformers: pip install 'alignclip[convert]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # transformers 5 draws one for a model's weights
    return transformers


def _image_processor(transformers: Any) -> Any:
    """Return the CLIP image processor that resizes with PIL, as open_clip does.

    Up to transformers 4, ``CLIPImageProcessor`` is that one. The one of transformers 5 resizes with
    torchvision, and a value of a pixel comes out 1 of 255 higher or lower here and there.
    """
    found = getattr(transformers, "CLIPImageProcessorPil", None)
    return found or transformers.CLIPImageProcessor
