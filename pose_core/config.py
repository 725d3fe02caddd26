"""Reads settings: ``load(file, overrides)`` gives one frozen, checked ``Settings`` object.

Files are YAML, overrides are dotted (``priming.steps=200``). What settings there are is said in ``settings.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from pose_core.errors import ConfigError
from pose_core.settings import Settings


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
    if isinstance(error["input"], dict):  # of settings that do not fit each other
        return f"{key}.{message}"
    return f"{key}={_short(error['input'])} is not allowed: {message[0].lower()}{message[1:]}"


def _nearest(path: list[str]) -> str:
    sections = Settings.model_fields
    if path[0] in sections:
        section: Any = sections[path[0]].annotation
        names = [f"{path[0]}.{name}" for name in section.model_fields]
    else:
        names = list(sections)
    close = difflib.get_close_matches(".".join(path), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}; --list-settings explains them"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
