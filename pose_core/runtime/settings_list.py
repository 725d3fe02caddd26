"""All settings in words: what ``--list-settings`` prints."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pose_core.settings import Settings

WIDTH = 110
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
"""Words for a bound, by its name in JSON Schema."""


def listing(settings: Settings) -> str:
    """Every setting with its value in ``settings``, its range, its default where that differs, and its meaning."""
    lines = []
    for section in Settings.model_fields:
        group = getattr(settings, section)
        schema = type(group).model_json_schema()
        lines += ["", f"# {schema['description']}", ""]
        for key, said in schema["properties"].items():
            value, default = group.model_dump(mode="json")[key], said.get("default")
            remarks = [*_range(said), *([f"default {_typed(default)}"] if value != default else [])]
            lines.append(f"{section}.{key}={_typed(value)}" + (f"   ({', '.join(remarks)})" if remarks else ""))
            meaning = " ".join(said.get("description", "").replace("``", "`").split())
            lines += textwrap.wrap(meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])


def _range(said: dict[str, Any]) -> list[str]:
    said = said.get("anyOf", [said])[0]  # the other one is null
    one_of = " or ".join(said.get("enum", []))
    return [one_of] if one_of else [f"{words} {said[bound]:.10g}" for bound, words in BOUNDS.items() if bound in said]


def _typed(value: Any) -> str:
    """A value as it is typed behind ``section.key=``."""
    return value if isinstance(value, str) else json.dumps(value)
