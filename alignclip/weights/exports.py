"""A model → the files of each format, and those files read by the library that the format is of.

What is written is plain data: safetensors, JSON and, where the format asks for a pickle, one of tensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from omegaconf import OmegaConf
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from alignclip.config.checks import VOCABULARY
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError
from alignclip.weights import hugging_face, release_format
from alignclip.weights.loading import Loaded, Preprocess, load
from alignclip.weights.locate import EXPORT_CONFIG, EXPORT_WEIGHTS, HF_CONFIG, RUN_CONFIG, UNUSED

CHECKPOINT, RELEASE = "model.pt", "release.pt"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")  # in transformers

Encode = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]  # images, tokens -> features, exp(logit_scale)


@dataclass(frozen=True)
class Again:
    """A model as its format's library has read it again: its encoders, and its preparation of an image."""

    encode: Encode
    prepare: Preprocess


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: into an empty folder.
        read: by the call that ``usage`` shows.
        library: what the Hugging Face Hub calls that library.
        last: the file without which nobody takes the folder for a model.
        usage: the Python of whoever gets it.
    """

    write: Callable[[Loaded, Path], None]
    read: Callable[[Path], Again]
    library: str
    last: str
    usage: str

    def usage_at(self, place: str) -> str:
        """The Python that loads what lies at a path or URL; stock libraries read no object storage, alignclip does."""
        if "://" not in place or self.library == "alignclip":
            return self.usage.format(folder=place)
        return f'import alignclip\n\nmodel, preprocess, tokenizer = alignclip.load("{place}")'


def clones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU with memory of their own each: shared modules are written once for each tower."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}


def weights_of(loaded: Loaded) -> dict[str, Tensor]:
    """The state dict with both towers' names and ``logit_scale`` of shape []."""
    weights = clones(loaded.model.state_dict())
    return weights | {"logit_scale": weights["logit_scale"].reshape(())}


def encoding(model: nn.Module) -> Encode:
    """With open_clip's methods."""

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            scale = model.logit_scale.exp()  # type: ignore[operator]
            return model.encode_image(images), model.encode_text(tokens), scale.reshape(())  # type: ignore[operator]

    return encode


# --- open_clip --------------------------------------------------------------------------------------------------------


def write_open_clip(loaded: Loaded, folder: Path) -> None:
    """As ``open_clip.push_to_hf_hub`` lays it out; stock open_clip has two towers, so both get the shared numbers."""
    config = loaded.config
    vision, text = asdict(config.vision_cfg), asdict(config.text_cfg)
    vision["patch_dropout"] = 0.0  # of training; open_clip would go on with it
    if vision["timm_model_name"] is None:
        vision = {key: value for key, value in vision.items() if not key.startswith("timm_")}
    else:
        vision = {
            key: vision[key] for key in ("image_size", "timm_model_name", "timm_pool", "timm_proj")
        }
    pixels = {
        key: value for key, value in asdict(loaded.preprocess).items() if key != "size"
    }  # that is the model's
    model_cfg = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if config.quick_gelu:
        model_cfg["quick_gelu"] = True
    (folder / EXPORT_CONFIG).write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": pixels}, indent=2)
    )
    save_file(weights_of(loaded), folder / EXPORT_WEIGHTS[0], metadata={"format": "pt"})


def read_open_clip(folder: Path) -> Again:
    """By stock open_clip."""
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return Again(encoding(model.eval()), prepare)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def write_hugging_face(loaded: Loaded, folder: Path) -> None:
    """A ``CLIPModel`` with its processor, in transformers' own files."""
    transformers = _transformers()
    size = loaded.config.vision_cfg.image_size
    pixels = transformers.CLIPImageProcessor(
        **hugging_face.processor_settings(loaded.preprocess, size)
    )
    config = transformers.CLIPConfig(**hugging_face.their_config(loaded.config))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = transformers.CLIPModel(config)
    model.load_state_dict(hugging_face.their_weights(weights_of(loaded)), assign=True, strict=False)
    lacking = [name for name, value in model.named_parameters() if value.is_meta]
    assert not lacking, lacking
    model.save_pretrained(folder, safe_serialization=True)
    if (
        loaded.config.text_cfg.vocab_size < VOCABULARY
    ):  # CLIP's byte pairs are the only tokenizer there is
        pixels.save_pretrained(folder)
        return
    tokenizer = SimpleTokenizer()
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    ids = {
        word: number
        for word, number in tokenizer.encoder.items()
        if number not in tokenizer.all_special_ids
    }
    # each library has its own names for them
    ids |= dict(zip(SPECIAL_TOKENS, (tokenizer.sot_token_id, tokenizer.eot_token_id), strict=True))
    vocabulary.write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges.write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)]) + "\n", encoding="utf-8"
    )
    length = loaded.config.text_cfg.context_length
    words = transformers.CLIPTokenizerFast(str(vocabulary), str(merges), model_max_length=length)
    transformers.CLIPProcessor(pixels, words).save_pretrained(folder)


def read_hugging_face(folder: Path) -> Again:
    """By stock transformers."""
    transformers = _transformers()
    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def prepare(image: Image.Image) -> Tensor:
        return torch.from_numpy(processor(images=image, return_tensors="np")["pixel_values"][0])

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            features = model.get_image_features(images), model.get_text_features(tokens)
            return *features, model.logit_scale.exp().reshape(())

    return Again(encode, prepare)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--to huggingface needs transformers: pip install 'alignclip[convert]'"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


# --- the authors' release and Composer --------------------------------------------------------------------------------


def _default_pixels(loaded: Loaded, to: str) -> None:
    """These formats don't say how images are prepared: their readers take CLIP's mean and standard deviation."""
    if loaded.preprocess != PreprocessCfg(size=loaded.preprocess.size):
        raise UserError(
            f"--to {to} can't hold that this model's images are prepared otherwise: {loaded.preprocess}"
        )


def write_release(loaded: Loaded, folder: Path) -> None:
    """The file that the AlignCLIP authors' code reads: one transformer, so of models that share everything."""
    _default_pixels(loaded, "release")
    if loaded.config.quick_gelu:
        raise UserError(
            "--to release can't hold model.quick_gelu: the authors' code has GELU alone"
        )
    shared, config = loaded.config.shared, loaded.config
    everything = (
        shared.blocks in (-1, config.text_cfg.layers)
        and config.vision_cfg.layers == config.text_cfg.layers
    )
    if not (everything and shared.ln_final and shared.projection):
        raise UserError(
            "--to release is for models that share everything between the towers (model.shared: blocks -1, ln_final, "
            "projection); this one does not"
        )
    weights = release_format.their_weights(weights_of(loaded))
    # their model has a projection that their code never uses; where nobody knows its numbers, it gets zeros
    unused = loaded.unused or {"text.text_projection": torch.zeros_like(weights["projection"])}
    torch.save({"state_dict": weights | clones(unused)}, folder / RELEASE)
    _write_config(loaded, folder)  # how wide the heads are is not in the file


def read_release(folder: Path) -> Again:
    """By alignclip: the authors' code is no package."""
    model, prepare, _ = load(folder / RELEASE)
    return Again(encoding(model), prepare)


def write_checkpoint(loaded: Loaded, folder: Path) -> None:
    """What ``load_path`` with ``load_weights_only=true``, ``pretrained`` and :func:`alignclip.load` read."""
    _default_pixels(loaded, "composer")
    model = {f"encoders.{name}": value for name, value in clones(loaded.model.state_dict()).items()}
    torch.save({"state": {"model": model}}, folder / CHECKPOINT)
    _write_config(loaded, folder)


def _write_config(loaded: Loaded, folder: Path) -> None:
    (folder / RUN_CONFIG).write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(loaded.config)}), encoding="utf-8"
    )


def read_checkpoint(folder: Path) -> Again:
    """By alignclip."""
    model, prepare, _ = load(folder / CHECKPOINT)
    return Again(encoding(model), prepare)


def keep_unused(loaded: Loaded, folder: Path) -> None:
    """Beside a format that has no place for them, tensors that nobody uses: the way back is then without a loss."""
    if loaded.unused and not (folder / RELEASE).exists():
        save_file(clones(loaded.unused), folder / UNUSED)


FORMATS = {
    "open_clip": Format(
        write_open_clip,
        read_open_clip,
        "open_clip",
        EXPORT_CONFIG,
        "import open_clip\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")',
    ),
    "huggingface": Format(
        write_hugging_face,
        read_hugging_face,
        "transformers",
        HF_CONFIG,
        "from transformers import CLIPModel, CLIPProcessor\n\n"
        'model = CLIPModel.from_pretrained("{folder}")\n'
        'processor = CLIPProcessor.from_pretrained("{folder}")',
    ),
    "release": Format(
        write_release,
        read_release,
        "alignclip",
        RELEASE,
        f'import alignclip\n\nmodel, preprocess, tokenizer = alignclip.load("{{folder}}/{RELEASE}")',
    ),
    "composer": Format(
        write_checkpoint,
        read_checkpoint,
        "alignclip",
        CHECKPOINT,
        f'import alignclip\n\nmodel, preprocess, tokenizer = alignclip.load("{{folder}}/{CHECKPOINT}")\n'
        f"# to train on from it: composer pretrain.py my.yaml pretrained={{folder}}/{CHECKPOINT}",
    ),
}
