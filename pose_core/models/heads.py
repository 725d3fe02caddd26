"""The light discriminator heads over the backbone's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pose_core.models.video_model import Condition

LATENT_AREAS = 16
"""Areas along each side that a first frame's latents are averaged over, about as many as an image encoder has."""


class DiscriminatorHeads(nn.Module):
    """One token-wise head a feature block and, for image to video, a semantic head that also sees the condition."""

    def __init__(self, blocks: int, width: int, head_width: int, text_width: int, image_width: int, queries: int):
        """``image_width=0`` means text to video: no semantic head."""
        super().__init__()
        self.token_heads = nn.ModuleList(_token_head(width, head_width) for _ in range(blocks))
        self.recompute = False
        """Keep the features alone for the backward pass: in float32, normalised, they are most of a turn's memory."""
        self.semantic_head = SemanticHead(width, head_width, text_width, image_width, queries) if image_width else None

    def forward(self, features: Sequence[Tensor], condition: Condition) -> list[Tensor]:
        """``features``: ``[B, tokens, width]`` a block. Logits: ``[B, tokens]`` a block, ``[B, queries]`` semantic."""
        run = _recomputed if self.recompute and torch.is_grad_enabled() else _plainly
        logits = [run(head, feature).squeeze(-1) for head, feature in zip(self.token_heads, features, strict=True)]
        if self.semantic_head is not None:
            video = torch.cat([run(self.semantic_head.features, feature) for feature in features], dim=1)
            logits.append(self.semantic_head(video, condition))
        return logits


class SemanticHead(nn.Module):
    """Learnable queries meet the condition by self-attention, then look at the video by cross-attention.

    Deviation: of a model without an image encoder, the condition image are its first frame's latents.
    """

    def __init__(self, width: int, head_width: int, text_width: int, image_width: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, head_width) / head_width**0.5)
        self.text = nn.Linear(text_width, head_width)
        self.image = nn.Linear(image_width, head_width)
        self.features = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, head_width))
        self.self_attention = nn.MultiheadAttention(head_width, num_heads=4, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(head_width, num_heads=4, batch_first=True)
        self.norm_condition = nn.LayerNorm(head_width)
        self.norm_queries = nn.LayerNorm(head_width)
        self.logit = nn.Linear(head_width, 1)

    def forward(self, video: Tensor, condition: Condition) -> Tensor:
        """Logits ``[B, queries]`` for ``video [B, blocks * tokens, head_width]``, what ``self.features`` makes of each.

        Zero tokens behind a prompt are not attended to.
        """
        text, image = condition.text.float(), image_tokens(condition).float()
        queries = self.queries.expand(len(text), -1, -1)
        context = torch.cat([queries, self.image(image), self.text(text)], dim=1)
        absent = torch.zeros(context.shape[:2], dtype=torch.bool, device=context.device)
        absent[:, -text.shape[1] :] = text.abs().amax(dim=-1) == 0
        context = self.norm_condition(context)
        context = (
            context + self.self_attention(context, context, context, key_padding_mask=absent, need_weights=False)[0]
        )
        queries = self.norm_queries(context[:, : queries.shape[1]])
        return self.logit(queries + self.cross_attention(queries, video, video, need_weights=False)[0]).squeeze(-1)


def image_tokens(condition: Condition) -> Tensor:
    """The condition image as tokens ``[B, N, D]``: its embeddings or, without any, its latents (16 x 16)."""
    if condition.image is not None:
        return condition.image
    assert condition.first_frame is not None
    latents = condition.first_frame[:, :, 0]
    rows, columns = (min(side, LATENT_AREAS) for side in latents.shape[2:])
    return F.adaptive_avg_pool2d(latents, (rows, columns)).flatten(2).transpose(1, 2)


def _plainly(head: nn.Module, feature: Tensor) -> Tensor:
    return head(feature.float())


def _recomputed(head: nn.Module, feature: Tensor) -> Tensor:
    return checkpoint(_plainly, head, feature, use_reentrant=False)


def _token_head(width: int, head_width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, head_width), nn.SiLU(), nn.Linear(head_width, 1))
