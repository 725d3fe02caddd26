"""What the discriminator heads look at, and what they must not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.video_model import Condition

CLIPS, TOKENS, WIDTH, QUERIES = 2, 6, 32, 3


@pytest.fixture
def heads() -> DiscriminatorHeads:
    torch.manual_seed(0)
    return DiscriminatorHeads(blocks=2, width=WIDTH, head_width=16, text_width=8, image_width=12, queries=QUERIES)


@pytest.fixture
def features() -> list[Tensor]:
    return list(torch.randn(2, CLIPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def condition() -> Condition:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(CLIPS, 4, 8, generator=generator)
    text[:, 3:] = 0
    return Condition(text, torch.randn(CLIPS, 5, 12, generator=generator))


def test_one_logit_a_token_and_block_and_one_a_semantic_query(heads, features, condition) -> None:
    logits = heads(features, condition)
    assert [tuple(head.shape) for head in logits] == [(CLIPS, TOKENS), (CLIPS, TOKENS), (CLIPS, QUERIES)]


def test_text_to_video_has_no_semantic_head(features) -> None:
    heads = DiscriminatorHeads(blocks=2, width=WIDTH, head_width=16, text_width=8, image_width=0, queries=QUERIES)
    logits = heads(features, Condition(torch.randn(CLIPS, 4, 8)))
    assert [tuple(head.shape) for head in logits] == [(CLIPS, TOKENS)] * 2


def test_a_token_head_judges_each_token_alone(heads, features, condition) -> None:
    before = heads(features, condition)[0]
    features[0][0, 2] += torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    changed = (heads(features, condition)[0] != before).nonzero().tolist()
    assert changed == [[0, 2]]


@pytest.mark.parametrize("part", ["text", "image"])
def test_only_the_semantic_head_sees_the_condition(heads, features, condition, part) -> None:
    *tokens, semantic = heads(features, condition)
    other = getattr(condition, part).clone()
    other[0, 0] += 1
    *other_tokens, other_semantic = heads(features, replace(condition, **{part: other}))
    assert all(torch.equal(a, b) for a, b in zip(tokens, other_tokens, strict=True))
    assert (semantic[0] != other_semantic[0]).all()
    torch.testing.assert_close(semantic[1], other_semantic[1])


def test_the_semantic_head_looks_at_every_block(heads, features, condition) -> None:
    semantic = heads(features, condition)[-1]
    for block in range(2):
        other = [feature + (block == index) * torch.arange(WIDTH) / WIDTH for index, feature in enumerate(features)]
        assert (heads(other, condition)[-1] - semantic).abs().max() > 1e-4


def test_padding_behind_a_prompt_changes_nothing(heads, features, condition) -> None:
    semantic = heads(features, condition)[-1]
    longer = replace(condition, text=torch.nn.functional.pad(condition.text, (0, 0, 0, 7)))
    torch.testing.assert_close(heads(features, longer)[-1], semantic)


def test_a_prompt_of_padding_alone_gives_finite_logits(heads, features, condition) -> None:
    empty = replace(condition, text=torch.zeros_like(condition.text))
    assert torch.isfinite(heads(features, empty)[-1]).all()


def test_features_in_bfloat16_are_judged_in_float32(heads, features, condition) -> None:
    assert condition.image is not None
    condition = Condition(condition.text.bfloat16(), condition.image.bfloat16())
    logits = heads([feature.bfloat16() for feature in features], condition)
    assert {head.dtype for head in logits} == {torch.float32}
