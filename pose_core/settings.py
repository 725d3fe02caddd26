"""Every setting of a run, declared once with its range and read by the one component that owns it.

Units are in the names. The defaults are the embedded digits demo; ``config.load`` reads files and overrides into them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pose_core.data_settings import CurationSettings, DataSettings
from pose_core.method_settings import EquilibriumSettings, MethodSettings, PrimingSettings, RivalsSettings
from pose_core.result_settings import AlarmSettings, EvaluationSettings, ExportSettings, VbenchSettings
from pose_core.section import NonNegativeInt, PositiveInt, Section


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
