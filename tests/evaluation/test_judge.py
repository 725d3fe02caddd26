"""The judge names what clips show, sees how they are spoilt, and loads only whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pose_core.data import moving_digits
from pose_core.errors import CheckpointError
from pose_core.evaluation import judge as judge_module
from pose_core.evaluation.judge import Judge, accuracy, ink_centres, train
from pose_core.evaluation.spoiling import DEGRADATIONS, DISORDERS, degrade, disorder, soften

SHIPPED = Path(__file__).resolve().parents[2] / "pipelines/configs/teachers/digits_judge"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(SHIPPED)


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    """64 held-out clips, ``[64, 17, 3, 16, 32]`` in [0, 1]."""
    rng = np.random.default_rng(11)
    videos = [moving_digits.render(moving_digits.draw_clip(rng, split="test")) for _ in range(64)]
    return torch.from_numpy(np.stack(videos)).movedim(-1, 2) / 255


def test_names_digits_and_motions_of_handwriting_it_has_not_seen(judge: Judge):
    shares = accuracy(judge, seed=5, clips=250)
    assert shares["digit"] >= 0.97
    assert shares["motion"] >= 0.97


def test_names_digits_that_are_blurred_and_noisy(judge: Judge, clips: torch.Tensor):
    clear = judge(clips).digit_logits.mean(dim=2).argmax(dim=-1)
    noise = 0.06 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    spoilt = judge((soften(clips, torch.tensor(1.0)) + noise).clamp(0, 1)).digit_logits.mean(dim=2).argmax(dim=-1)
    assert (spoilt == clear).float().mean() >= 0.9


def test_blur_and_noise_are_estimated_as_such(judge: Judge, clips: torch.Tensor):
    noise = 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    estimates = {
        name: judge(spoilt).degradations.mean(dim=(0, 1, 2))
        for name, spoilt in {
            "none": clips,
            "blur": soften(clips, torch.tensor(4.0)),
            "noise": (clips + noise).clamp(0, 1),
        }.items()
    }
    for name in ("blur", "noise"):
        rise = estimates[name] - estimates["none"]
        assert DEGRADATIONS[int(rise.argmax())] == name
        assert rise.max() > 0.4


def test_spoilt_time_axes_are_told_apart(judge: Judge, clips: torch.Tensor):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    spoilt = {"none": clips, "shuffled": clips[:, order], "frozen": clips[:, :1].expand_as(clips)}
    for name, clip in spoilt.items():
        named = judge(clip).disorder_logits.argmax(dim=-1) == DISORDERS.index(name)
        assert named.float().mean() >= 0.9, name


def test_watch_gives_the_same_verdict_in_any_batch_size(judge: Judge, clips: torch.Tensor):
    videos = (clips[:5] * 255).round().byte().movedim(2, -1).numpy()
    whole, parts = judge.watch(videos), judge.watch(videos, batch_clips=2)
    torch.testing.assert_close(whole.frame_features, parts.frame_features)
    torch.testing.assert_close(whole.clip_features, parts.clip_features)


def test_centres_are_where_each_colour_is():
    clip = torch.zeros(1, 2, 3, 16, 32)
    clip[0, 0, 0, 4:8, 20:24] = 1.0
    clip[0, 0, 1, 10:12, 4:8] = 1.0
    centres, inks = ink_centres(clip)
    torch.testing.assert_close(centres[0, :, 0], torch.tensor([[21.5, 5.5], [5.5, 10.5]]), atol=1e-2, rtol=0)
    torch.testing.assert_close(centres[0, :, 1], torch.tensor([[15.5, 7.5], [15.5, 7.5]]), atol=1e-2, rtol=0)
    torch.testing.assert_close(inks[0, :, 0], 0.85 * torch.tensor([16.0, 8.0]), atol=1e-2, rtol=0)


def test_grey_and_faint_colour_do_not_move_the_centre():
    clip = torch.full((1, 1, 3, 16, 32), 0.5)
    clip[0, 0, 0] += 0.05
    clip[0, 0, 0, 4:8, 20:24] = 1.0
    torch.testing.assert_close(ink_centres(clip)[0][0, 0, 0], torch.tensor([21.5, 5.5]), atol=1e-2, rtol=0)


def test_soften_spreads_a_point_by_half_a_pixel_variance_a_pass_and_keeps_its_light():
    point = torch.zeros(1, 1, 3, 17, 17)
    point[..., 8, 8] = 1.0
    column = soften(point, torch.tensor(3.0))[0, 0, 0].sum(dim=0)
    assert column.sum().item() == pytest.approx(1.0)
    assert (column * (torch.arange(17) - 8).square()).sum().item() == pytest.approx(1.5)


def test_degraded_clips_stay_in_range_and_untouched_ones_stay_as_they_were(clips: torch.Tensor):
    spoilt, strengths = degrade(clips, torch.Generator().manual_seed(1))
    assert spoilt.min() >= 0 and spoilt.max() <= 1
    untouched = strengths.sum(dim=1) == 0
    assert untouched.any() and not untouched.all()
    torch.testing.assert_close(spoilt[untouched], clips[untouched])


def test_swapped_clips_carry_the_digit_of_each_frame(clips: torch.Tensor):
    digits = torch.arange(64)[:, None, None].expand(-1, 2, 17)
    spoilt, labels, kinds = disorder(clips, digits, torch.Generator().manual_seed(2))
    swapped = (kinds == DISORDERS.index("swapped")).nonzero().flatten()
    assert len(swapped) > 0
    for row in swapped.tolist():
        torch.testing.assert_close(spoilt[row], clips[labels[row, 0], torch.arange(17)])
        assert torch.equal(labels[row, 0], labels[row, 1])
        assert labels[row, 0, 0] == row and labels[row, 0, -1] == (row - 1) % 64


def test_training_repeats_from_its_seed_and_sees_training_handwriting_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_module, "WHITENING_CLIPS", 12)
    drawn: list[set[tuple[int, int]]] = []
    render = moving_digits.render

    def spy(clip: moving_digits.DigitClip, *arguments: int) -> np.ndarray:
        drawn.append({(mover.digit, mover.sample) for mover in clip.movers})
        return render(clip, *arguments)

    monkeypatch.setattr(moving_digits, "render", spy)
    first, again, other = (train(steps=2, seed=seed, batch_clips=8).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["digit_head.weight"], other["digit_head.weight"])
    heldout = {
        (digit, int(sample))
        for digit in range(10)
        for split in ("validation", "test")
        for sample in moving_digits.samples_of(digit, split)
    }
    assert len(drawn) == 3 * (2 * 8 + 12)
    assert heldout.isdisjoint(set.union(*drawn))


def test_a_saved_judge_loads_with_the_same_verdict(tmp_path: Path, clips: torch.Tensor):
    made = Judge(width=4, feature_size=8).eval()
    made.save(tmp_path / "judge")
    loaded = Judge.load(tmp_path / "judge")
    torch.testing.assert_close(loaded(clips[:2]).clip_features, made(clips[:2]).clip_features)


@pytest.mark.parametrize("part", ["config.json", "judge.safetensors"])
def test_a_missing_part_is_named_with_the_command_that_makes_it(tmp_path: Path, part: str):
    Judge(width=4, feature_size=8).save(tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {part}: .*train_judge.py") as caught:
        Judge.load(tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_and_broken_files_are_refused_in_one_line(tmp_path: Path):
    Judge(width=4, feature_size=8).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"width": 8, "feature_size": 8}))
    with pytest.raises(CheckpointError, match="does not load") as misfit:
        Judge.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"width": 4, "feature_size": 8}))
    weights = tmp_path / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not load") as cut:
        Judge.load(tmp_path)
    for caught in (misfit, cut):
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_shipped_judge_is_small_and_says_how_it_was_made():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 1.5 * 2**20
    record = json.loads((SHIPPED / "config.json").read_text())["trained"]
    assert record["steps"] > 0 and record["heldout_accuracy"]["digit"] >= 0.97
