"""Every setting of a run, declared once with its range and read by the one component that owns it.

Units are in the names. The defaults are the embedded digits demo; ``config.load`` reads files and overrides into them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of every group of settings: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Section):
    """Which run this is and where a person finds its results."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = "digits-i2v"
    """Names the run in storage, in the job list and in MLflow; the same name goes on where it stopped."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_folder: str = "outputs"
    """Local folder that receives the report and the exported model, under the run's name."""


class StorageSettings(Section):
    """Where shards, artifacts and checkpoints live."""

    uri: Annotated[str, Field(min_length=1)] = "embedded"
    """``embedded`` starts SeaweedFS on loopback; ``s3://bucket/prefix`` is any S3 store; anything else is a folder."""


class TrackingSettings(Section):
    """How runs are logged to MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty means ``MLFLOW_TRACKING_URI`` or, without it, SQLite under ``.pose/``."""
    experiment: Annotated[str, Field(min_length=1)] = "pose"
    log_every_steps: PositiveInt = 2
    """Steps between two points of a curve."""


class ModelSettings(Section):
    """The pretrained model to distil."""

    family: Literal["wan"] = "wan"
    task: Literal["i2v", "t2v"] = "i2v"
    teacher: Annotated[str, Field(min_length=1)] = "teachers/digits_i2v"
    """A diffusers folder (relative to the config file or the working folder) or a hub name."""
    revision: str | None = None
    """Pinned revision of a hub name."""
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Shift of the teacher's sampling times (Wan 2.1 at 480P: 3)."""


class DataSettings(Section):
    """Raw clips and how they become training shards."""

    raw_uri: str = "moving_digits"
    """Folder or ``s3://`` prefix of raw videos: WebDataset tars, video files with a table of captions, Parquet with the
    videos' bytes, or several of these. ``moving_digits`` renders and uploads the embedded domain."""
    digits_clips: PositiveInt = 768
    """Training clips that the embedded domain renders."""
    digits_heldout_clips: PositiveInt = 192
    """Held-out clips, of other handwriting, that it renders on top."""
    digits_clips_per_tar: PositiveInt = 64
    frames: PositiveInt = 9
    """Frames of a training clip, 4k+1 or as the model's temporal compression asks."""
    height: PositiveInt = 32
    width: PositiveInt = 32
    frames_per_second: Annotated[float, Field(gt=0, le=240)] = 8.0
    aspect_ratios: tuple[str, ...] = ()
    """Aspect ratios (``16:9``) of further buckets, of about the area of ``height`` x ``width``; a video goes to the
    bucket whose shape is nearest. Empty: every clip is ``height`` x ``width``."""
    bucket_frames: tuple[PositiveInt, ...] = ()
    """Lengths in frames of further buckets, 4k+1 or as the model asks; a clip takes the longest that its shot fills."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of clips without a split of their own that is kept for validation and the report."""
    text_tokens: Annotated[int, Field(ge=1, le=512)] = 16
    """Text embeddings kept a prompt; the rest of the text encoder's 512 are zeros. A longer prompt is cut."""
    clips_per_shard: PositiveInt = 64
    encoder_actors: PositiveInt = 2
    encoder_batch_clips: PositiveInt = 16
    encoder_cpus: Annotated[float, Field(gt=0)] = 0.5
    encoder_gpus: Annotated[float, Field(ge=0)] = 0.0


class CurationSettings(Section):
    """Which videos and clips are used. Every rule is off (null or 0) or a limit; what it drops is reported."""

    shot_threshold: Annotated[float, Field(gt=1)] | None = None
    """Cut videos at shots: how many times more than its neighbours a frame must change to begin one (PySceneDetect's
    AdaptiveDetector; 3 is its default). Off: a video is one shot."""
    clips_per_video: PositiveInt = 1
    """Clips taken of one video, one behind the other, none across a cut."""
    min_seconds: Annotated[float, Field(ge=0)] = 0.0
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Shortest and longest video that is used."""
    min_side_pixels: PositiveInt = 16
    """Least shorter side of a video."""
    min_source_rate: Annotated[float, Field(ge=0)] = 0.0
    max_source_rate: Annotated[float, Field(gt=0)] | None = None
    """Least and most frames a second of a video."""
    max_cropped_share: Fraction | None = None
    """Most of a video's picture that its bucket's shape may cut off."""
    max_black_share: Fraction | None = None
    """Most of a clip's frames that may be black."""
    min_brightness_range: Annotated[float, Field(ge=0, le=255)] = 8.0
    """Least grey levels between a clip's darkest and brightest pixel; less is blank."""
    max_frozen_share: Fraction | None = None
    """Most of a clip's frames that may repeat the one before."""
    min_motion: Annotated[float, Field(ge=0, le=255)] = 0.0
    """Least mean absolute difference between a clip's frames, in grey levels; less is still."""
    max_duplicate_bits: Annotated[int, Field(ge=0, le=64)] | None = None
    """Drop a clip whose perceptual hash (192 bits) differs from an earlier clip's in no more bits than this."""
    require_caption: bool = True
    """Off: a video without a caption is used with an empty prompt."""
    examples_per_rule: NonNegativeInt = 4
    """Clips shown of what each rule dropped and of what each bucket holds."""
    max_video_mebibytes: PositiveInt = 1024
    """Largest video file that is read into memory."""
    decoder_gibibytes: Annotated[float, Field(gt=0)] = 4.0
    """Memory that the process may use that first decodes a video."""
    decoder_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Time that it may take for one video."""
    decoder_cpus: Annotated[float, Field(gt=0)] = 0.5
    """What it asks Ray for."""


class MethodSettings(Section):
    """How the model is distilled."""

    name: Literal["pose", "dmd2", "apt", "ladd", "lcm"] = "pose"
    """``pose``, or a rival of ``pose_core/rivals``, through the same loop, data and sharding."""


class TrainingSettings(Section):
    """How both phases are trained: workers, memory and recovery."""

    generator: Literal["full", "lora", "one_base"] = "full"
    """What of the generator learns: all of it, a LoRA on it, or a LoRA on one set of frozen weights that teacher, fake
    score, generator and discriminator backbone share (least memory: see ``benchmarks/turn_cost.py``)."""
    lora_rank: PositiveInt = 32
    """Rank of the generator's LoRA."""

    workers: PositiveInt = 2
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """What a worker asks Ray for; the data tasks need the rest."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    threads_per_worker: NonNegativeInt = 1
    """Threads torch may use on the CPU (0 leaves torch's own choice)."""
    batch_per_worker: PositiveInt = 8
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of computation and of gathered parameters; master weights and reductions stay float32."""
    activation_checkpointing: bool = False
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm of a turn."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    checkpoint_every_steps: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    max_failures: NonNegativeInt = 3
    """How often a phase restarts from its last checkpoint after a worker died."""
    sample_every_steps: PositiveInt = 25
    sample_clips: PositiveInt = 4


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
                f"must be below renoise_time_max={self.renoise_time_max:g}, it is {self.renoise_time_min:g}"
            )
        return self


class PrimingSettings(RenoisedSection):
    """Phase I, stability priming."""

    steps: NonNegativeInt = 150
    learning_rate: LearningRate = 5e-4
    fake_learning_rate: LearningRate = 1e-3
    fake_lora_rank: PositiveInt = 16
    fake_updates: PositiveInt = 1
    """Fake-score updates a generator update."""
    input_time_min: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Lower end of the low-SNR window of generator input times; the upper end is 1."""
    input_time_start: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where that lower end starts, to move up from high to low SNR over the phase; empty: the window is fixed."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Classifier-free guidance scale of the real score."""
    gradient_normalisation: Literal["mean_abs", "none"] = "mean_abs"
    """``mean_abs`` divides a clip's matching gradient by its mean distance from the real score's estimate."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98


class EquilibriumSettings(RenoisedSection):
    """Phase II, unified adversarial equilibrium."""

    steps: NonNegativeInt = 60
    learning_rate: LearningRate = 1e-4
    heads_learning_rate: LearningRate = 1e-3
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    feature_blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 3)
    """Backbone blocks whose output the heads judge."""
    backbone: Literal["current", "average", "frozen"] = "average"
    """Whose features the heads judge: the generator's of now, its running average's, or the frozen teacher's."""
    head_width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Channels of a head; its attention has four heads."""
    semantic_head: bool = True
    """Whether a head sees the condition too (image to video only)."""
    semantic_queries: PositiveInt = 4
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Classifier-free guidance scale of the frozen teacher in conditional SDS."""
    adversarial_weight: Annotated[float, Field(ge=0)] = 1.0
    conditional_sds_weight: Annotated[float, Field(ge=0)] = 10.0
    r1_weight: Annotated[float, Field(ge=0)] = 1.0
    r1_sigma_space: Annotated[float, Field(gt=0)] = 0.01
    r1_sigma_time: Annotated[float, Field(gt=0)] = 0.1
    r1_every_clips: PositiveInt = 4
    """The penalty is measured on every so many-th real clip: on all of them it would be half of the turn's cost."""


class RivalsSettings(RenoisedSection):
    """What the rivals have of their own; what they share with POSE they read where POSE does."""

    learning_rate: LearningRate = 5e-4
    """Of the generator in the rivals' turns."""
    discriminator_learning_rate: LearningRate = 1e-4
    """Of APT's discriminator, a full copy of the network."""
    consistency_intervals: PositiveInt = 25
    """Intervals that consistency distillation cuts the teacher's way into."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Guidance of the teacher's step in consistency distillation."""
    gan_weight: Annotated[float, Field(ge=0)] = 0.03
    """Weight of DMD2's adversarial loss beside matching, for generator and critic."""
    r1_weight: Annotated[float, Field(ge=0)] = 100.0
    r1_sigma: Annotated[float, Field(gt=0)] = 0.01
    """APT's approximated R1 penalty: its weight, and the noise that real clips are moved by."""


class EvaluationSettings(Section):
    """The report: the one-step generator against its teacher."""

    clips: PositiveInt = 96
    """Held-out clips that are generated; as many others, where there are any, are the reference of the figures."""
    batch_clips: PositiveInt = 16
    teacher_steps: PositiveInt = 50
    few_steps: tuple[Annotated[int, Field(ge=2)], ...] = (4,)
    """Numbers of steps, besides one, that the generator is sampled in too."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    workers: PositiveInt = 2
    judge: str = "teachers/digits_judge"
    """Folder of the small classifier behind SA, TC and FQ; empty leaves those three out."""
    sheet_clips: PositiveInt = 6


class ExportSettings(Section):
    """The folder stock diffusers loads."""

    registered_model: Annotated[str, Field(min_length=1)] = "pose-digits-i2v"
    alias: Annotated[str, Field(min_length=1)] = "one-step"


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


class Settings(Section):
    """All settings of one run."""

    run: RunSettings = RunSettings()
    storage: StorageSettings = StorageSettings()
    tracking: TrackingSettings = TrackingSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    curation: CurationSettings = CurationSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    priming: PrimingSettings = PrimingSettings()
    equilibrium: EquilibriumSettings = EquilibriumSettings()
    rivals: RivalsSettings = RivalsSettings()
    alarms: AlarmSettings = AlarmSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
