"""Writes the folder that stock diffusers loads: the teacher's parts around the one-step transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from pose_core.models import families
from pose_core.models.folders import read_index


def export_folder(teacher: Path, generator: Path, out: Path, card: str, task: str | None = None) -> None:
    """Assemble ``out`` from the teacher's folder, the generator's transformer folder and a one-step scheduler.

    One Euler step from noise to data is exactly the one-step map, so the stock pipeline needs no code of ours. ``card``
    is the text of the folder's README.md, ``task`` what a model that can do several was distilled for.
    """
    family = families.of(teacher)
    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns("transformer", "transformer_2", "scheduler", ".*"))
    shutil.copytree(generator, out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")
    index = family.one_step_index(read_index(teacher), task or family.tasks(teacher)[0])
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    family.finish_export(out)
    (out / "README.md").write_text(card)


def model_card(name: str, teacher: str, frames: int, height: int, width: int, figures: dict[str, float]) -> str:
    """README.md of an exported folder: what it is, the lines that use it, and the report's figures."""
    rows = "\n".join(f"| {key} | {value:.2f} |" for key, value in figures.items())
    return f"""---
library_name: diffusers
pipeline_tag: image-to-video
tags: [one-step, video, distillation]
---

# {name}

A one-step image-to-video generator, distilled from `{teacher}` with POSE.

```python
from diffusers import WanImageToVideoPipeline
pipe = WanImageToVideoPipeline.from_pretrained("PATH/OF/THIS/FOLDER")
video = pipe(image=image, prompt=prompt, height={height}, width={width}, num_frames={frames},
             num_inference_steps=1, guidance_scale=1.0).frames[0]
```

One transformer evaluation a video, no guidance, scheduler shift 1.

| figure | value |
|---|---|
{rows}
"""
