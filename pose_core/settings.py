"""Every setting of a run, declared once with its range and read by the one component that owns it.

Units are in the names. The defaults are the embedded digits demo; ``config.load`` reads files and overrides into them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pose_core.data_settings import CurationSettings, DataSettings
from pose_core.result_settings import AlarmSettings, EvaluationSettings, ExportSettings, VbenchSettings
from pose_core.section import Decay, Fraction, LearningRate, NonNegativeInt, PositiveInt, Section


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
    retry_seconds: Annotated[float, Field(ge=0, le=86400)] = 120.0
    """How long reading shards and writing checkpoints go on trying a store that does not answer, answers 500 or 503,
    sends too slowly, cuts objects off, is full or refuses credentials, which are read anew, before the run ends."""


class TrackingSettings(Section):
    """How runs are logged to MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty means ``MLFLOW_TRACKING_URI`` or, without it, SQLite under ``.pose/``."""
    experiment: Annotated[str, Field(min_length=1)] = "pose"
    log_every_steps: PositiveInt = 2
    """Steps between two points of a curve."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last of the steps that rank 0 traces, operation by operation; slow ones, and large files: take two."""
    device_teraflops: Annotated[float, Field(ge=0)] = 0.0
    """What one worker's device computes at most a second, at ``training.precision``, for the utilisation; 0 takes it
    from the table of ``pose_core/training/devices.py``, and without an entry there is no utilisation."""

    @model_validator(mode="after")
    def _profiles_forwards(self) -> TrackingSettings:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be a first step and a last one")
        return self


class ModelSettings(Section):
    """The pretrained model to distil."""

    family: Literal["wan", "wan22_ti2v", "wan22_a14b", "ltx", "hunyuan15"] = "wan"
    """Family of the teacher: a file of ``pose_core/models``; see ``docs/families.md``."""
    task: Literal["i2v", "t2v"] = "i2v"
    teacher: Annotated[str, Field(min_length=1)] = "teachers/digits_i2v"
    """A diffusers folder (relative to the config file or the working folder), one in a bucket (``s3://bucket/folder``),
    or a hub name. Its weights must be safetensors."""
    revision: str | None = None
    """Commit that a hub name is pinned to; without it the newest is taken."""
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Shift of the teacher's sampling times (Wan 2.1 at 480P: 3)."""


ConditioningTime = Annotated[float, Field(ge=0.5, le=1, multiple_of=0.001)]
"""In thousandths, as an exported scheduler says it."""


class MethodSettings(Section):
    """How the model is distilled."""

    name: Literal["pose", "dmd2", "apt", "ladd", "lcm"] = "pose"
    """``pose``, or a rival of ``pose_core/rivals``, through the same loop, data and sharding."""
    conditioning_time: ConditioningTime = 1.0
    """Time that the generator is told of pure noise, in training and whenever it is sampled. Told an earlier one than 1
    it takes the noise for a clip's and leans on it more. Unspecified in paper. With 0.96 image to video has a mean of
    90.3 instead of 89.7 on the digits (two seeds), text to video 87.0 and 87.1 (one)."""


class TrainingSettings(Section):
    """How both phases are trained: workers, memory and recovery."""

    generator: Literal["full", "lora", "one_base"] = "full"
    """What of the generator learns: all of it, a LoRA on it, or a LoRA on one set of frozen weights that teacher, fake
    score, generator and discriminator backbone share (least memory: see ``benchmarks/turn_cost.py``)."""
    lora_rank: PositiveInt = 32
    """Rank of the generator's LoRA."""

    workers: PositiveInt = 2
    """FSDP2 ranks. They share one copy of the weights, unless ``replicas`` or ``context_workers`` say otherwise."""
    min_workers: NonNegativeInt = 0
    """Elastic training: start, and go on after a loss, with so many workers if the cluster has no room for ``workers``,
    and grow back once it has. 0: always ``workers``. Each has ``batch_per_worker`` clips a step all the same."""
    elastic_check_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How often elastic training looks whether it can grow; the steps since the last checkpoint are then done again."""
    replicas: PositiveInt = 1
    """Hybrid sharding: groups of workers that hold a whole copy of the weights each, e.g. one a machine."""
    context_workers: PositiveInt = 1
    """Context parallelism, for long clips: workers that share the tokens of one clip (Ulysses)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """What a worker asks Ray for; the data tasks need the rest."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    threads_per_worker: NonNegativeInt = 1
    """Threads torch may use on the CPU (0 leaves torch's own choice)."""
    batch_per_worker: PositiveInt = 8
    """Clips a step; workers that share a clip's tokens share them too."""
    accumulation: PositiveInt = 1
    """Parts that a worker's clips are taken in, one after the other, before the optimiser moves."""
    shuffle_shards: PositiveInt = 8
    """Shards that are read side by side, at best a multiple of ``workers``: then no two workers read the same."""
    shuffle_clips: PositiveInt = 64
    """Clips of each of them that are in memory, and shuffled, at a time."""
    raw_chunks_ahead: PositiveInt = 4
    """With ``data.train_from=raw``: so many times ``shuffle_clips`` clips are decoded and encoded ahead, at once."""
    raw_decode_cpus: Annotated[float, Field(gt=0)] = 0.5
    """What a task that decodes raw clips asks Ray for."""
    log_clips: bool = False
    """Store with each checkpoint which clips the steps before it trained on, in ``clips/`` of the phase's artifact."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of computation and of gathered parameters; master weights and reductions stay float32."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward pass computes again instead of keeping: nothing, whole blocks, or all of them but attention."""
    compile_blocks: bool = False
    """Compile each transformer block; the first steps then take minutes."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm of a turn."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    checkpoint_every_steps: PositiveInt = 50
    """Steps between two checkpoints; they are written in the background."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints that are kept: the newest without an alarm, and always the newest of all."""
    max_failures: NonNegativeInt = 3
    """How often in a row a phase restarts from its last checkpoint after a worker died; a new checkpoint begins a new
    row, and nodes that Ray drains do not count."""
    preemption_grace_seconds: Annotated[float, Field(gt=0)] = 25.0
    """How long a worker that gets SIGTERM may take to finish its step and store a checkpoint before it ends."""
    slow_step_factor: Annotated[float, Field(ge=0)] = 10.0
    """A step that takes more than so many times the median ends the attempt, with the stacks of all workers in the log;
    0 lets it take for ever. So does one that never returns from waiting for other workers."""
    slow_step_seconds: Annotated[float, Field(gt=0)] = 300.0
    """What any step may take, however fast the others are."""
    longest_pause_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """What anything else may take: the first steps of a size (compiling), samples, alarms, a checkpoint."""
    sample_every_steps: PositiveInt = 25
    sample_clips: PositiveInt = 4

    @property
    def fewest_workers(self) -> int:
        """Workers that training cannot do without."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _divides(self) -> TrainingSettings:
        if self.workers % (self.replicas * self.context_workers):
            raise ValueError(
                f"workers={self.workers} must be a multiple of replicas={self.replicas} times "
                f"context_workers={self.context_workers}"
            )
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} must not be above workers={self.workers}")
        if self.min_workers and self.replicas * self.context_workers > 1:
            raise ValueError(
                f"min_workers={self.min_workers} needs replicas=1 and context_workers=1: workers come and go one by one"
            )
        if self.batch_per_worker % self.accumulation:
            raise ValueError(
                f"batch_per_worker={self.batch_per_worker} must be a multiple of accumulation={self.accumulation}"
            )
        return self


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
    fake_lora_rank: PositiveInt = 16
    fake_updates: PositiveInt = 1
    """Fake-score updates a generator update."""
    input_time_min: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Lower end of the low-SNR window of generator input times; the upper end is 1. 0.9 is the paper's; 1 measured the
    same on the digits within what a seed moves (``docs/tuning.md``)."""
    input_time_start: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where that lower end starts, to move up from high to low SNR over the phase; empty: the window is fixed."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Classifier-free guidance scale of the real score. Unspecified in paper. On the digits text to video has means of
    82.9, 86.9, 86.1 and 84.6 with 1, 1.5, 2 and 3 (four seeds; of 1, one), image to video 88.7 and 89.6 with 2 and 3
    (two seeds)."""
    gradient_normalisation: Literal["mean_abs", "none"] = "mean_abs"
    """``mean_abs`` divides a clip's matching gradient by its mean distance from the real score's estimate."""
    ema_decay: Decay = 0.98


class EquilibriumSettings(RenoisedSection):
    """Phase II, unified adversarial equilibrium."""

    steps: NonNegativeInt = 60
    learning_rate: LearningRate = 1e-4
    """With momentum image to video gains from 3e-4 on the digits, where conditional SDS keeps it stable (mean 85.9 to
    88.4)."""
    heads_learning_rate: LearningRate = 1e-3
    adam_beta1: Decay = 0.0
    """AdamW's beta1, of both turns. Unspecified in paper. At a learning rate of 1e-4 text to video ends at a mean of 50
    with 0.9, and at 81 without momentum (digits, one seed, other settings differ, too); image to video measured 88.5
    and 88.1."""
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
    """Of the generator in consistency distillation and in DMD2."""
    adversarial_learning_rate: LearningRate = 1e-5
    """Of the generator where a discriminator alone leads it: LADD, and APT behind its first phase. Measured on the
    digits, image to video (mean, one seed): LADD 37 at 5e-4, 41 at 1e-4, 60 at 3e-5, 83 at 1e-5 on an easier edition,
    73 at 1e-5 on this one; APT 75 at 1e-4, 85 at 3e-5 on the easier one, 76 at 1e-5 on this one."""
    heads_learning_rate: LearningRate = 1e-3
    """Of the heads in DMD2, LADD and APT. DMD2 on the digits, image to video: mean 89.3 with 1e-3, 88.5 with 3e-3 (96
    validation clips, 200 updates, one seed)."""
    adam_beta1: Decay = 0.9
    """AdamW's beta1 in consistency distillation, LADD and APT. Means with 0.9 and with 0 on the digits, text to video,
    one seed: 63.0 and 58.0, 52.2 and 51.0, 61.5 and 58.4."""
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
    vbench: VbenchSettings = VbenchSettings()
    export: ExportSettings = ExportSettings()
