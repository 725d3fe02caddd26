"""Making the embedded domain's weights: a training that was stopped goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pose_core.models.small import build_vae
from pose_core.training import pretraining


class Stopped(Exception):
    """What a training meets in the middle."""


@pytest.mark.parametrize("loss", [pretraining.vae_loss, pretraining.decoder_loss])
def test_a_vae_s_training_goes_on_where_it_stopped(loss: Callable[..., Tensor], tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 3 * 5 * 16 * 16).view(1, 3, 5, 16, 16)

    def trained(checkpoint: Path, stop_after: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        vae = build_vae()
        torch.manual_seed(len(list(tmp_path.iterdir())))  # another process knows nothing of this one's random state

        def stop(done: int, value: float) -> None:
            if done == stop_after + 1:
                raise Stopped

        pretraining.fit(
            vae, lambda generator: loss(vae, pixels, generator), steps=3, learning_rate=1e-3, ema_decay=0.5, seed=0,
            checkpoint=checkpoint, progress=stop if stop_after else lambda done, value: None, checkpoint_every=1,
        )  # fmt: skip
        return vae.state_dict()

    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped.pt", stop_after=1)
    resumed = trained(tmp_path / "stopped.pt")
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_decoder_learns_from_latents_that_are_moved_by_a_share_of_their_spread() -> None:
    torch.manual_seed(0)
    vae, pixels = build_vae(), torch.linspace(-1, 1, 3 * 5 * 16 * 16).view(1, 3, 5, 16, 16)

    def loss(noise: float, spread: float) -> float:
        vae.register_to_config(latents_std=[spread] * vae.config.z_dim)
        return pretraining.decoder_loss(vae, pixels, torch.Generator().manual_seed(0), noise).item()

    exact = loss(0.0, 1.0)
    assert loss(0.0, 2.0) == exact != loss(1.0, 1.0)
    assert loss(1.0, 0.5) == pytest.approx(loss(0.5, 1.0))
