"""How the embedded domain's own weights are made: a video VAE and a flow-matching teacher, on one machine.

Both trainings checkpoint into a folder and go on from there; for a given seed and number of threads they repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pose_core.method.flow import flow_matching, shift_time
from pose_core.models.small import AutoencoderKLWan, decode_unclamped
from pose_core.models.video_model import Condition, VideoModel

Progress = Callable[[int, float], None]
"""Called after each step with the number of finished steps and the loss."""


def fit(
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema_decay: float,
    seed: int,
    checkpoint: Path,
    progress: Progress,
    matrices: Sequence[nn.Module] = (),
    checkpoint_every: int = 250,
) -> None:
    """Minimise ``loss`` with Muon and AdamW (warm-up, cosine decay) and leave the averaged weights in ``module``.

    Muon moves the matrices inside ``matrices``, AdamW the rest. ``loss`` draws everything random from the generator it
    is given, which is part of the checkpoint.
    """
    hidden = {id(p) for inner in matrices for p in inner.parameters() if p.ndim == 2}
    chosen = [p for p in module.parameters() if id(p) in hidden]
    others = [p for p in module.parameters() if id(p) not in hidden]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    ]
    if chosen:
        muon = torch.optim.Muon(chosen, lr=2 * learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    average = {name: value.detach().clone() for name, value in module.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    done = _restore(checkpoint, module, optimizers, average, generator)
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    module.train()
    for step in range(done, steps):
        value = loss(generator)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * _warmup_cosine(step, steps)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        _follow(average, module, min(ema_decay, (1 + step) / (10 + step)))
        progress(step + 1, value.item())
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _save(checkpoint, step + 1, module, optimizers, average, generator)
    module.load_state_dict(average)
    module.eval()


def vae_loss(vae: AutoencoderKLWan, pixels: Tensor, generator: torch.Generator, kl_weight: float = 1.5e-7) -> Tensor:
    """Reconstruction (squared and absolute) and a light pull of the latents towards a standard Gaussian.

    ``pixels [B, 3, F, H, W]`` in [-1, 1]. ``kl_weight`` is for the divergence summed over a clip's latents.
    """
    posterior = vae.encode(pixels).latent_dist
    return _reconstruction(vae, posterior.sample(generator), pixels) + kl_weight * posterior.kl().mean()


def decoder_loss(vae: AutoencoderKLWan, pixels: Tensor, generator: torch.Generator, noise: float = 0.0) -> Tensor:
    """The part of ``vae_loss`` that the decoder has a say in; the encoder is a constant in it.

    Latents are moved by up to ``noise`` of their spread, each clip's by a share of its own: those that a transformer
    makes are not exact, and a decoder that has only seen exact ones shows every error.
    """
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(generator)
    share = torch.rand(len(latents), 1, 1, 1, 1, generator=generator).to(latents.device)
    spread = latents.new_tensor(vae.config.latents_std)[:, None, None, None]
    moved = torch.randn(latents.shape, generator=generator).to(latents.device) * spread
    return _reconstruction(vae, latents + noise * share * moved, pixels)


def _reconstruction(vae: AutoencoderKLWan, latents: Tensor, pixels: Tensor) -> Tensor:
    difference = decode_unclamped(vae, latents) - pixels
    return difference.square().mean() + 0.1 * difference.abs().mean()


def teacher_loss(
    model: VideoModel,
    x_0: Tensor,
    condition: Condition,
    null_text: Tensor,
    generator: torch.Generator,
    timestep_shift: float = 1.0,
) -> Tensor:
    """Flow matching at uniform times, shifted; every tenth prompt is replaced by the empty one for guidance."""
    dropped = torch.rand(len(x_0), generator=generator).to(x_0.device) < 0.1
    text = torch.where(dropped[:, None, None], null_text, condition.text)
    condition = condition.with_text(text)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    # Evenly spread over the batch: the loss depends so much on the time that independent times would be mostly noise.
    t = (torch.rand((), generator=generator) + torch.arange(len(x_0)) / len(x_0)) % 1
    t = shift_time(t, timestep_shift)[torch.randperm(len(t), generator=generator)].to(x_0.device)
    return flow_matching(lambda x_t, time: model.velocity(x_t, time, condition), x_0, eps, t)


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, min(100, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _follow(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def _save(path: Path, step: int, module, optimizers, average, generator) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average,
        "generator": generator.get_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _restore(path: Path, module, optimizers, average, generator) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(state["generator"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return state["step"]
