"""Settings of what a run is judged by and what it hands over: report, VBench-I2V, export and alarms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pose_core.section import Fraction, NonNegativeInt, PositiveInt, Section


class EvaluationSettings(Section):
    """The report: the one-step generator against its teacher."""

    clips: PositiveInt = 96
    """Held-out clips that are generated; as many others, where there are any, are the reference of the figures."""
    batch_clips: PositiveInt = 16
    teacher_steps: PositiveInt = 50
    few_steps: tuple[Annotated[int, Field(ge=2)], ...] = (4,)
    """Numbers of steps, besides one, that the generator is sampled in too."""
    few_steps_time_min: Fraction = 0.0
    few_steps_time_max: Fraction = 1.0
    """Between these two few steps noise again, evenly spaced: 0 and 1 give four steps 0.75, 0.5 and 0.25. Unspecified
    in paper. On the digits (validation clips) 0.65 and 0.85 lift image to video from 91.5 to 91.9 in four steps and in
    two (five seeds); text to video, trained with Muon, gains from 0 and 0.25: 89.8 instead of 87.3 in four (two)."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    workers: PositiveInt = 2
    judge: str = "teachers/digits_judge"
    """Folder of the small classifier behind SA, TC and FQ; empty leaves those three out."""
    sheet_clips: PositiveInt = 6

    @model_validator(mode="after")
    def _ordered(self) -> EvaluationSettings:
        if self.few_steps_time_min > self.few_steps_time_max:
            raise ValueError(
                f"few_steps_time_min must not be above few_steps_time_max={self.few_steps_time_max:g}, "
                f"it is {self.few_steps_time_min:g}"
            )
        return self


class VbenchSettings(Section):
    """VBench-I2V, ``pipelines/evaluate.py --suite vbench_i2v``; steps and guidance are ``evaluation``'s."""

    videos_per_prompt: PositiveInt = 5
    """Seeds a prompt; five is VBench's own number, and the most it looks at."""
    ratios: Annotated[tuple[Literal["1-1", "8-5", "7-4", "16-9"], ...], Field(min_length=1)] = (
        *("1-1", "8-5", "7-4", "16-9"),
    )
    """Aspect ratios of the suite's images; videos have about ``data.height x data.width`` pixels in each."""
    dimensions: Annotated[
        tuple[
            Literal[
                "i2v_subject",
                "i2v_background",
                "camera_motion",
                "subject_consistency",
                "background_consistency",
                "motion_smoothness",
                "dynamic_degree",
                "aesthetic_quality",
                "imaging_quality",
                "temporal_flickering",
            ],
            ...,
        ],
        Field(min_length=1),
    ] = (
        *("i2v_subject", "i2v_background", "camera_motion", "subject_consistency", "background_consistency"),
        *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality", "temporal_flickering"),
    )
    most_prompts: NonNegativeInt = 0
    """Prompts of each dimension that are sampled (0: all); fewer make scores that compare with nobody's."""
    weights_folder: str = "~/.cache/vbench"
    """Where the networks behind the dimensions lie on the machine that scores; nothing is downloaded."""
    environment_folder: str = "~/.cache/pose/vbench"
    """Where the vbench package's own environment is built, once, on the machine that scores."""


class ExportSettings(Section):
    """The folder stock diffusers loads."""

    registered_model: Annotated[str, Field(min_length=1)] = "pose-digits-i2v"
    alias: Annotated[str, Field(min_length=1)] = "one-step"
    lora_rank: NonNegativeInt = 64
    """Rank of the LoRA file that is extracted from a fully trained generator (0: none); one that was trained as a LoRA
    has ``training.lora_rank``."""
    licence: str = ""
    """The teacher's licence, by its name on the hub (``apache-2.0``), where the teacher's README.md does not say it."""


class AlarmSettings(Section):
    """What is watched while a phase trains, and when it ends the phase.

    Motion, diversity and fidelity to the first frame are measured on fixed held-out clips and noise. A figure that has
    once reached ``lowest_share`` of the teacher's and then falls below it has collapsed.
    """

    every_steps: NonNegativeInt = 25
    """Steps between two measurements; each checkpoint is preceded by one. 0 = never."""
    clips: PositiveInt = 4
    lowest_share: Fraction = 0.3
    """Share of the teacher's value below which a figure has collapsed. A healthy generator has about half of the
    teacher's diversity (measured on the digits: 0.5 in both phases; motion 0.87, fidelity 0.65)."""
    stop_early: bool = False
    """End the phase at a collapse; its result is then the last checkpoint before it."""
    non_finite_steps: PositiveInt = 3
    """Updates in a row that one turn may skip, for a loss or gradient that is not finite, before the run stops."""
