"""Shared by all tests: one thread a process, so that results repeat, and a tiny random image-to-video folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# A shell that starts the tests in the background leaves Ctrl-C ignored, for them and for every child of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is first imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Helpers that spawned ranks, or tests in other folders, must be able to import by name.
HELPERS = ("training", "models", "data", "runtime", "end_to_end")
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in HELPERS]

PROMPTS = ["a seven moving up and left", "an eight moving down"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=0, help="kills of each kind in each phase (test_recovery.py); 0: one of each kind"
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of stock classes as small as they go: one head, two layers, clips of 9 x 32 x 32.

    Like the published folders it has latents with a mean and a spread of their own and a multistep scheduler.
    """
    import torch
    from diffusers import UniPCMultistepScheduler

    from pose_core.models import small

    channels, text_width = 8, 32
    pipeline = small.build_pipeline(PROMPTS, seed=0, channels=channels, text_width=text_width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.transformer = small.build_transformer(heads=1, layers=2, channels=channels, text_width=text_width)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline.vae.register_to_config(
        latents_mean=[0.1 * channel - 0.3 for channel in range(channels)],
        latents_std=[0.5 + 0.1 * channel for channel in range(channels)],
    )
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    pipeline.save_pretrained(folder)
    return folder
