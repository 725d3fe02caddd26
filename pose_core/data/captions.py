"""What a person or a captioner wrote next to a video, checked before anything relies on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pose_core.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELDOUT = (VALIDATION, TEST)
"""Splits that are kept from training: what is watched while training, and what is reported."""
SPLITS = (TRAIN, *HELDOUT)
"""Splits that a caption may name; without one a hash of the video's id chooses."""
PROMPT_NAMES = ("prompt", "caption", "text", "description")
MAX_PROMPT_CHARACTERS = 10_000
"""Longest prompt taken; text encoders read at most 512 tokens of it."""
MAX_JSON_BYTES = 1 << 20
MISSING = ("caption: no prompt", "caption: empty prompt", "caption: none")
"""What is said where there is no caption at all; anything else is a caption that cannot be used."""


@dataclass(frozen=True)
class Caption:
    """A prompt, and the split it asks for (empty: none)."""

    prompt: str
    split: str = ""


def parse_json(content: bytes) -> Caption:
    """Caption from a JSON object with a ``prompt`` (or ``caption``, ``text``, ``description``) and perhaps a ``split``.

    A clip's metadata as cosmos-curate writes them serve too: the caption of its first window is taken.

    Raises:
        DataError: ``caption: ...`` with the reason.
    """
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"caption: too long, {len(content)} bytes of json")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError("caption: json is not UTF-8") from None
    except (ValueError, RecursionError):
        raise DataError("caption: json cannot be parsed") from None
    if not isinstance(value, dict):
        raise DataError("caption: json is not an object")
    return from_record(value)


def parse_text(content: bytes) -> Caption:
    """Caption from a plain text member.

    Raises:
        DataError: ``caption: ...`` with the reason.
    """
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"caption: too long, {len(content)} bytes of text")
    try:
        return from_record({"prompt": content.decode("utf-8-sig")})
    except UnicodeDecodeError:
        raise DataError("caption: text is not UTF-8") from None


def from_record(record: dict[str, Any]) -> Caption:
    """Caption from a row of a table or a JSON object.

    Raises:
        DataError: ``caption: ...`` with the reason.
    """
    prompt = next((record[name] for name in PROMPT_NAMES if record.get(name) is not None), None)
    if prompt is None:
        prompt = _first_window(record.get("windows"))
    split = record.get("split") or ""
    if prompt is None:
        raise DataError(MISSING[0])
    if not isinstance(prompt, str) or as_text(prompt) != prompt:
        raise DataError("caption: prompt is not text")
    if not prompt.strip():
        raise DataError(MISSING[1])
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise DataError(f"caption: too long, {len(prompt)} characters")
    if split not in ("", *SPLITS):
        raise DataError(f"caption: split is not one of {', '.join(SPLITS)}")
    return Caption(prompt.strip(), split)


def _first_window(windows: Any) -> Any:
    """cosmos-curate captions windows of a clip, by several models; an enhanced caption is its best."""
    if not isinstance(windows, list) or not windows or not isinstance(windows[0], dict):
        return None
    captions = {name: value for name, value in windows[0].items() if name.endswith("caption") and value}
    return next((captions[name] for name in sorted(captions, key=lambda name: "enhanced" not in name)), None)


def as_text(value: Any) -> str:
    """``value`` as text that UTF-8 can hold; names in a tar or a listing can be any bytes."""
    return str("" if value is None else value).encode("utf-8", "replace").decode("utf-8")
