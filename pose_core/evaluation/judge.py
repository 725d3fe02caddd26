"""The judge: a small video classifier of the moving digits domain, behind the figures of ``metrics.py``.

It looks at a clip once for each digit in it, at the red one with red as its first channel and at the green one with
green: two *roles*, one network. It names digit, direction and pace and gives the features whose Fréchet distances
measure frame and motion quality. It learns on degraded and disordered clips too, and to tell how: what a head must read
off the features, the distances can see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pose_core.data import moving_digits
from pose_core.errors import CheckpointError
from pose_core.evaluation.spoiling import DEGRADATIONS, DISORDERS, degrade, disorder

WEIGHTS_FILE = "judge.safetensors"
CONFIG_FILE = "config.json"
MOTIONS = tuple((direction, pace) for direction in moving_digits.DIRECTIONS for pace in moving_digits.PACES)
ROLE_CHANNELS = ((0, 1, 2), (1, 0, 2))
"""Colour channels in the order in which each role sees them: its own, the other's, the rest."""
WHITENING_CLIPS = 600
ONE_DIGIT_EVERY = 6
"""Every so many-th clip the judge learns from shows one digit."""

INK_FLOOR = 0.15
"""Share of a frame's strongest ink that counts as background; keeps noise from pulling the centre inwards."""
WHITENING_RIDGE = 0.1
"""Added to the variance of each principal feature before it is made one. Degradations barely vary between clean clips,
so without whitening the choice of digits drowns them in a Fréchet distance; a smaller ridge lets faint noise rule."""


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in ``N`` clips of ``T`` frames, for each of the ``R = 2`` roles, the digit in front first.

    Features are whitened over clean training clips. What is said of a digit that is not there means nothing.
    """

    digit_logits: Tensor
    """``[N, R, T, 10]``, one guess a frame."""
    motion_logits: Tensor
    """``[N, R, 4]``, in the order of ``MOTIONS``."""
    frame_features: Tensor
    """``[N, R, T, D]``: what a frame shows and how cleanly."""
    clip_features: Tensor
    """``[N, R, D]``: how the clip moves and holds together."""
    degradations: Tensor
    """``[N, R, T, 5]``, estimated strengths in about [0, 1], in the order of ``DEGRADATIONS``."""
    disorder_logits: Tensor
    """``[N, R, 5]``, in the order of ``DISORDERS``."""
    centres: Tensor
    """``[N, R, T, 2]``: the digit's centre as (x, y) in pixels."""
    inks: Tensor
    """``[N, R, T]``: how much of the digit's colour is seen, in full pixels."""


class Judge(nn.Module):
    """Frame encoder with a digit head, and a temporal part over its features and the digit's track."""

    def __init__(self, width: int = 24, feature_size: int = 32):
        super().__init__()
        self.settings = {"width": width, "feature_size": feature_size}
        self.encoder = nn.Sequential(
            *_block(nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width)),
            *_block(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width)),
            *_block(nn.Conv2d(2 * width, 3 * width, 3, padding=1, bias=False), nn.BatchNorm2d(3 * width)),
            *_block(nn.Conv2d(3 * width, 4 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.frame_projection = _projection(4 * width, feature_size)
        self.digit_head = nn.Linear(feature_size, len(moving_digits.DIGIT_NAMES))
        self.degradation_head = nn.Linear(feature_size, len(DEGRADATIONS))
        self.temporal = nn.Sequential(
            *_block(nn.Conv1d(feature_size + 4, 3 * width, 3, padding=1, bias=False), nn.BatchNorm1d(3 * width)),
            *_block(nn.Conv1d(3 * width, 3 * width, 3, padding=1, bias=False), nn.BatchNorm1d(3 * width)),
        )
        self.clip_projection = _projection(3 * width, feature_size)
        self.motion_head = nn.Linear(feature_size, len(MOTIONS))
        self.disorder_head = nn.Linear(feature_size, len(DISORDERS))
        self.frame_whitening = nn.Buffer(torch.eye(feature_size))
        self.clip_whitening = nn.Buffer(torch.eye(feature_size))

    def forward(self, clips: Tensor) -> Verdict:
        """Judge ``clips [N, T, 3, H, W]`` in [0, 1]."""
        count, frames, _, height, width = clips.shape
        roles = len(ROLE_CHANNELS)
        seen = torch.stack([clips[:, :, list(channels)] for channels in ROLE_CHANNELS], dim=1)
        pooled = self.encoder(seen.flatten(0, 2)).mean(dim=(2, 3))
        frame_features = self.frame_projection(pooled).view(count, roles, frames, -1)
        centres, inks = ink_centres(clips)
        place = centres / clips.new_tensor([width, height]) * 2 - 1
        time = torch.linspace(-1, 1, frames, device=clips.device).expand(count, roles, frames)[..., None]
        share = inks / inks.amax(dim=-1, keepdim=True).clamp(min=1e-6)
        track = torch.cat([frame_features, 2 * place, time, share[..., None]], dim=-1).flatten(0, 1).transpose(1, 2)
        clip_features = self.clip_projection(self.temporal(track).mean(dim=2)).view(count, roles, -1)
        return Verdict(
            digit_logits=self.digit_head(frame_features),
            motion_logits=self.motion_head(clip_features),
            frame_features=frame_features @ self.frame_whitening,
            clip_features=clip_features @ self.clip_whitening,
            degradations=self.degradation_head(frame_features),
            disorder_logits=self.disorder_head(clip_features),
            centres=centres,
            inks=inks,
        )

    @torch.no_grad()
    def watch(self, videos: np.ndarray, batch_clips: int = 32) -> Verdict:
        """Judge ``videos [N, T, H, W, 3]`` uint8 in batches, without gradients; results are on the CPU."""
        device = next(self.parameters()).device
        parts = [
            self(torch.from_numpy(videos[start : start + batch_clips]).to(device).movedim(-1, 2) / 255)
            for start in range(0, len(videos), batch_clips)
        ]
        return Verdict(*(torch.cat([getattr(p, name).cpu() for p in parts]) for name in Verdict.__dataclass_fields__))

    def save(self, folder: Path, record: dict[str, object] | None = None) -> None:
        """Write weights and config into ``folder``; ``record`` says how they were made."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS_FILE)
        config = {**self.settings, "trained": record or {}}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Load a judge that ``save`` wrote, ready to judge.

        Raises:
            CheckpointError: when a part is missing, unreadable or does not fit.
        """
        remedy = "make one with 'python pipelines/train_judge.py' or set evaluation.judge"
        for part in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / part).is_file():
                raise CheckpointError(f"the judge in {folder} has no {part}: {remedy}", in_call=True)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            judge = cls(width=config["width"], feature_size=config["feature_size"])
            judge.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the judge in {folder} does not load ({reason}): {remedy}", in_call=True) from None
        return judge.eval()


def ink_of_roles(clips: Tensor) -> Tensor:
    """How much more of each role's colour than of the other's a pixel has: ``[N, R, T, H, W]`` in [0, 1].

    ``clips [N, T, 3, H, W]`` in [0, 1]. Where the digit in front covers the one behind, only the front has ink.
    """
    return torch.stack([(clips[:, :, own] - clips[:, :, other]) for own, other, _ in ROLE_CHANNELS], dim=1).clamp(min=0)


def ink_centres(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass of each role's ink, ``[N, R, T, 2]`` as (x, y) in pixels, and its sum, ``[N, R, T]``.

    ``clips [N, T, 3, H, W]`` in [0, 1]; without any ink the centre is the middle of the frame.
    """
    ink = ink_of_roles(clips)
    height, width = ink.shape[-2:]
    ink = (ink - INK_FLOOR * ink.amax(dim=(-2, -1), keepdim=True)).clamp(min=0) + 1e-6
    mass = ink.sum(dim=(-2, -1))
    x = (ink.sum(dim=-2) * torch.arange(width, device=ink.device)).sum(dim=-1) / mass
    y = (ink.sum(dim=-1) * torch.arange(height, device=ink.device)).sum(dim=-1) / mass
    return torch.stack([x, y], dim=-1), mass


def train(
    *,
    steps: int,
    seed: int,
    batch_clips: int = 32,
    frames: int = moving_digits.FRAMES,
    learning_rate: float = 3e-3,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Judge:
    """Train a judge on fresh clips of the training handwriting; the same seed and threads give the same judge.

    ``progress`` is called after each step with the number of finished steps and the loss.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        loss = _loss(judge, rng, generator, batch_clips, frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    judge.eval()
    clean = judge.watch(_draw(rng, WHITENING_CLIPS, frames)[1])
    judge.frame_whitening.copy_(_whitening(clean.frame_features.flatten(0, 2)))
    judge.clip_whitening.copy_(_whitening(clean.clip_features.flatten(0, 1)))
    return judge


def accuracy(judge: Judge, *, seed: int, clips: int = 500, frames: int = moving_digits.FRAMES) -> dict[str, float]:
    """Share of digits in held-out clips, in [0, 1], whose ``digit`` and whose ``motion`` the judge names."""
    drawn, videos = _draw(np.random.default_rng(seed), clips, frames, split="validation")
    verdict = judge.watch(videos)
    digits, motions, there = _labels(drawn)
    right = {
        "digit": verdict.digit_logits.mean(dim=2).argmax(dim=-1) == digits,
        "motion": verdict.motion_logits.argmax(dim=-1) == motions,
    }
    return {name: guesses[there].float().mean().item() for name, guesses in right.items()}


def _draw(
    rng: np.random.Generator, count: int, frames: int, *, split: str = "train", one_digit_every: int = 0
) -> tuple[list[moving_digits.DigitClip], np.ndarray]:
    one = [one_digit_every > 0 and index % one_digit_every == 0 for index in range(count)]
    drawn = [moving_digits.draw_clip(rng, level="one" if each else "two", split=split) for each in one]
    return drawn, np.stack([moving_digits.render(clip, frames) for clip in drawn])


def _labels(drawn: list[moving_digits.DigitClip]) -> tuple[Tensor, Tensor, Tensor]:
    """Digit and index into ``MOTIONS`` of each role, ``[N, R]``, and whether the role is there."""
    movers = [(clip.front, clip.behind or clip.front) for clip in drawn]
    digits = torch.tensor([[mover.digit for mover in pair] for pair in movers])
    motions = torch.tensor([[MOTIONS.index((mover.direction, mover.pace)) for mover in pair] for pair in movers])
    return digits, motions, torch.tensor([[True, clip.behind is not None] for clip in drawn])


def _whitening(features: Tensor) -> Tensor:
    variances, axes = torch.linalg.eigh(torch.cov(features.double().T))
    return (axes * (variances + WHITENING_RIDGE).rsqrt() @ axes.T).float()


def _loss(judge: Judge, rng: np.random.Generator, generator: torch.Generator, count: int, frames: int) -> Tensor:
    drawn, videos = _draw(rng, count, frames, one_digit_every=ONE_DIGIT_EVERY)
    digits, motions, there = _labels(drawn)
    labels = torch.where(there, digits, -1)[..., None].expand(-1, -1, frames)
    clips, labels, disorders = disorder(torch.from_numpy(videos).movedim(-1, 2) / 255, labels, generator)
    clips, strengths = degrade(clips, generator)
    verdict = judge(clips)
    # A shuffled, frozen or swapped clip has no motion to name.
    ordered = there & (disorders == 0)[:, None]
    roles = there.shape[1]
    motions = torch.where(ordered, motions, -1)
    return (
        F.cross_entropy(verdict.digit_logits.flatten(0, 2), labels.flatten(), ignore_index=-1, label_smoothing=0.02)
        + F.cross_entropy(
            verdict.motion_logits.flatten(0, 1), torch.where(ordered, motions, -1).flatten(), ignore_index=-1
        )
        + 0.5 * F.cross_entropy(verdict.disorder_logits[there], disorders[:, None].expand(-1, roles)[there])
        + 2 * F.mse_loss(verdict.degradations[there], _each_frame(strengths, roles, frames)[there])
    )


def _each_frame(strengths: Tensor, roles: int, frames: int) -> Tensor:
    return strengths[:, None, None].expand(-1, roles, frames, -1)


def _block(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Module, ...]:
    return convolution, norm, nn.ReLU()


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    # Normalised without learnt scales, so that every feature weighs alike in a Fréchet distance.
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, affine=False))
