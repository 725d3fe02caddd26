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

        from pose_core.models import families
        from pose_core.runtime.teachers import teacher_folder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._with_image = model.task == "i2v"
        self._codec = families.get(model.family).load_codec(teacher_folder(model), text_tokens, device)

    def __call__(self, prompts: Sequence[str], video: np.ndarray) -> dict[str, np.ndarray]:
        """Clips ``[B, F, H, W, 3]`` uint8 and their prompts to the columns that training reads, float32."""
        first_frames = video[:, 0] if self._with_image else None
        condition = self._codec.encode_condition(list(prompts), first_frames, video.shape[1])
        encoded = {"latents": self._codec.encode_video(video), "text": condition.text}
        given = {"image": condition.image, "first_frame": condition.first_frame}
        encoded |= {name: value for name, value in given.items() if value is not None}
        return {name: value.float().cpu().numpy() for name, value in encoded.items()}

    def null_text(self) -> np.ndarray:
        """Embeddings of the empty prompt, ``[1, L, D]``."""
        return self._codec.encode_text([""]).float().cpu().numpy()
