"""Settings are checked where they are declared, refused in one line, and every one of them is read by something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))
READERS = [f"pose_core/{name}" for name in ("runtime", "training", "evaluation", "inference", "models", "data")]


def refusal(text: str, *overrides: str) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        config.load(text, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def fields() -> Iterator[tuple[str, str]]:
    """Section and name of every setting."""
    for section, group in Settings.model_fields.items():
        for name in group.annotation.model_fields:  # type: ignore[union-attr]
            yield section, name


def test_nothing_given_gives_the_defaults() -> None:
    for text in ("", "# only a comment", "priming:", "run: {}"):
        assert config.load(text) == Settings()


def test_what_is_dumped_loads_again() -> None:
    settings = config.load("", ["priming.steps=7", "equilibrium.feature_blocks=[0, 2]", "model.revision=abc"])
    assert settings.equilibrium.feature_blocks == (0, 2)
    assert config.load(config.dump(settings)) == settings
    assert config.load(config.dump(Settings())) == Settings()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    settings = config.load(path.read_text(), source=path.name)
    assert config.load(config.dump(settings)) == settings


def test_the_default_config_says_what_the_defaults_are() -> None:
    assert CONFIGS
    shipped = config.load((ROOT / "pipelines" / "configs" / "digits_i2v.yaml").read_text())
    assert (shipped.run.name, shipped.storage.uri) == (Settings().run.name, "embedded")


def test_overrides_win_over_the_file_and_the_last_over_the_first() -> None:
    text = "priming: {steps: 5, learning_rate: 0.1}\nrun: {seed: 3}"
    settings = config.load(text, ["priming.steps=6", "priming.steps=7", "training.workers=4"])
    assert (settings.priming.steps, settings.priming.learning_rate) == (7, 0.1)
    assert (settings.run.seed, settings.training.workers) == (3, 4)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("priming.learning_rate=1e-4", 1e-4),
        ("priming.learning_rate=5.0e-4", 5e-4),
        ("storage.uri=s3://bucket/prefix", "s3://bucket/prefix"),
        ("tracking.uri=http://host:5000/a=b", "http://host:5000/a=b"),
        ("evaluation.judge=", ""),
        ("training.compile_blocks=true", True),
        ("model.revision=null", None),
        ("equilibrium.feature_blocks=[3]", (3,)),
    ],
)
def test_values_are_taken_as_a_person_types_them(typed: str, value: object) -> None:
    section, _, name = typed.partition("=")[0].partition(".")
    assert getattr(getattr(config.load("", [typed]), section), name) == value


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("priming.stepz=3", "priming.steps"),
        ("priming.learning_rat=0.1", "priming.learning_rate"),
        ("equilibrium.r1_wieght=1", "equilibrium.r1_weight"),
        ("prming.steps=3", "priming"),
        ("trainig.workers=3", "training"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, nearest: str) -> None:
    line = refusal("", typed)
    assert line.startswith("unknown setting ")
    assert line.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_that_is_near_nothing_lists_what_there_is() -> None:
    line = refusal("zzz: {q: 1}")
    assert "zzz={'q': 1}" in line
    assert f"there are {', '.join(Settings.model_fields)}; --list-settings explains them" in line


@pytest.mark.parametrize(
    ("typed", "allowed"),
    [
        ("priming.steps=-1", "greater than or equal to 0"),
        ("priming.steps=2.5", "valid integer"),
        ("priming.steps='abc'", "valid integer"),
        ("priming.steps=None", "valid integer"),
        ("priming.steps=[1]", "valid integer"),
        ("priming.learning_rate=0", "greater than 0"),
        ("priming.learning_rate=2", "less than or equal to 1"),
        ("priming.learning_rate=inf", "finite"),
        ("priming.input_time_min=1.5", "less than or equal to 1"),
        ("priming.ema_decay=1", "less than 1"),
        ("training.workers=0", "greater than or equal to 1"),
        ("training.compile_blocks='maybe'", "boolean"),
        ("training.activation_checkpointing='some'", "'none', 'full' or 'selective'"),
        ("data.text_tokens=513", "less than or equal to 512"),
        ("data.heldout_fraction=1", "less than 1"),
        ("run.name='Bad Name'", "^[a-z0-9]"),
        ("run.seed=2147483648", "less than 2147483648"),
        ("storage.uri=''", "at least 1 character"),
        ("storage.uri=5", "string"),
        ("model.family='sora'", "'wan'"),
        ("model.task='v2i'", "'i2v' or 't2v'"),
        ("training.precision='fp16'", "'float32' or 'bfloat16'"),
        ("equilibrium.feature_blocks=3", "tuple"),
        ("equilibrium.feature_blocks=[]", "at least 1 item"),
        ("priming.steps=True", "valid integer"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_the_value_and_what_is_allowed(typed: str, allowed: str) -> None:
    key, _, shown = typed.partition("=")
    given = {"None": "null", "inf": ".inf"}.get(shown, shown)
    line = refusal("", f"{key}={given}")
    assert line.startswith(f"{typed} is not allowed: ")
    assert allowed in line


def test_a_list_names_the_entry_that_is_wrong() -> None:
    line = refusal("", "equilibrium.feature_blocks=[1, -2]")
    assert line.startswith("equilibrium.feature_blocks.1=-2 is not allowed")


@pytest.mark.parametrize("section", ["priming", "equilibrium"])
def test_a_window_of_times_must_not_be_empty(section: str) -> None:
    line = refusal("", f"{section}.renoise_time_min=0.5", f"{section}.renoise_time_max=0.4")
    assert f"{section}.renoise_time_min" in line
    assert "below renoise_time_max=0.4" in line


@pytest.mark.parametrize("value", ["0.9605", "0.4", "1.001"])
def test_a_conditioning_time_that_a_scheduler_cannot_say_is_refused(value: str) -> None:
    assert refusal("", f"method.conditioning_time={value}").startswith("method.conditioning_time")
    assert config.load("", ["method.conditioning_time=0.967"]).method.conditioning_time == 0.967


def test_few_steps_times_that_fall_are_refused() -> None:
    line = refusal("", "evaluation.few_steps_time_min=0.5", "evaluation.few_steps_time_max=0.4")
    assert line == "evaluation.few_steps_time_min must not be above few_steps_time_max=0.4, it is 0.5"


@pytest.mark.parametrize("typed", ["priming", "steps=5", "=3", ".steps=3", "priming.=3"])
def test_an_override_without_section_key_and_value_shows_how_to_type_one(typed: str) -> None:
    line = refusal("", typed)
    assert "priming.steps=200" in line or "unknown setting" in line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "the config is not YAML"),
        ("- 1", "it holds one list"),
        ("hello", "it holds one str"),
        ("priming: 3", "priming=3 is not allowed"),
        ("priming: [steps]", "priming=['steps'] is not allowed"),
        ("priming: {steps: }", "priming.steps=None is not allowed"),
    ],
)
def test_a_file_that_is_not_sections_of_settings_is_refused(text: str, part: str) -> None:
    assert part in refusal(text)


def test_an_override_cannot_repair_a_section_that_is_not_one() -> None:
    assert "priming=3 is not allowed" in refusal("priming: 3", "priming.steps=4")


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal("", "run.name=" + 500 * "A")) < 200


def test_settings_never_change_after_loading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().priming.steps = 3  # type: ignore[misc]


def test_every_setting_is_read_by_something() -> None:
    """As ``section.name`` or ``settings.name``: a setting that only its declaration knows would do nothing."""
    read: set[tuple[str, str]] = set()
    for folder in [*READERS, "pipelines"]:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                    owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                    read.add((owner, node.attr))
    unread = [f"{section}.{name}" for section, name in fields() if not {(section, name), ("settings", name)} & read]
    assert unread == []
