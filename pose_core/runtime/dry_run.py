"""``--dry-run``: everything that can be known before weights are loaded or money is spent."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pose_core.config import Settings
from pose_core.models.codec import latent_shape
from pose_core.models.folders import local_teacher
from pose_core.models.lora import fake_score_parameters
from pose_core.models.wan import read_config
from pose_core.runtime import cluster, manifests
from pose_core.runtime.storage import Store
from pose_core.training.build import build_networks

FLOAT32 = 4


def dry_run(settings: Settings) -> None:
    raise NotImplementedError
