"""Wan 2.1, text and image to video, behind the ``VideoModel`` protocol."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from pose_core.models.adapter import TIMESTEPS, Adapter, build_empty
from pose_core.models.folders import read_config
from pose_core.models.sizes import compression, latent_shape, takes_image
from pose_core.models.video_model import ClipShapes, Codec, Condition, ConditionWidths
from pose_core.models.weights import Weights

TEXT_SLOTS = 512
"""Prompt tokens a Wan transformer attends to; the stock pipelines fill the rest of a prompt with zeros."""


class Wan(Adapter):
    """A ``WanTransformer3DModel``; prompts may come without their zero padding (see ``PaddedTextAttention``)."""

    def __init__(self, module: WanTransformer3DModel, image_tokens: int = 0, weights: Weights | None = None):
        super().__init__(module, weights)
        self.sharing: Any = None
        for block in module.blocks:
            block.attn2.set_processor(PaddedTextAttention(image_tokens))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        inputs = x_t if condition.first_frame is None else torch.cat([x_t, condition.first_frame.to(x_t.dtype)], dim=1)
        return self._network(inputs, (t if told is None else told) * TIMESTEPS, condition).type_as(x_t)

    def _network(self, inputs: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The stock forward pass; ``timestep`` is ``[B]``, or ``[B, tokens]`` where tokens differ in it."""
        text = condition.text
        if text.shape[1] < TEXT_SLOTS:
            text = F.pad(text, (0, 0, 0, 1))
        image = condition.image
        return self.module(
            hidden_states=inputs.to(self.compute_dtype),
            timestep=timestep,
            encoder_hidden_states=text.to(self.compute_dtype),
            encoder_hidden_states_image=None if image is None else image.to(self.compute_dtype),
            return_dict=False,
        )[0]

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of the blocks named by index, in the order asked for; no later one runs."""
        outputs = super().features(x_t, t, condition, blocks)
        if self.sharing is None:
            return outputs
        return [EquipartitionSharder.unshard(output, 1, self.sharing) for output in outputs]

    def share_tokens(self, mesh: Any) -> None:
        """See ``VideoModel``; the tokens and the attention heads must be multiples of the ranks."""
        # As ``enable_parallelism`` of the stock model does, which asks for an accelerator.
        config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
        config.setup(mesh.get_rank(), mesh.size(), torch.device(mesh.device_type), mesh)
        for block in self.module.blocks:
            block.attn1.processor._parallel_config = ParallelConfig(context_parallel_config=config)
        # It warns that one time a clip, for all of its tokens, is not split.
        logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
        apply_context_parallel(self.module, config, self.module._cp_plan)
        self.sharing = config._flattened_mesh


class PaddedTextAttention:
    """Cross-attention to the image tokens and to ``TEXT_SLOTS`` prompt tokens, of which only the first are given.

    The stock pipelines pad every prompt to 512 tokens with zeros. All zero tokens give the same key and the same value,
    and ``n`` equal keys weigh exactly as one key whose score is ``log(n)`` higher. So the last token given here stands
    for itself and for all slots that were left out, and the result is the stock one at a fraction of the cost.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, image_tokens: int):
        self.image_tokens = image_tokens

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``hidden_states [B, tokens, D]`` and ``encoder_hidden_states [B, image_tokens + L, D]``; like the former."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        image, text = encoder_hidden_states.tensor_split((self.image_tokens,), dim=1)
        query = heads(attn.norm_q(attn.to_q(hidden_states)))
        result = F.scaled_dot_product_attention(
            query, heads(attn.norm_k(attn.to_k(text))), heads(attn.to_v(text)), attn_mask=self._bias(text, query)
        )
        if attn.add_k_proj is not None:
            key = heads(attn.norm_added_k(attn.add_k_proj(image)))
            result = result + F.scaled_dot_product_attention(query, key, heads(attn.add_v_proj(image)))
        result = result.transpose(1, 2).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](result))

    @staticmethod
    def _bias(text: Tensor, query: Tensor) -> Tensor | None:
        given = text.shape[1]
        if given == TEXT_SLOTS:
            return None
        bias = query.new_zeros(given)
        bias[-1] = math.log(TEXT_SLOTS - given + 1)
        return bias.expand(query.shape[2], given)


def count_image_tokens(folder: Path) -> int:
    """Tokens of the image encoder in a diffusers folder (patches and one class token), 0 without one."""
    if read_config(folder, "transformer").get("image_dim") is None:
        return 0
    vision = read_config(folder, "image_encoder")
    return (vision["image_size"] // vision["patch_size"]) ** 2 + 1


def load(
    folder: Path, *, image_tokens: int | None = None, meta: bool = False, dtype: torch.dtype = torch.float32
) -> Wan:
    """The transformer of a diffusers folder; ``meta=True`` builds it without weights or memory.

    ``image_tokens`` need only be given where the folder holds nothing but a transformer; ``dtype`` is what its weights
    are kept in.

    Raises:
        CheckpointError: when the folder lacks its config or its weights, or they do not fit each other.
    """
    tokens = count_image_tokens(folder) if image_tokens is None else image_tokens
    return load_part(Wan, folder, "transformer", tokens, "wan", meta, dtype)


def load_part(
    kind: type[Wan], folder: Path, part: str, image_tokens: int, family: str, meta: bool, dtype: torch.dtype
) -> Wan:
    """One transformer of a folder of any Wan family."""
    module = build_empty(WanTransformer3DModel, folder, part, family, dtype)
    config = module.config
    # Its tables are no weights: no file holds them.
    module.rope = WanRotaryPosEmbed(config.attention_head_dim, tuple(config.patch_size), config.rope_max_seq_len)
    model = kind(module, image_tokens, Weights(folder, part))
    if not meta:
        model.read_weights()
    return model


class WanFamily:
    """Wan 2.1: one transformer; image to video by CLIP embeddings beside the latents of the first frame."""

    name = "wan"
    shares_tokens = True
    pipelines = {"i2v": "WanImageToVideoPipeline", "t2v": "WanPipeline"}
    model = Wan

    def tasks(self, folder: Path) -> tuple[str, ...]:
        return ("i2v",) if takes_image(read_config(folder, "transformer")) else ("t2v",)

    def widths(self, folder: Path, task: str) -> ConditionWidths:
        config = read_config(folder, "transformer")
        first_frame = config["in_channels"] - config["out_channels"] if takes_image(config) else 0
        return ConditionWidths(config["text_dim"], config.get("image_dim") or 0, first_frame)

    def load_teacher(self, folder: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32) -> Adapter:
        return self.load_generator(folder, folder, meta=meta, dtype=dtype)

    def load_generator(
        self, folder: Path, teacher: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32
    ) -> Adapter:
        return load_part(self.model, folder, "transformer", count_image_tokens(teacher), self.name, meta, dtype)

    def load_codec(self, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False) -> Codec:
        # Here and not above: training ranks need no encoders, whose libraries take a hundred megabytes.
        from pose_core.models.codec import WanCodec

        return WanCodec.load(folder, text_tokens, device, only_video=only_video)

    def compression(self, folder: Path) -> tuple[int, int]:
        return compression(folder)

    def clip_shapes(
        self, folder: Path, *, task: str, frames: int, height: int, width: int, text_tokens: int
    ) -> ClipShapes:
        widths = self.widths(folder, task)
        latents = latent_shape(folder, frames, height, width)
        patch = read_config(folder, "transformer").get("patch_size", (1, 2, 2))
        first_frame = self._first_frame_shape(latents, widths.first_frame)
        return ClipShapes(
            pixels=(3, frames, height, width),
            latents=latents,
            text=(text_tokens, widths.text),
            image=(count_image_tokens(folder), widths.image) if widths.image else None,
            first_frame=first_frame if widths.first_frame else None,
            tokens=math.prod(size // step for size, step in zip(latents[1:], patch, strict=True)),
        )

    def _first_frame_shape(self, latents: tuple[int, ...], channels: int) -> tuple[int, ...]:
        return channels, *latents[1:]

    def one_step_index(self, index: dict[str, Any], task: str) -> dict[str, Any]:
        return index | {"_class_name": self.pipelines[task]}

    def finish_export(self, out: Path) -> None:
        """Nothing else differs."""


FAMILY = WanFamily()
