"""Model cards: the README.md of an exported folder or LoRA, with the metadata header that the hub reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pose_core.inference.export import one_step_scheduler
from pose_core.models.folders import SHIPPED
from pose_core.models.lora_file import COMFYUI_FILE, DIFFUSERS_FILE, Extraction
from pose_core.models.parts import stock_class

SAMPLES = "samples"
"""Folder beside a card with ``contact_sheet.png`` and ``comparison.mp4``."""
LICENCE_KEYS = ("license", "license_name", "license_link")
NOT_STATED = "unknown"
"""The hub's word for a licence that nobody has stated."""
METHOD = "[POSE](https://arxiv.org/abs/2508.21019), phased one-step adversarial equilibrium"


@dataclass(frozen=True)
class Facts:
    """What the cards of a run say."""

    name: str
    teacher: str
    """A hub name, or what a local folder is called."""
    published: bool
    """Whether the teacher is a hub name."""
    pipeline: str
    """The diffusers class that loads the folder."""
    method: str
    """``pose`` or a rival's name."""
    licence: dict[str, str]
    """Of the teacher, which the generator inherits: ``license`` and perhaps ``license_name`` and ``license_link``."""
    size: tuple[int, int, int]
    """Frames, height and width of a clip, in pixels."""
    data: dict[str, str]
    """What it was trained on, by what each line is called."""
    settings: dict[str, Any]
    """The sections of the run's settings that shaped the weights."""
    figures: dict[str, float]
    """Of one step."""
    table: str
    """The report's figures for every way to sample, as Markdown."""
    conditions: tuple[str, ...]
    """Under which conditions the figures hold, a sentence each."""
    conditioning_time: float = 1.0
    """What the generator is told of its noise."""

    @property
    def with_image(self) -> bool:
        """Whether the pipeline starts from an image."""
        return "Image" in self.pipeline

    @property
    def takes(self) -> set[str]:
        """Arguments of a call of the pipeline."""
        return set(inspect.signature(stock_class(self.pipeline).__call__).parameters)

    @property
    def task(self) -> str:
        """The hub's name of the task."""
        return "image-to-video" if self.with_image else "text-to-video"


def teacher_licence(folder: Path, stated: str) -> dict[str, str]:
    """The licence that a teacher's own card names, else the one ``stated`` for it, else ``unknown``."""
    card = folder / "README.md"
    if card.is_file():
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        if found.get("license"):
            return {key: str(found[key]) for key in LICENCE_KEYS if found.get(key)}
    return {"license": stated or NOT_STATED}


def folder_card(facts: Facts) -> str:
    """README.md of the exported diffusers folder."""
    code = f"""from diffusers import {facts.pipeline}
pipe = {facts.pipeline}.from_pretrained("PATH/OF/THIS/FOLDER")
video = {_call(facts)}"""
    what = f"One transformer evaluation a video: {_how(facts)}."
    return _card(facts, "finetune", ["one-step"], what, code, "")


def lora_card(facts: Facts, rank: int, extraction: Extraction | None) -> str:
    """README.md of the LoRA files: of ``rank``, trained as a LoRA, or extracted with the error reported."""
    guider = "" if "guidance_scale" in facts.takes else "pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)\n"
    file, more = f'"PATH/OF/THIS/FOLDER", weight_name="{DIFFUSERS_FILE}"', "ClassifierFreeGuidance, " if guider else ""
    scheduler = ", ".join(f"{name}={value}" for name, value in one_step_scheduler(facts.conditioning_time).items())
    whole = hasattr(stock_class(facts.pipeline), "load_lora_weights")
    code = f"""from diffusers import {more}FlowMatchEulerDiscreteScheduler, {facts.pipeline}
pipe = {facts.pipeline}.from_pretrained({_place(facts.teacher)}
pipe.scheduler = FlowMatchEulerDiscreteScheduler({scheduler})
{guider}{"pipe.load_lora_weights" if whole else "pipe.transformer.load_lora_adapter"}({file})
video = {_call(facts)}"""
    what = (
        f"A LoRA of rank {rank} on the teacher: one transformer evaluation a video, {_how(facts)}. "
        f"`{DIFFUSERS_FILE}` is for diffusers, `{COMFYUI_FILE}`, where it is there, for ComfyUI's LoRA loader; both "
        "hold the same matrices. The scores are the exported folder's."
    )
    return _card(facts, "adapter", ["one-step", "lora"], what, code, _origin(extraction))


def _place(teacher: str) -> str:
    """Where a reader has the teacher: one that is shipped with the project lies below its repository."""
    shipped = SHIPPED / teacher
    if not shipped.is_dir():
        return f'"{teacher}")'
    return f'"{shipped.relative_to(SHIPPED.parents[1])}")  # in POSE\'s repository'


def _how(facts: Facts) -> str:
    told = "" if facts.conditioning_time == 1 else f", told time {facts.conditioning_time:g} of its noise"
    return f"no guidance, scheduler shift 1{told}"


def _call(facts: Facts) -> str:
    frames, height, width = facts.size
    image = {"image": "image"} if facts.with_image else {}
    size = {"height": height, "width": width, "num_frames": frames}
    given = image | {"prompt": "prompt"} | size | {"num_inference_steps": 1, "guidance_scale": 1.0}
    # Some take their size from the image, and their guidance from a part of the folder.
    return f"pipe({', '.join(f'{name}={value}' for name, value in given.items() if name in facts.takes)}).frames[0]"


def _origin(extraction: Extraction | None) -> str:
    if extraction is None:
        return "## Where the LoRA comes from\n\nIt was trained as it is, so it makes the exported folder's videos.\n"
    ranks = {**extraction.error_by_rank, extraction.rank: extraction.matrices_error}
    rows = "\n".join(f"| {rank} | {error:.3f} |" for rank, error in ranks.items())
    return f"""## Where the LoRA comes from

It was extracted from a generator all of whose weights were trained, by truncated singular value decomposition of the
change of every linear layer; its videos are not quite the exported folder's. Of the change of all weights it misses
{extraction.total_error:.3f} (relative Frobenius norm; norms, convolutions and modulation tables, for which a LoRA has
no place, included), of the change of the linear layers:

| rank | relative error |
|---|---|
{rows}
"""


def _card(facts: Facts, relation: str, tags: list[str], what: str, code: str, origin: str) -> str:
    more: dict[str, Any] = dict(facts.licence) | ({"base_model_relation": relation} if facts.published else {})
    data = ModelCardData(
        model_name=facts.name,
        base_model=facts.teacher if facts.published else None,
        library_name="diffusers",
        pipeline_tag=facts.task,
        tags=[*tags, "video", "distillation", facts.method],
        eval_results=_eval_results(facts),
        **more,
    )
    licence = " ".join(facts.licence[key] for key in LICENCE_KEYS if key in facts.licence)
    if licence == NOT_STATED:
        licence = "not stated by the teacher's folder: find it out before you publish this"
    origin = f"{origin}\n" if origin else ""
    method = METHOD if facts.method == "pose" else f"the method `{facts.method}`"
    return f"""---
{data.to_yaml()}
---

# {facts.name}

A one-step {facts.task} generator, distilled from `{facts.teacher}` with {method}.
{what}

```python
{code}
```

![Real clips, the teacher and the generator, side by side]({SAMPLES}/contact_sheet.png)

Moving, in the same order: [{SAMPLES}/comparison.mp4]({SAMPLES}/comparison.mp4).

## Licence

The teacher's licence: {licence}. Weights distilled from it stay under it.

{origin}## Scores

{facts.table}
{_lines(facts.conditions)}

## Data

{_lines(f"{name}: {value}" for name, value in facts.data.items())}

## Settings

```yaml
{yaml.safe_dump(facts.settings, sort_keys=False).strip()}
```
"""


def _eval_results(facts: Facts) -> list[EvalResult]:
    dataset = facts.data.get("source", "held-out clips")
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=dataset,
            dataset_name=f"held-out clips of {dataset}",
            metric_type=name.lower(),
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in facts.figures.items()
    ]


def _lines(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {sentence}" for sentence in sentences)
