"""What a rehearsal trains in place of a run: the same way of working, everything as small as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pose_core.data.moving_digits import MOVING_DIGITS
from pose_core.models.small_folders import Size
from pose_core.runtime.session import EMBEDDED
from pose_core.settings import CurationSettings, Settings, TrainingSettings

MOST = 2
"""Ranks along each dimension of the mesh that has several, parts of a batch, clips of a part: at most eight ranks."""
FRAMES, HEIGHT, WIDTH, TEXT_TOKENS = 9, 32, 64, 8
FIRST_STEPS, OTHER_STEPS, CHECKPOINT_EVERY = 20, 4, 2
"""Steps of the first phase, in which a worker is killed, and of the other; those between two checkpoints."""
CLIPS, HELDOUT_CLIPS = 32, 4
RANK, HEAD_WIDTH = 4, 16
MESH = ("replicas", "shards", "context workers")


def mesh(training: TrainingSettings) -> tuple[int, int, int]:
    """Replicas, shards of the weights beside the context, and workers of a context."""
    context = training.context_workers
    return training.replicas, training.workers // (training.replicas * context), context


def size_of(settings: Settings) -> Size:
    """Of the small transformer: a block for every block whose features are judged."""
    return Size(layers=max(2, len(settings.equilibrium.feature_blocks)), heads=MOST)


def rehearsed(settings: Settings, teacher: Path) -> Settings:
    """The settings of the rehearsal, with the small model in ``teacher``."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "rehearsal", "output_folder": "outputs"},
        "storage": {"uri": EMBEDDED},
        "tracking": {"uri": "", "experiment": "rehearsal", "log_every_steps": 1},
        "model": {"teacher": str(teacher), "revision": None},
        "data": _data(settings),
        "curation": CurationSettings(examples_per_rule=1).model_dump(),
        "training": _training(settings.training),
        "priming": {
            "steps": FIRST_STEPS if settings.priming.steps else 0,
            "fake_lora_rank": min(settings.priming.fake_lora_rank, RANK),
        },
        "equilibrium": {
            "steps": (OTHER_STEPS if settings.priming.steps else FIRST_STEPS) if settings.equilibrium.steps else 0,
            "feature_blocks": list(range(len(settings.equilibrium.feature_blocks))),
            "head_width": HEAD_WIDTH,
        },
        "alarms": {"every_steps": min(settings.alarms.every_steps, CHECKPOINT_EVERY), "clips": 1, "stop_early": False},
        "evaluation": {
            **{"clips": 2, "batch_clips": 2, "teacher_steps": 2, "few_steps": [2], "workers": 1},
            **{"judge": "", "sheet_clips": 2},
        },
        "export": {"registered_model": "rehearsal", "lora_rank": min(settings.export.lora_rank, RANK)},
    }
    if settings.tracking.profile_steps:
        changes["tracking"]["profile_steps"] = [2, 2]
    tree = settings.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return Settings.model_validate(tree)


def _data(settings: Settings) -> dict[str, Any]:
    return {
        **{"raw_uri": MOVING_DIGITS, "digits_clips": CLIPS, "digits_heldout_clips": HELDOUT_CLIPS},
        **{"digits_clips_per_tar": 8, "clips_per_shard": 8, "frames_per_second": 8.0},
        **{"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "aspect_ratios": [], "bucket_frames": []},
        **{"text_tokens": min(settings.data.text_tokens, TEXT_TOKENS), "encoder_batch_clips": MOST},
        **{"encoder_actors": 1, "encoder_cpus": 0.25, "encoder_gpus": 0.0},
    }


def _training(training: TrainingSettings) -> dict[str, Any]:
    replicas, shards, context = (min(size, MOST) for size in mesh(training))
    parts, clips = min(training.accumulation, MOST), training.batch_per_worker // training.accumulation
    ranks = replicas * shards * context
    return {
        **{"workers": ranks, "min_workers": 0, "replicas": replicas, "context_workers": context},
        **{"cpus_per_worker": 1 / (MOST * ranks), "gpus_per_worker": 0.0, "threads_per_worker": 1},
        **{"accumulation": parts, "batch_per_worker": parts * min(clips, MOST)},
        **{"shuffle_shards": MOST, "shuffle_clips": 4, "raw_chunks_ahead": 1, "raw_decode_cpus": 0.25},
        **{"lora_rank": min(training.lora_rank, RANK), "max_failures": max(1, training.max_failures)},
        **{"checkpoint_every_steps": CHECKPOINT_EVERY, "sample_every_steps": 3, "sample_clips": 1},
    }
