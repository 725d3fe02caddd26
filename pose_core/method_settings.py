"""Settings of the method: what it is told, its two phases, and the rivals it is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pose_core.section import Decay, Fraction, LearningRate, NonNegativeInt, PositiveInt, Section

ConditioningTime = Annotated[float, Field(ge=0.5, le=1, multiple_of=0.001)]
"""In thousandths, as an exported scheduler says it."""


MuonScale = Annotated[float, Field(ge=0)]


class MethodSettings(Section):
    """How the model is distilled."""

    name: Literal["pose", "dmd2", "apt", "ladd", "lcm"] = "pose"
    """``pose``, or a rival of ``pose_core/rivals``, through the same loop, data and sharding."""
    conditioning_time: ConditioningTime = 1.0
    """Time that the generator is told of pure noise, whenever it is sampled and in training (but consistency
    distillation). Told an earlier one than 1 it takes the noise for a clip's and leans on it more. Unspecified in
    paper. With 0.96 image to video has a mean of 90.3 instead of 89.7 on the digits (two seeds), text to video 87.0 and
    87.1 (one)."""


class RenoisedSection(Section):
    """Times at which a generated video is noised again before a network looks at it."""

    renoise_time_min: Fraction = 0.02
    renoise_time_max: Fraction = 0.98
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Pushes these times towards the noise end; 1 leaves them as they are."""
    renoise_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Uniform between the two, or logit-normal: mostly around their middle."""

    @model_validator(mode="after")
    def _ordered(self) -> RenoisedSection:
        if self.renoise_time_min >= self.renoise_time_max:
            raise ValueError(
                f"renoise_time_min must be below renoise_time_max={self.renoise_time_max:g}, "
                f"it is {self.renoise_time_min:g}"
            )
        return self


class PrimingSettings(RenoisedSection):
    """Phase I, stability priming."""

    steps: NonNegativeInt = 150
    learning_rate: LearningRate = 5e-4
    fake_learning_rate: LearningRate = 1e-3
    adam_beta1: Decay = 0.0
    """AdamW's beta1, of both turns; DMD2 reads it, too. Unspecified in paper. Without momentum text to video keeps more
    of the teacher: mean 84.7 instead of 81.4, motion 0.82 instead of 0.68 on the digits (two seeds); DMD2 85.8 instead
    of 80.9 (one)."""
    muon_scale: MuonScale = 0.0
    """Muon's learning rate for the matrices in the generator's blocks, as a multiple of ``learning_rate``; 0 leaves
    them to AdamW. DMD2 reads it, too. Unspecified in paper. On the digits 12 lifts image to video from 90.6 to 91.9,
    text to video from 88.6 to 89.7 (one seed each, the latter with a better decoder, too); it was not tried on large
    models, so 0 is the default."""
    fake_lora_rank: PositiveInt = 16
    fake_updates: PositiveInt = 1
    """Fake-score updates a generator update."""
    input_time_min: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Lower end of the low-SNR window of generator input times; the upper end is 1. 0.9 is the paper's; 1 measured the
    same on the digits within what a seed moves (``docs/tuning.md``)."""
    input_time_start: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where that lower end starts, to move up from high to low SNR over the phase; empty: the window is fixed."""
    unshifted_share: Fraction = 0.0
    """Share of the phase's steps, at its end, whose re-noising times ``timestep_shift`` leaves alone; DMD2 reads both,
    too. On the digits, with pure noise as input and a shift of 3, 300 updates of text to video have a mean of 89.6 with
    0.27, 400 have 86.5 without (one seed each); image to video has means of 91.8 and 92.0, motions of 0.97 and 0.87
    with 0.4 and 0.5 (two seeds)."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Classifier-free guidance scale of the real score. Unspecified in paper. On the digits text to video has means of
    82.9, 86.9, 86.1 and 84.6 with 1, 1.5, 2 and 3 (four seeds; of 1, one), image to video 88.7 and 89.6 with 2 and 3
    (two seeds)."""
    gradient_normalisation: Literal["mean_abs", "none"] = "mean_abs"
    """``mean_abs`` divides a clip's matching gradient by its mean distance from the real score's estimate."""
    ema_decay: Decay = 0.98
    """Of the average that the phase hands on. With Muon and a shift that comes down 0.99, 0.98 and 0.96 have means of
    90.8, 91.8 and 91.9 in one step, 93.4, 92.8 and 91.9 in four on the digits, image to video (two seeds)."""


class EquilibriumSettings(RenoisedSection):
    """Phase II, unified adversarial equilibrium."""

    renoise_time_max: Fraction = 0.98
    """Unspecified in paper. Behind 150 updates of phase I image to video has means of 92.1, 91.7 and 91.8 with 0.7, 0.4
    and 0.98 on the digits, FQ 93.4, 93.1 and 92.2 (three, two and two seeds): the teacher's guess at earlier times is
    an average of many clips. With AdamW, behind 25 updates, 83.7 with 0.7 and 89.5 with 0.98 (one seed)."""
    steps: NonNegativeInt = 60
    learning_rate: LearningRate = 1e-4
    """Image to video gains from 3e-4 on the digits, where conditional SDS keeps it stable: with momentum from 85.9 to
    88.4, with Muon, noised again up to 0.7, from 92.2 (2e-4, a weight of 10) to 92.7 (a weight of 30; two seeds)."""
    heads_learning_rate: LearningRate = 1e-3
    adam_beta1: Decay = 0.0
    """AdamW's beta1, of both turns. Unspecified in paper. At a learning rate of 1e-4 text to video ends at a mean of 50
    with 0.9, and at 81 without momentum (digits, one seed, other settings differ, too); image to video measured 88.5
    and 88.1."""
    muon_scale: MuonScale = 0.0
    """As in ``priming``."""
    ema_decay: Decay = 0.98
    feature_blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 3)
    """Backbone blocks whose output the heads judge."""
    backbone: Literal["current", "average", "frozen"] = "average"
    """Whose features the heads judge: the generator's of now, its running average's (mean 84.6 and 85.0 on the digits,
    one seed), or the frozen teacher's."""
    head_width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Channels of a head; its attention has four heads."""
    semantic_head: bool = True
    """Whether a head sees the condition too (image to video only)."""
    semantic_queries: PositiveInt = 4
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance scale of the frozen teacher in conditional SDS. 1, without guidance, saves an evaluation
    and a tenth of a run's time; on the digits, every motion told, it measured the same as 2 (mean 90.7 and 90.6, one
    seed)."""
    adversarial_weight: Annotated[float, Field(ge=0)] = 1.0
    conditional_sds_weight: Annotated[float, Field(ge=0)] = 10.0
    """The paper's. A larger one sharpens and slows: mean 87.5, 88.5, 89.5 and motion 1.02, 0.87, 0.75 with 10, 15 and
    30 on the digits (``docs/tuning.md``, one seed)."""
    r1_weight: Annotated[float, Field(ge=0)] = 1.0
    r1_sigma_space: Annotated[float, Field(gt=0)] = 0.01
    r1_sigma_time: Annotated[float, Field(gt=0)] = 0.1
    r1_every_clips: PositiveInt = 4
    """The penalty is measured on every so many-th real clip: on all of them it would be half of the turn's cost."""


class RivalsSettings(RenoisedSection):
    """What the rivals have of their own; what they share with POSE they read where POSE does."""

    learning_rate: LearningRate = 5e-4
    """Of the generator in consistency distillation and in DMD2. With Muon LCM has means of 81.1, 83.3 and 83.5 with
    5e-4, 3e-4 and 2e-4 on the digits, image to video (one seed)."""
    adversarial_learning_rate: LearningRate = 1e-5
    """Of the generator where a discriminator alone leads it: LADD, and APT behind its first phase. Measured on the
    digits, image to video (mean, one seed): LADD 37 at 5e-4, 41 at 1e-4, 60 at 3e-5, 83 at 1e-5 on an easier edition,
    73 at 1e-5 on this one; APT 75 at 1e-4, 85 at 3e-5 on the easier one, 76 at 1e-5 on this one; with Muon LADD 80.2,
    81.0, 81.7 at 5e-6, 1e-5, 2e-5."""
    heads_learning_rate: LearningRate = 1e-3
    """Of the heads in DMD2, LADD and APT. DMD2 on the digits, image to video: mean 89.3 with 1e-3, 88.5 with 3e-3 (96
    validation clips, 200 updates, one seed)."""
    adam_beta1: Decay = 0.9
    """AdamW's beta1 in consistency distillation, LADD and APT. Means with 0.9 and with 0 on the digits, text to video,
    one seed: 63.0 and 58.0, 52.2 and 51.0, 61.5 and 58.4."""
    muon_scale: MuonScale = 0.0
    """As in ``priming``, for consistency distillation, LADD and APT."""
    discriminator_learning_rate: LearningRate = 1e-4
    """Of APT's discriminator, a full copy of the network."""
    consistency_share: Fraction = 0.75
    """Share of APT's updates in a comparison that are consistency distillation; the others are adversarial."""
    consistency_intervals: PositiveInt = 25
    """Intervals that consistency distillation cuts the teacher's way into."""
    consistency_guidance: Annotated[float, Field(ge=0)] = 2.0
    """Guidance of the teacher's step in consistency distillation."""
    matching_guidance: Annotated[float, Field(ge=0)] = 2.0
    """Guidance of the real score in DMD2. On the digits, image to video: mean 89.8 with 2, 89.4 with 3 (96 validation
    clips, one seed)."""
    consistency_conditioning_time: ConditioningTime = 1.0
    adversarial_conditioning_time: ConditioningTime = 1.0
    matching_conditioning_time: ConditioningTime = 1.0
    """``method.conditioning_time`` of a comparison's rows: of LCM and APT, of LADD, of DMD2."""
    gan_weight: Annotated[float, Field(ge=0)] = 0.03
    """Weight of DMD2's adversarial loss beside matching, for generator and critic."""
    r1_weight: Annotated[float, Field(ge=0)] = 100.0
    r1_sigma: Annotated[float, Field(gt=0)] = 0.01
    """APT's approximated R1 penalty: its weight, and the noise that real clips are moved by."""
