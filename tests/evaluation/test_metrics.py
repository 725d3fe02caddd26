"""The figures put clips in the order a person would, and their parts have the values worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pose_core.data import moving_digits
from pose_core.data.moving_digits import DigitClip, Mover
from pose_core.errors import DataError
from pose_core.evaluation.judge import MOTIONS, Judge, ink_centres
from pose_core.evaluation.metrics import frechet_distance, parse_prompts, psnr, score, track_residuals
from pose_core.evaluation.spoiling import soften

SHIPPED = Path(__file__).resolve().parents[2] / "pipelines/configs/teachers/digits_judge"
CLIPS = 96


FRAMES, HEIGHT, WIDTH = moving_digits.FRAMES, moving_digits.HEIGHT, moving_digits.WIDTH


def draw(seed: int, count: int = CLIPS, level: str = "two") -> list[DigitClip]:
    rng = np.random.default_rng(seed)
    return [moving_digits.draw_clip(rng, split="test", level=level) for _ in range(count)]


def changed(clips: list[DigitClip], change: Callable[[Mover], dict[str, Any]]) -> list[DigitClip]:
    """The clips with some fields of both digits changed."""
    return [DigitClip(*(dataclasses.replace(mover, **change(mover)) for mover in clip.movers)) for clip in clips]


def render(clips: list[DigitClip]) -> np.ndarray:
    return np.stack([moving_digits.render(clip) for clip in clips])


def blurred(videos: np.ndarray, passes: float) -> np.ndarray:
    clips = soften(torch.from_numpy(videos).movedim(-1, 2) / 255, torch.tensor(passes))
    return (clips * 255).round().byte().movedim(2, -1).numpy()


class Scorer:
    """Scores variants of 96 held-out clips against 96 others."""

    def __init__(self) -> None:
        self.judge = Judge.load(SHIPPED)
        self.clips = draw(21)
        self.videos, self.reference = render(self.clips), render(draw(22))
        self.prompts = [clip.prompt for clip in self.clips]
        self.real = self(self.videos)

    def __call__(self, videos: np.ndarray, prompts: list[str] | None = None) -> dict[str, float]:
        return score(self.judge, videos, prompts or self.prompts, self.videos[:, 0], self.reference)

    def smeared(self) -> np.ndarray:
        """What a single step that knows all but the speeds can do best: the mean over them."""
        rng = np.random.default_rng(0)
        faster = (changed(self.clips, lambda m: {"speed": rng.uniform(*moving_digits.PACES[m.pace])}) for _ in range(6))
        return np.mean([render(clips) for clips in faster], axis=0).astype(np.uint8)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


def test_real_clips_score_high_in_everything(scorer: Scorer):
    assert scorer.real["SA"] >= 97
    assert scorer.real["TC"] >= 90
    assert scorer.real["FQ"] >= 90
    assert scorer.real["mean"] == pytest.approx((scorer.real["SA"] + scorer.real["TC"] + scorer.real["FQ"]) / 3)
    assert scorer.real["motion"] == pytest.approx(1.0, abs=0.2)
    assert scorer.real["first_frame_psnr"] == 60.0


def test_the_reference_itself_has_perfect_distributions(scorer: Scorer):
    prompts = [clip.prompt for clip in draw(22)]
    own = score(scorer.judge, scorer.reference, prompts, scorer.reference[:, 0], scorer.reference)
    assert own["FQ"] == pytest.approx(100.0, abs=1e-6)
    assert own["motion"] == pytest.approx(1.0)


def test_the_stronger_the_blur_the_lower_the_frame_quality(scorer: Scorer):
    qualities = [scorer.real["FQ"], *(scorer(blurred(scorer.videos, passes))["FQ"] for passes in (1.0, 2.0, 4.0))]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[-1] < 0.5 * qualities[0]


def test_noise_and_a_tint_lower_the_frame_quality(scorer: Scorer):
    rng = np.random.default_rng(0)
    noisy = np.clip(scorer.videos + rng.normal(0, 20, scorer.videos.shape), 0, 255).astype(np.uint8)
    tinted = (scorer.videos * np.array([1.0, 1.0, 0.6])).astype(np.uint8)
    assert scorer(noisy)["FQ"] < scorer.real["FQ"] - 20
    assert scorer(tinted)["FQ"] < scorer.real["FQ"] - 3


def test_shuffled_frames_lower_coherence_but_not_frame_quality(scorer: Scorer):
    rng = np.random.default_rng(0)
    shuffled = scorer(np.stack([video[rng.permutation(len(video))] for video in scorer.videos]))
    assert shuffled["TC"] < 0.6 * scorer.real["TC"]
    assert shuffled["FQ"] == pytest.approx(scorer.real["FQ"], abs=1e-3)


def test_one_swapped_pair_of_frames_is_noticed(scorer: Scorer):
    order = list(range(FRAMES))
    order[8], order[7] = 7, 8
    assert scorer(scorer.videos[:, order])["TC"] < scorer.real["TC"] - 5


def test_the_mean_over_all_speeds_is_much_worse_than_any_speed(scorer: Scorer):
    smeared = scorer(scorer.smeared())
    assert smeared["mean"] < 0.7 * scorer.real["mean"]
    assert max(smeared["TC"], smeared["FQ"]) < 0.6 * min(scorer.real["TC"], scorer.real["FQ"])


def test_frozen_clips_lose_motion_and_coherence(scorer: Scorer):
    frozen = scorer(np.repeat(scorer.videos[:, :1], FRAMES, axis=1))
    assert frozen["motion"] == pytest.approx(0.0, abs=1e-3)
    assert frozen["TC"] < 0.6 * scorer.real["TC"]
    assert frozen["first_frame_psnr"] == 60.0


def test_clips_at_half_speed_have_half_the_motion(scorer: Scorer):
    slow = scorer(render(changed(scorer.clips, lambda mover: {"speed": mover.speed / 2})))
    assert slow["motion"] == pytest.approx(scorer.real["motion"] / 2, abs=0.1)
    assert slow["TC"] < scorer.real["TC"] - 10


def test_wrong_prompts_lower_alignment_only(scorer: Scorer):
    wrong = scorer(scorer.videos, scorer.prompts[1:] + scorer.prompts[:1])
    assert wrong["SA"] < 0.6 * scorer.real["SA"]
    assert wrong["TC"] == scorer.real["TC"]
    assert wrong["FQ"] == scorer.real["FQ"]


def test_each_agreement_counts_a_third(scorer: Scorer):
    opposite = {"left": "right", "right": "left"}
    turned = [clip.prompt for clip in changed(scorer.clips, lambda mover: {"direction": opposite[mover.direction]})]
    renamed = [clip.prompt for clip in changed(scorer.clips, lambda mover: {"digit": (mover.digit + 1) % 10})]
    assert scorer(scorer.videos, turned)["SA"] == pytest.approx(scorer.real["SA"] - 100 / 3, abs=2)
    assert scorer(scorer.videos, renamed)["SA"] == pytest.approx(scorer.real["SA"] - 100 / 3, abs=2)


def test_another_subject_than_in_the_first_frame_lowers_alignment_though_the_digit_is_right(scorer: Scorer):
    def another(mover: Mover) -> dict[str, Any]:
        return {"sample": int(np.roll(moving_digits.samples_of(mover.digit, "test"), 7)[0])}

    replaced = scorer(render(changed(scorer.clips, another)))
    assert replaced["SA"] < scorer.real["SA"] - 10
    assert replaced["TC"] > scorer.real["TC"] - 5
    assert replaced["first_frame_psnr"] < 30


def test_a_digit_that_turns_into_another_loses_alignment_and_coherence(scorer: Scorer):
    share = np.linspace(0, 1, FRAMES)[None, :, None, None, None]
    morphed = (1 - share) * scorer.videos + share * np.roll(scorer.videos, 1, axis=0)
    figures = scorer(morphed.astype(np.uint8))
    assert figures["SA"] < 0.7 * scorer.real["SA"]
    assert figures["TC"] < 0.5 * scorer.real["TC"]


@pytest.mark.parametrize("value", [0, 60, 255])
def test_blank_clips_score_next_to_nothing(scorer: Scorer, value: int):
    blank = scorer(np.full_like(scorer.videos, value))
    assert all(math.isfinite(figure) for figure in blank.values())
    assert blank["mean"] < 15
    assert blank["motion"] == pytest.approx(0.0, abs=1e-3)


def test_figures_of_few_clips_are_finite_and_repeat(scorer: Scorer):
    few = scorer.videos[:2]
    once, again = (score(scorer.judge, few, scorer.prompts[:2], few[:, 0], scorer.reference) for _ in range(2))
    assert once == again
    assert all(math.isfinite(figure) for figure in once.values())


def gaussian(mean: list[float], covariance: np.ndarray, count: int = 400) -> torch.Tensor:
    """Samples ``[count, D]`` whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(0).standard_normal((count, len(mean)))
    raw -= raw.mean(axis=0)
    raw = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return torch.from_numpy(raw @ np.linalg.cholesky(covariance).T + np.array(mean))


def test_frechet_distance_of_axis_aligned_gaussians():
    first, second = gaussian([0, 0], np.diag([1.0, 4.0])), gaussian([3, 4], np.diag([9.0, 1.0]))
    assert frechet_distance(first, second) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)


def test_frechet_distance_of_gaussians_whose_axes_differ():
    covariance_1, covariance_2 = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    # For 2 x 2 matrices tr(sqrt(M)) = sqrt(tr(M) + 2 sqrt(det(M))).
    product = covariance_1 @ covariance_2
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
    first, second = gaussian([0, 0], covariance_1), gaussian([0, 1], covariance_2)
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)


def test_frechet_distance_survives_singular_covariances():
    line = gaussian([0, 0], np.eye(2)) * torch.tensor([1.0, 0.0])
    assert frechet_distance(line, line) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(line, line + torch.tensor([0.0, 2.0])) == pytest.approx(4.0)


def test_shrinkage_brings_small_samples_of_one_gaussian_closer():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 96, 32, generator=generator)
    assert frechet_distance(first, second, samples=96) < 0.7 * frechet_distance(first, second)


def test_shrinkage_keeps_equal_gaussians_equal():
    features = gaussian([1, 2], np.array([[2.0, 0.8], [0.8, 1.0]]))
    assert frechet_distance(features, features.flip(0), samples=10) == pytest.approx(0.0, abs=1e-9)


def test_tracks_that_the_domain_draws_leave_no_residual():
    videos = render(draw(23, level="one"))
    centres = ink_centres(torch.from_numpy(videos).movedim(-1, 2) / 255)[0][:, 0].double().numpy()
    assert track_residuals(centres, np.ones(centres.shape[:2], bool), HEIGHT, WIDTH).max() < 0.35


def test_a_bouncing_track_fits_and_its_jitter_is_the_residual():
    path = np.array([12.0, 14, 16, 18, 20, 22, 24, 26, 24, 22, 20, 18, 16])
    straight = np.stack([path, np.full(13, 8.0)], axis=-1)[None]
    jitter = np.zeros_like(straight)
    jitter[..., 1] = 2 * (-1.0) ** np.arange(13)
    everywhere, away = np.ones((1, 13), bool), np.arange(13)[None] < 0
    assert track_residuals(straight, everywhere, HEIGHT, WIDTH)[0] < 0.1
    assert track_residuals(straight + jitter, everywhere, HEIGHT, WIDTH)[0] == pytest.approx(2.0, abs=0.2)
    spoilt = straight.copy()
    spoilt[0, 5] = 0
    assert track_residuals(spoilt, np.arange(13)[None] != 5, HEIGHT, WIDTH)[0] < 0.1
    assert track_residuals(spoilt, away, HEIGHT, WIDTH)[0] == 0


def test_a_digit_that_stands_still_is_on_no_path():
    still = np.full((1, FRAMES, 2), 15.5)
    assert track_residuals(still, np.ones((1, FRAMES), bool), HEIGHT, WIDTH)[0] > 1.5


def test_psnr_of_a_uniform_error_and_of_exact_frames():
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    off_by_ten = black + np.array([10, 0], dtype=np.uint8)[:, None, None, None]
    np.testing.assert_allclose(psnr(off_by_ten, black), [20 * math.log10(255 / 10), 60.0])
    np.testing.assert_allclose(psnr(black, off_by_ten), psnr(off_by_ten, black))


def test_every_prompt_of_the_domain_is_understood():
    clips = draw(0, 200) + draw(1, 20, level="one")
    wanted = parse_prompts([clip.prompt for clip in clips])
    assert wanted.there.sum(dim=1).tolist() == [len(clip.movers) for clip in clips]
    for row, clip in enumerate(clips):
        for role, mover in enumerate(clip.movers):
            assert wanted.digits[row, role] == mover.digit
            assert wanted.told[row, role] == mover.told
            assert not mover.told or MOTIONS[int(wanted.motions[row, role])] == (mover.direction, mover.pace)


def test_a_motion_that_no_prompt_tells_is_not_scored(scorer: Scorer):
    untold = [clip.prompt for clip in changed(scorer.clips, lambda mover: {"told": False})]
    turned = scorer(scorer.videos[:, ::-1].copy(), untold)  # every digit moves the other way
    assert turned["SA"] == pytest.approx(scorer(scorer.videos, untold)["SA"], abs=3)
    assert turned["SA"] > scorer(scorer.videos[:, ::-1].copy())["SA"] + 10


def test_clips_of_one_digit_are_scored_by_that_digit_alone(scorer: Scorer):
    clips = draw(31, level="one")
    videos, reference = render(clips), render(draw(32, level="one"))
    figures = score(scorer.judge, videos, [clip.prompt for clip in clips], videos[:, 0], reference)
    assert min(figures["SA"], figures["TC"], figures["FQ"]) >= 85


def test_without_first_frames_no_subject_is_asked_for(scorer: Scorer):
    figures = score(scorer.judge, np.roll(scorer.videos, 1, axis=0), scorer.prompts, None, scorer.reference)
    assert "first_frame_psnr" not in figures
    right = score(scorer.judge, scorer.videos, scorer.prompts, None, scorer.reference)
    assert figures["SA"] < 0.5 * right["SA"] and right["SA"] > 97


@pytest.mark.parametrize(
    "prompt", ["a dog runs", "a red seven moving", "a seven moving left fast", "a green two moving left fast", ""]
)
def test_other_prompts_are_refused_with_the_way_out(prompt: str):
    with pytest.raises(DataError, match=r"evaluation\.judge=''") as caught:
        parse_prompts([prompt])
    assert repr(prompt) in str(caught.value) and caught.value.exit_code == 2


def test_arrays_that_do_not_go_together_are_named(scorer: Scorer):
    videos, prompts = scorer.videos[:4], scorer.prompts[:4]
    first, reference = videos[:, 0], scorer.reference[:4]
    for wrong, message in (
        ((videos, prompts[:3], first, reference), "3 prompts, 4 videos"),
        ((videos[:1], prompts[:1], first[:1], reference), "1 videos"),
        ((videos, prompts, first, reference[:, :5]), r"reference \(4, 5, 16, 32, 3\)"),
        ((videos / 255, prompts, first, reference), "videos must be uint8.*float64"),
        ((videos, prompts, videos, reference), "first_frames must be uint8 with 4 axes"),
    ):
        with pytest.raises(DataError, match=message):
            score(scorer.judge, *wrong)
