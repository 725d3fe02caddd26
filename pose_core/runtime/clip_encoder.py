"""The frozen encoders, in the process that encodes: pixels and prompts to what training reads."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pose_core.settings import ModelSettings, Settings

Columns = dict[str, Any]


class ClipEncoder:
    """A teacher's VAE, text and image encoders on this process's device."""

    def __init__(self, model: ModelSettings, text_tokens: int):
        # Here and not above: processes that only decode, write or read shards start seconds sooner, 400 MB smaller.
        with _no_garbage_collection():
            import torch

            from pose_core.models import families
            from pose_core.runtime.teachers import teacher_folder

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._codec = families.get(model.family).load_codec(teacher_folder(model), text_tokens, device)
        self._with_image = model.task == "i2v"

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


def clip_encoder(settings: Settings) -> Callable[[Columns], Columns]:
    """Load the frozen encoders, in the process that encodes."""
    encoder, most = ClipEncoder(settings.model, settings.data.text_tokens), settings.data.encoder_batch_clips

    def encode(columns: Columns) -> Columns:
        parts = []
        for start in range(0, len(columns["key"]), most):
            part = slice(start, start + most)
            parts.append(encoder(columns["prompt"][part], np.stack(columns["video"][part])))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {"key": columns["key"]} | joined

    return encode


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Importing makes a million objects that stay; looking for garbage among them takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
