"""The two encoders: a stock open_clip CLIP, some or all of whose modules serve both modalities.

Everything shared is SharedCLIP (https://arxiv.org/abs/2406.17639, section 4.1), nothing shared is
CLIP. The *vision* tower is pointed at the text tower's modules, because open_clip initialises text
towers as published and leaves vision towers at PyTorch's defaults. A state dict has both towers'
names, so a stock, unshared open_clip.CLIP loads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from alignclip.config.model_checks import check_model
from alignclip.config.schema import ModelConfig
from alignclip.data.batch import longest_text
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError, nearest
from alignclip.model.blocks import pooled_tokens, replace_classes
from alignclip.ranks import local_part

MAX_LOGIT_SCALE = math.log(100)
IMAGE_ENCODER, TEXT_ENCODER = "image encoder", "text encoder"  # in a profiler's trace

Images = Tensor | Image.Image | Sequence[Image.Image]
Texts = Tensor | str | Sequence[str]


class CLIP(open_clip.CLIP):
    """open_clip's CLIP that trims texts to the batch's longest, and encodes in recomputed chunks.

    Attributes:
        preprocess: how :func:`alignclip.load` prepares its images; without it, as open_clip does by
            default.
    """

    preprocess: Callable[[Image.Image], Tensor] | None = None

    def encode_image(self, image: Images, normalize: bool = False) -> Tensor:
        """Return image features.

        Args:
            image: [n, 3, image_size, image_size], normalised pixels; or a PIL image, or a list of
                n.
            normalize: whether to L2-normalise the features.

        Returns:
            [n, embed_dim]; n is 1 for one PIL image.
        """
        return super().encode_image(self._pixels(image), normalize)

    def forward(
        self, image: Tensor, text: Tensor, chunk_size: int = 0, text_length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode pairs inside of what DDP and FSDP wrap, so that they see every parameter's use.

        Args:
            image: [n, 3, image_size, image_size], normalised pixels.
            text: [n, l] token ids.
            chunk_size: see :meth:`encode`.
            text_length: see :meth:`encode`.

        Returns:
            Image and text features, L2-normalised, [n, embed_dim] each, and exp(logit_scale), [1].
        """
        return *self.encode(image, text, chunk_size, text_length), self.logit_scale.exp()

    def encode_text(self, text: Texts, normalize: bool = False) -> Tensor:
        """Return text features, pooled at the end-of-text token, which has the highest id.

        Positions behind the last end-of-text token of the batch are left out: under the causal mask
        they can't change the features.

        Args:
            text: [n, l] token ids, padded with any id to any length; or a text, or a list of n, cut
                to the context length.
            normalize: whether to L2-normalise the features.

        Returns:
            [n, embed_dim]; n is 1 for one text.

        Raises:
            ValueError: a caption ends beyond the context length.
        """
        features = self._encode_trimmed_text(self._trim(self._tokens(text)))
        return F.normalize(features, dim=-1) if normalize else features

    def encode(
        self, images: Tensor, tokens: Tensor, chunk_size: int = 0, text_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return normalised features of a batch of pairs, in at least fp32.

        Args:
            images: [n, 3, image_size, image_size], normalised pixels.
            tokens: [n, l] token ids.
            chunk_size: with more than 0, so many samples are encoded at a time, and all but the
                last texts again in the backward pass, so that memory grows with the chunk while
                features and gradients are those of the whole batch.
            text_length: tokens of the longest text, up to its end-of-text token. None finds the
                length, for which the host waits for the device.

        Returns:
            Image and text features, [n, embed_dim] each.
        """
        # trimmed once for the batch, and not a chunk at a time
        return (
            # An evaluation makes self.encode_image a forward pass of its own under FSDP2, whose end
            # frees parameters that the texts need. So the class's method is called.
            _normalize(_in_chunks(_named(IMAGE_ENCODER, super().encode_image), images, chunk_size)),
            _normalize(
                _in_chunks(
                    _named(TEXT_ENCODER, self._encode_trimmed_text),
                    self._trim(tokens, text_length),
                    chunk_size,
                    keeps_last=True,
                )
            ),
        )

    @torch.inference_mode()
    def similarity(self, images: Images, texts: Texts, batch_size: int = 256) -> Tensor:
        """Return cosines of images with texts; times ``exp(logit_scale)`` they are the logits.

        Args:
            images: [n, 3, image_size, image_size], normalised pixels, on any device; or a PIL
                image, or a list of n.
            texts: [m, l] token ids, on any device; or a text, or a list of m.
            batch_size: images, and texts, that are moved to the model's device and encoded at a
                time.

        Returns:
            [n, m], on the model's device.
        """

        def encode(one: Callable[[Any], Tensor], inputs: Any) -> Tensor:
            if isinstance(inputs, str | Image.Image):
                inputs = [inputs]
            batches = [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]
            moved = (
                batch.to(self.logit_scale.device) if isinstance(batch, Tensor) else batch
                for batch in batches
            )
            return torch.cat([_normalize(one(batch)) for batch in moved])

        return encode(self.encode_image, images) @ encode(self.encode_text, texts).T

    def _pixels(self, images: Images) -> Tensor:
        """Prepare PIL images as the model takes them, on its device; leave pixels as they are."""
        if isinstance(images, Tensor):
            return images
        size = self.visual.image_size
        prepare = self.preprocess or image_transform(
            size[0] if isinstance(size, tuple) else size, is_train=False
        )
        several = [images] if isinstance(images, Image.Image) else list(images)
        for image in several:
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise TypeError(
                    f"pictures are PIL images, or one tensor of pixels, not {kind}: "
                    "PIL.Image.open(path)"
                )
        return torch.stack([prepare(image) for image in several]).to(self.logit_scale.device)

    def _tokens(self, texts: Texts) -> Tensor:
        """Tokenise texts, on the model's device; leave token ids as they are."""
        if isinstance(texts, Tensor):
            return texts
        several = [texts] if isinstance(texts, str) else list(texts)
        tokens: Tensor = _tokenizer(self.context_length)(several)
        return tokens.to(self.logit_scale.device)

    def _encode_trimmed_text(self, text: Tensor) -> Tensor:
        """Encode [n, l] token ids, l up to the context length, to [n, embed_dim] features."""
        length = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        mask = self.attn_mask[:length, :length]
        x = pooled_tokens(self.transformer, self.ln_final, x, text.argmax(dim=-1), mask)
        return x @ self.text_projection

    def _trim(self, text: Tensor, length: int | None = None) -> Tensor:
        """Cut texts to the length of the longest one; None finds this length."""
        # a compiled graph has static shapes: full length rather than a graph for every length
        if not torch.compiler.is_compiling():
            text = text[:, : longest_text(text) if length is None else length]
        if text.shape[1] > self.context_length:
            raise ValueError(
                f"captions of {text.shape[1]} tokens, but context_length is {self.context_length}"
            )
        return text


@cache
def _tokenizer(context_length: int) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=context_length)


def _named(name: str, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Name the calls of a function in a profiler's trace; a compiled graph has no names."""

    def named(inputs: Tensor) -> Tensor:
        with nullcontext() if torch.compiler.is_compiling() else record_function(name):
            return encode(inputs)

    return named


def _in_chunks(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, chunk_size: int, keeps_last: bool = False
) -> Tensor:
    """Encode a chunk at a time if ``chunk_size`` > 0, and again in the backward pass.

    Args:
        encode: inputs → features, a row a sample.
        inputs: of the whole batch.
        chunk_size: samples of a chunk.
        keeps_last: whether to keep the activations of the last chunk rather than encode it again.
            The backward pass begins with the last texts, so that no other activations are there.
    """
    if chunk_size <= 0 or not torch.is_grad_enabled():
        chunks = inputs.split(chunk_size) if chunk_size > 0 else [inputs]
        return torch.cat([encode(chunk) for chunk in chunks]) if len(chunks) > 1 else encode(inputs)
    # the random state is restored for the second run, so patch dropout draws the same patches
    recomputed = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=True)
    *first, last = inputs.split(chunk_size)
    features = [recomputed(chunk) for chunk in first]
    return torch.cat([*features, (encode if keeps_last else recomputed)(last)])


def _normalize(features: Tensor) -> Tensor:
    """L2-normalise in at least fp32: under bf16 autocast the norms would be off by up to 0.4 %."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def clamp_logit_scale_(model: nn.Module) -> None:
    """Clamp ``model.logit_scale`` to [0, ln 100] in place, for right after an optimizer step.

    Works on a parameter that FSDP2 has sharded, too, of which a rank may hold nothing. Source:
    CLIP, https://arxiv.org/abs/2103.00020, section 2.5.
    """
    logit_scale = model.logit_scale
    assert isinstance(logit_scale, Tensor)
    local_part(logit_scale).clamp_(0, MAX_LOGIT_SCALE)


def build_encoders(config: ModelConfig) -> CLIP:
    """Build the encoders on torch's default device, initialised from torch's global generator.

    Shared modules and the text tower are initialised as published, an unshared vision tower as
    open_clip does it. ``logit_scale`` has shape [1], because FSDP shards no scalars.

    Raises:
        UserError: sizes that don't go together, naming the keys and their values.
    """
    check_model(config)
    vision, timm_name = config.vision_cfg, config.vision_cfg.timm_model_name
    if timm_name is not None:
        _check_timm_name(timm_name)
    try:
        model = CLIP(
            config.embed_dim,
            vision_cfg=asdict(vision),
            text_cfg=asdict(config.text_cfg),
            quick_gelu=config.quick_gelu,
            init_logit_scale=config.init_logit_scale,
            nonscalar_logit_scale=True,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if timm_name is None:
            raise
        raise UserError(
            f"model.vision_cfg: timm can't build '{timm_name}' with these settings: {error}"
        ) from None
    if timm_name is not None:
        _check_timm_tower(config, model)
    replace_classes(model)

    shared = config.shared
    blocks = config.text_cfg.layers if shared.blocks == -1 else shared.blocks
    for i in range(1, blocks + 1):
        model.visual.transformer.resblocks[-i] = model.transformer.resblocks[-i]
    if shared.ln_final:
        model.visual.ln_post = model.ln_final
    if shared.projection:
        model.visual.proj = model.text_projection
    return model


def _check_timm_name(name: str) -> None:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        # timm has a thousand models: without a close one, where to look
        hint = hint if hint.startswith("did you mean") else "see timm.list_models()"
        raise UserError(f"model.vision_cfg.timm_model_name: unknown '{name}'; {hint}")


def _check_timm_tower(config: ModelConfig, model: CLIP) -> None:
    """Refuse a timm tower that would fail at the first batch, or that chunks would change."""
    vision = config.vision_cfg
    fixed_size = getattr(getattr(model.visual.trunk, "patch_embed", None), "img_size", None)
    if fixed_size is not None and tuple(fixed_size) != (vision.image_size, vision.image_size):
        raise UserError(
            f"model.vision_cfg.image_size={vision.image_size}, but "
            f"model.vision_cfg.timm_model_name={vision.timm_model_name} takes {fixed_size[0]}"
        )
    has_batch_norm = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    )
    if config.encode_chunk_size and has_batch_norm:
        raise UserError(
            f"model.encode_chunk_size={config.encode_chunk_size} would change the batch statistics "
            f"of model.vision_cfg.timm_model_name={vision.timm_model_name}, which has batch norms; "
            "set it to 0"
        )
