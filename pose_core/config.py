"""Typed, validated settings: ``load(file, overrides)`` gives one frozen ``Settings`` object.

A setting is declared here once, with its range, and read by the one component that owns it. Files are YAML, overrides
are dotted (``priming.steps=200``). Units are in the names. The defaults are the embedded digits demo.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pose_core.errors import ConfigError

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
    """Folder or ``s3://`` prefix of WebDataset tars with ``mp4`` and ``json`` members, or ``moving_digits``, which
    renders and uploads the embedded domain."""
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
    min_side_pixels: PositiveInt = 16
    """Clips whose shorter side is smaller are dropped."""
    min_brightness_range: Annotated[float, Field(ge=0, le=255)] = 8.0
    """Clips whose brightest and darkest pixels are closer than this are dropped as blank."""
    min_motion: Annotated[float, Field(ge=0, le=255)] = 0.0
    """Clips whose mean absolute difference between frames is lower are dropped as still (0 keeps all)."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of clips without a split of their own that is kept for validation and the report."""
    text_tokens: Annotated[int, Field(ge=1, le=512)] = 16
    """Text embeddings kept a prompt; the rest of the text encoder's 512 are zeros. A longer prompt is cut."""
    clips_per_shard: PositiveInt = 64
    encoder_actors: PositiveInt = 2
    encoder_batch_clips: PositiveInt = 16
    encoder_cpus: Annotated[float, Field(gt=0)] = 0.5
    encoder_gpus: Annotated[float, Field(ge=0)] = 0.0


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
    guidance: Annotated[float, Field(ge=0)] = 2.0
    workers: PositiveInt = 2
    judge: str = "teachers/digits_judge"
    """Folder of the small classifier behind SA, TC and FQ; empty leaves those three out."""
    sheet_clips: PositiveInt = 6


class ExportSettings(Section):
    """The folder stock diffusers loads."""

    registered_model: Annotated[str, Field(min_length=1)] = "pose-digits-i2v"
    alias: Annotated[str, Field(min_length=1)] = "one-step"


class Settings(Section):
    """All settings of one run."""

    run: RunSettings = RunSettings()
    storage: StorageSettings = StorageSettings()
    tracking: TrackingSettings = TrackingSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    priming: PrimingSettings = PrimingSettings()
    equilibrium: EquilibriumSettings = EquilibriumSettings()
    rivals: RivalsSettings = RivalsSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()


def load(text: str, overrides: Iterable[str] = (), *, source: str = "the config") -> Settings:
    """Parse YAML ``text``, apply dotted ``overrides`` (``section.key=value``) and check everything.

    Raises:
        ConfigError: naming the key, the value, what is allowed and, for an unknown key, the nearest valid one.
    """
    tree = _parse(text, source)
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot or not name:
            raise ConfigError(
                f"cannot read {override!r}: settings are typed as section.key=value, e.g. priming.steps=200"
            )
        group = tree.setdefault(section, {})
        if isinstance(group, dict):
            group[name] = _parse_value(value)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None


def dump(settings: Settings) -> str:
    """YAML that ``load`` reads back to equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold sections such as 'priming:', it holds one {type(tree).__name__}")
    return {str(key): {} if value is None else value for key, value in tree.items()}


def _parse_value(value: str) -> Any:
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        return value


def _explain(error: Any) -> str:
    """One line for the first thing pydantic refused: key, value, what is allowed, the nearest valid name."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown setting {key}={_short(error['input'])}: {_nearest(path)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if message.startswith("must be below"):
        return f"{key}.renoise_time_min is out of range: {message}"
    return f"{key}={_short(error['input'])} is not allowed: {message[0].lower()}{message[1:]}"


def _nearest(path: list[str]) -> str:
    sections = Settings.model_fields
    if path[0] in sections:
        section: Any = sections[path[0]].annotation
        names = [f"{path[0]}.{name}" for name in section.model_fields]
    else:
        names = list(sections)
    close = difflib.get_close_matches(".".join(path), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names[:12])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
