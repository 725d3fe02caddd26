"""The frozen encoders, in the process that encodes: pixels and prompts to what training reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pose_core.settings import ModelSettings


class ClipEncoder:
    """A teacher's VAE, text and image encoders on this process's device."""

    def __init__(self, model: ModelSettings, text_tokens: int):
        # Here and not above: processes that only decode, write or read shards start seconds sooner, 400 MB smaller.
        import torch

        from pose_core.models.codec import WanCodec
        from pose_core.models.folders import local_teacher

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._codec = WanCodec.load(local_teacher(model.teacher, model.revision), text_tokens, device)

    def __call__(self, prompts: Sequence[str], video: np.ndarray) -> dict[str, np.ndarray]:
        """Clips ``[B, F, H, W, 3]`` uint8 and their prompts to the columns that training reads, float32."""
        condition = self._codec.encode_condition(list(prompts), video[:, 0], video.shape[1])
        encoded = {"latents": self._codec.encode_video(video), "text": condition.text}
        if condition.image is not None and condition.first_frame is not None:
            encoded |= {"image": condition.image, "first_frame": condition.first_frame}
        return {name: value.float().cpu().numpy() for name, value in encoded.items()}

    def null_text(self) -> np.ndarray:
        """Embeddings of the empty prompt, ``[1, L, D]``."""
        return self._codec.encode_text([""]).float().cpu().numpy()
