"""VBench-I2V as this project uses it: its prompts and images, what its dimensions need, and its table.

The suite's files are not shipped: they are what a checkout of https://github.com/Vchitect/VBench has in
``vbench2_beta_i2v`` once its ``download_data.sh`` has run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pose_core.errors import DataError

INFO = "vbench2_i2v_full_info.json"
CROPS = "data/crop"
"""Below the suite's folder: the images of each aspect ratio, ``data/crop/16-9/<image name>``."""
SOURCE = "clone https://github.com/Vchitect/VBench (Apache-2.0), run vbench2_beta_i2v/download_data.sh in it"
IMAGES_LICENCE = "images from Pexels and Pixabay, under those sites' licences"


@dataclass(frozen=True)
class Weights:
    """A file or folder that a dimension needs, below ``vbench.weights_folder``."""

    path: str
    source: str
    licence: str


DINO = (
    Weights(
        "dino_model/facebookresearch_dino_main", "git clone https://github.com/facebookresearch/dino", "Apache-2.0"
    ),
    Weights(
        "torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "Apache-2.0",
    ),
)
CLIP = "https://openaipublic.azureedge.net/clip/models"
NEEDED: Mapping[str, tuple[Weights, ...]] = {
    "i2v_subject": DINO,
    "i2v_background": (
        Weights(
            "dreamsim/ensemble_lora",
            "unzip https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
            "dreamsim_ensemble_checkpoint.zip into dreamsim/",
            "MIT",
        ),
    ),
    "camera_motion": (
        Weights(
            "torch/hub/facebookresearch_co-tracker_main",
            "git clone https://github.com/facebookresearch/co-tracker",
            "CC-BY-NC-4.0",
        ),
        Weights(
            "torch/hub/checkpoints/cotracker2.pth",
            "https://huggingface.co/facebook/cotracker/resolve/main/cotracker2.pth",
            "CC-BY-NC-4.0",
        ),
    ),
    "subject_consistency": DINO,
    "background_consistency": (
        Weights(
            "clip_model/ViT-B-32.pt",
            f"{CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
            "MIT",
        ),
    ),
    "aesthetic_quality": (
        Weights(
            "clip_model/ViT-L-14.pt",
            f"{CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
            "MIT",
        ),
        Weights(
            "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
            "MIT",
        ),
    ),
    "imaging_quality": (
        Weights(
            "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
            "see IQA-PyTorch's two licence files, non-commercial",
        ),
    ),
    "motion_smoothness": (
        Weights("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", "CC-BY-NC-4.0"),
    ),
    "dynamic_degree": (
        Weights(
            "raft_model/models/raft-things.pth",
            "unzip https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip into raft_model/",
            "BSD-3-Clause",
        ),
    ),
    "temporal_flickering": (),
}
"""Dimensions, and the weights each needs."""


@dataclass(frozen=True)
class Entry:
    """One prompt of the suite with its image; ``videos_per_prompt`` videos are made of it."""

    prompt: str
    image: str
    dimensions: tuple[str, ...]


def read_suite(folder: Path, dimensions: Sequence[str], most_prompts: int) -> list[Entry]:
    """The suite's entries that any of ``dimensions`` looks at; of each dimension at most so many (0: all).

    Raises:
        DataError: the suite's file is missing, is not one, or has nothing for a dimension (correctable in the call).
    """
    file = folder / INFO
    try:
        raw = json.loads(file.read_text())
        entries = [Entry(each["prompt_en"], each["image_name"], tuple(each["dimension"])) for each in raw]
    except OSError:
        raise DataError(f"{folder} holds no {INFO}: {SOURCE} and name its vbench2_beta_i2v", in_call=True) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} is not VBench-I2V's list of prompts: {SOURCE}", in_call=True) from None
    chosen: dict[Entry, None] = {}
    for dimension in dimensions:
        found = [entry for entry in entries if dimension in entry.dimensions]
        if not found:
            raise DataError(f"{file} has no prompt for {dimension}: leave it out of vbench.dimensions", in_call=True)
        chosen |= dict.fromkeys(found[: most_prompts or None])
    return list(chosen)


def missing_images(folder: Path, ratios: Iterable[str], entries: Iterable[Entry]) -> list[str]:
    """A line for every aspect ratio with missing images: what, where it goes, its source and its licence."""
    names = sorted({entry.image for entry in entries})
    lines = []
    for ratio in ratios:
        place = folder / CROPS / ratio
        absent = [name for name in names if not (place / name).is_file()]
        if absent:
            what = f"{len(absent)} of {len(names)} images, e.g. {absent[0]}"
            lines.append(f"{place}: {what} ({SOURCE}; {IMAGES_LICENCE})")
    return lines


def missing_weights(folder: Path, dimensions: Iterable[str]) -> list[str]:
    """A line for every missing file or folder: for which dimension, where it goes, its source and its licence."""
    return [
        f"{folder / weights.path} for {dimension} ({weights.source}; {weights.licence})"
        for dimension in dimensions
        for weights in NEEDED[dimension]
        if not (folder / weights.path).exists()
    ]


def checksums(folder: Path, dimensions: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every weights file that the dimensions use, by its path below ``folder``; folders are left out."""
    paths = {weights.path for dimension in dimensions for weights in NEEDED[dimension]}
    found = {}
    for path in sorted(paths):
        if (folder / path).is_file():
            with open(folder / path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def seed_of(run_seed: int, prompt: str, ratio: str, index: int) -> int:
    """The seed of one video's noise, from what it is of and the run's seed: the same for every way to sample it."""
    text = json.dumps([run_seed, prompt, ratio, index])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def size_of(ratio: str, pixels: int, step: int) -> tuple[int, int]:
    """Height and width, multiples of ``step``, of about so many pixels and the suite's ``ratio``, e.g. ``16-9``."""
    wide, high = map(int, ratio.split("-"))
    height = (pixels * high / wide) ** 0.5
    sides = height, height * wide / high
    rounded = [max(step, round(side / step) * step) for side in sides]
    return rounded[0], rounded[1]


PAPER = {
    "teacher, 100 NFE": {"SA": 92.90, "TC": 80.82, "FQ": 70.44},
    "DMD2, 1 NFE": {"SA": 83.15, "TC": 71.67, "FQ": 62.47},
    "MagicDistillation, 1 NFE": {"SA": 84.02, "TC": 74.25, "FQ": 64.76},
    "APT, 1 NFE": {"SA": 84.87, "TC": 75.21, "FQ": 64.69},
    "POSE, 1 NFE": {"SA": 91.54, "TC": 79.56, "FQ": 68.66},
    "POSE, 4 NFE": {"SA": 94.93, "TC": 82.24, "FQ": 70.76},
}
"""Wan2.1-I2V-14B at 480P on VBench-I2V, arXiv 2508.21019 v2, as secondary notes quote it."""


def table(scores: Mapping[str, Mapping[str, float]], conditions: Iterable[str]) -> str:
    """Markdown: ours in per cent by way and aspect ratio, the paper's below it, and where the protocols differ."""
    lines = ["## This run, VBench's raw scores in per cent", "", *_rows(scores, 100)]
    lines += ["", "## The paper (Wan2.1-I2V-14B, 480P)", "", *_rows(PAPER, 1)]
    differences = [
        "The paper sums VBench-I2V up in three figures (SA, TC, FQ) and does not say which dimensions make each: they "
        "are not worked out of the dimensions above.",
        "The paper's figures are quoted from secondary notes on its second version.",
        "The paper does not say its aspect ratios, seeds or version of VBench.",
        *conditions,
    ]
    return "\n".join([*lines, "", "## Where the protocols differ", "", *(f"* {line}" for line in differences)]) + "\n"


def _rows(scores: Mapping[str, Mapping[str, float]], scale: float) -> list[str]:
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for way, row in scores.items():
        cells = (f"{scale * row[name]:.2f}" if name in row else "" for name in names)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines
