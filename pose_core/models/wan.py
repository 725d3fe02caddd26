"""Wan 2.1, text and image to video, behind the ``VideoModel`` protocol."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel
from torch import Tensor, nn

from pose_core.errors import CheckpointError
from pose_core.models.video_model import Condition

TEXT_SLOTS = 512
"""Prompt tokens a Wan transformer attends to; the stock pipelines fill the rest of a prompt with zeros."""
TIMESTEPS = 1000
"""Scale of the time a Wan transformer is given."""


class Wan:
    """A ``WanTransformer3DModel``; prompts may come without their zero padding (see ``PaddedTextAttention``)."""

    def __init__(self, module: WanTransformer3DModel, image_tokens: int = 0):
        self.module: Any = module
        self.compute_dtype = torch.float32
        self.sharing: Any = None
        for block in module.blocks:
            block.attn2.set_processor(PaddedTextAttention(image_tokens))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.blocks

    @property
    def width(self) -> int:
        return self.module.config.num_attention_heads * self.module.config.attention_head_dim

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``v(x_t, t, c)`` for ``x_t [B, C, T, H, W]`` and ``t [B]`` in [0, 1]; shaped like ``x_t``."""
        inputs = x_t if condition.first_frame is None else torch.cat([x_t, condition.first_frame.to(x_t.dtype)], dim=1)
        text = condition.text
        if text.shape[1] < TEXT_SLOTS:
            text = F.pad(text, (0, 0, 0, 1))
        image = condition.image
        return self.module(
            hidden_states=inputs.to(self.compute_dtype),
            timestep=t * TIMESTEPS,
            encoder_hidden_states=text.to(self.compute_dtype),
            encoder_hidden_states_image=None if image is None else image.to(self.compute_dtype),
            return_dict=False,
        )[0].type_as(x_t)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of the blocks named by index, in the order asked for."""
        outputs: dict[int, Tensor] = {}

        def keep(index: int):
            return lambda _module, _inputs, output: outputs.__setitem__(index, output)

        hooks = [self.blocks[index].register_forward_hook(keep(index)) for index in blocks]
        try:
            self.velocity(x_t, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
        if self.sharing is None:
            return [outputs[index] for index in blocks]
        return [EquipartitionSharder.unshard(outputs[index], 1, self.sharing) for index in blocks]

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

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write full ``weights`` of this model as a folder that stock diffusers loads."""
        with torch.device("meta"):
            module = WanTransformer3DModel.from_config(self.module.config)
        module.load_state_dict(weights, assign=True)
        module.save_pretrained(folder)


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


def read_config(folder: Path, part: str) -> dict:
    """The ``config.json`` of one part of a diffusers folder.

    Raises:
        CheckpointError: when the folder lacks the part or it is not JSON (correctable in the call).
    """
    path = folder / part / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {part}/config.json: model.teacher must name a complete diffusers folder", in_call=True
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch the folder again", in_call=True) from None


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
    config = read_config(folder, "transformer")
    found = config.get("_class_name")
    if found != "WanTransformer3DModel":
        raise CheckpointError(
            f"{folder}/transformer is a {found}, model.family=wan needs a WanTransformer3DModel", in_call=True
        )
    tokens = count_image_tokens(folder) if image_tokens is None else image_tokens
    if meta:
        with torch.device("meta"):
            return Wan(_cast(WanTransformer3DModel.from_config(config), dtype), tokens)
    try:
        module, keys = WanTransformer3DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}/transformer cannot be loaded: {reason}", in_call=True) from None
    # The stock loader only warns: it makes up weights that are missing and drops those it has no place for.
    for fault in ("missing", "unexpected"):
        if names := keys[f"{fault}_keys"]:
            raise CheckpointError(
                f"{folder}/transformer has {len(names)} {fault} weights, e.g. {sorted(names)[0]}: "
                "its weights and its config.json must belong together",
                in_call=True,
            )
    return Wan(_cast(module, dtype), tokens)


def _cast(module: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """All weights in ``dtype``; the stock loader keeps some in float32, and the stock ``to`` warns of changing that.

    Sharding computes in one precision anyway, see ``training/parallel.py``.
    """
    return nn.Module.to(module, dtype)
