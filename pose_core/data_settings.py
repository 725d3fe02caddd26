"""Settings of the data: where raw videos are, which of them are used, and how they become training clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pose_core.section import Fraction, NonNegativeInt, PositiveInt, Section


class DataSettings(Section):
    """Raw clips and how they become training shards."""

    raw_uri: str = "moving_digits"
    """Folder or ``s3://`` prefix of raw videos: WebDataset tars, video files with a table of captions, Parquet with the
    videos' bytes, or several of these. ``moving_digits`` renders and uploads the embedded domain."""
    digits_clips: PositiveInt = 768
    """Training clips that the embedded domain renders."""
    digits_heldout_clips: PositiveInt = 192
    """Clips of other handwriting that it renders on top, for validation and for the report each."""
    digits_level: Literal["one", "two"] = "two"
    """Digits in a clip: one, or two that pass each other."""
    digits_clips_per_tar: PositiveInt = 64
    train_from: Literal["prepared", "raw"] = "prepared"
    """Where training clips come from: shards that ``prepare_data`` writes once, or the raw shards themselves, which
    other processes decode and encode while the workers train, with nothing stored. Held-out clips are always prepared.
    """
    frames: PositiveInt = 17
    """Frames of a training clip, 4k+1 or as the model's temporal compression asks."""
    height: PositiveInt = 16
    width: PositiveInt = 32
    frames_per_second: Annotated[float, Field(gt=0, le=240)] = 8.0
    aspect_ratios: tuple[str, ...] = ()
    """Aspect ratios (``16:9``) of further buckets, of about the area of ``height`` x ``width``; a video goes to the
    bucket whose shape is nearest. Empty: every clip is ``height`` x ``width``."""
    bucket_frames: tuple[PositiveInt, ...] = ()
    """Lengths in frames of further buckets, 4k+1 or as the model asks; a clip takes the longest that its shot fills."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of clips without a split of their own that is kept from training: half for validation, half for the
    report."""
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
