"""The command line: what it takes, and one line and an exit code for everything that goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pose_core import config
from pose_core.errors import ClusterError, ConfigError, PoseError, StorageError
from pose_core.runtime import cli

ROOT = Path(__file__).resolve().parents[2]


class Main:
    """A script's ``main``: remembers its arguments, then fails if it is told to."""

    def __init__(self, error: BaseException | None = None):
        self.calls: list[cli.Arguments] = []
        self.error = error

    def __call__(self, arguments: cli.Arguments) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    """Run the command line with these words after the script's name."""

    def run(main: Main, *words: str, **switches: bool) -> None:
        monkeypatch.setattr(sys, "argv", ["full_distill.py", *words])
        cli.run(main, "Distil a video model.", **switches)

    return run


def exits(typed, code: int, main: Main, *words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        typed(main, *words)
    assert caught.value.code == code


def test_without_arguments_it_runs_the_digits_demo(typed) -> None:
    main = Main()
    typed(main)
    (arguments,) = main.calls
    assert arguments.settings.run.name == "digits-i2v"
    assert arguments.settings.model.teacher == "teachers/digits_i2v"
    assert not arguments.debug and not arguments.dry_run and not arguments.rehearse


def test_settings_and_switches_may_come_in_any_order(typed, tmp_path: Path) -> None:
    main, file = Main(), tmp_path / "my.yaml"
    file.write_text("priming: {steps: 7}\nrun: {seed: 3}\n")
    typed(main, "training.workers=4", "--config", str(file), "priming.steps=200", "--dry-run", dry_run=True)
    (arguments,) = main.calls
    settings = arguments.settings
    assert (settings.training.workers, settings.priming.steps, settings.run.seed) == (4, 200, 3)
    assert arguments.dry_run


def test_a_rehearsal_is_asked_for_where_a_script_has_one(typed, capsys: pytest.CaptureFixture[str]) -> None:
    main = Main()
    typed(main, "--rehearse", rehearse=True)
    assert main.calls[0].rehearse and not main.calls[0].dry_run
    exits(typed, 2, main, "--rehearse")


def test_help_tells_how_settings_are_typed(typed, capsys: pytest.CaptureFixture[str]) -> None:
    main = Main()
    exits(typed, 0, main, "--help")
    out = capsys.readouterr().out
    assert "Distil a video model." in out
    assert "section.key=value" in out and "priming.steps=200" in out and "--config" in out
    assert "--dry-run" not in out and "--rehearse" not in out
    assert main.calls == []


def test_listed_settings_can_be_typed_again(typed, capsys: pytest.CaptureFixture[str]) -> None:
    main = Main()
    changed = "run.name=mine", "tracking.profile_steps=[10,12]", "priming.guidance=3", "storage.retry_seconds=5"
    typed(main, "--list-settings", *changed)
    assert main.calls == [], "nothing is run"
    listed = [line.partition("   (")[0] for line in capsys.readouterr().out.splitlines() if "=" in line.split(" ")[0]]
    of_demo = cli.DEFAULT_CONFIG.read_text()
    assert config.load("", listed) == config.load(of_demo, changed), "all of them, as the config and the words say"


def test_listed_settings_say_what_they_mean_and_may_be(typed, capsys: pytest.CaptureFixture[str]) -> None:
    typed(Main(), "--list-settings", "training.workers=4", "training.precision=bfloat16")
    listed = capsys.readouterr().out
    assert "training.workers=4   (at least 1, default 2)\n    FSDP2 ranks." in listed
    assert "training.precision=bfloat16   (float32 or bfloat16, default float32)\n" in listed
    assert "# How both phases are trained: workers, memory and recovery.\n" in listed


def test_version_is_the_packages(typed, capsys: pytest.CaptureFixture[str]) -> None:
    exits(typed, 0, Main(), "--version")
    assert capsys.readouterr().out.split() == ["pose", cli.project_version()]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["priming.stepz=1"], "error: unknown setting priming.stepz=1: did you mean priming.steps?"),
        (["priming.steps=-1"], "error: priming.steps=-1 is not allowed: input should be greater than or equal to 0"),
        (["priming"], "error: cannot read 'priming': settings are typed as section.key=value, e.g. priming.steps=200"),
    ],
)
def test_a_setting_that_cannot_be_used_costs_one_line_and_exit_code_2(
    typed, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    main = Main()
    exits(typed, 2, main, *words)
    assert capsys.readouterr().err == line + "\n"
    assert main.calls == []


def test_a_config_that_cannot_be_read_is_named(typed, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.yaml", "binary.yaml", "."):
        exits(typed, 2, Main(), "--config", str(tmp_path / name))
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert str(tmp_path / name).removesuffix("/.") in err


def test_a_mistake_in_the_config_names_the_file(typed, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("priming: [")
    exits(typed, 2, Main(), "--config", str(tmp_path / "my.yaml"))
    assert f"error: {tmp_path / 'my.yaml'} is not YAML" in capsys.readouterr().err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(typed, capsys) -> None:
    for error, code in ((ConfigError("odd"), 2), (ClusterError("no cluster"), 1)):
        with pytest.raises(SystemExit) as caught:
            typed(Main(error), "--debug")
        assert caught.value.code == code
        shown = capsys.readouterr().err
        assert "Traceback" in shown and shown.endswith(f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ClusterError("a node died"), 1, "error: a node died"),
        (StorageError("no bucket b: create it", in_call=True), 2, "error: no bucket b: create it"),
        (PoseError("odd"), 1, "error: odd"),
    ],
)
def test_an_errors_exit_code_says_whether_the_call_can_correct_it(
    typed, capsys: pytest.CaptureFixture[str], error: PoseError, code: int, line: str
) -> None:
    exits(typed, code, Main(error))
    assert capsys.readouterr().err == line + "\n"


def test_a_full_disk_is_one_line(typed, capsys: pytest.CaptureFixture[str]) -> None:
    exits(typed, 1, Main(OSError(28, "No space left on device", "/data/shard.tar")))
    err = capsys.readouterr().err
    assert "No space left on device" in err and "/data/shard.tar" in err and err.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(typed, capsys: pytest.CaptureFixture[str]) -> None:
    exits(typed, 130, Main(KeyboardInterrupt()))
    assert "the same command goes on" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(typed) -> None:
    with pytest.raises(ZeroDivisionError):
        typed(Main(ZeroDivisionError()))


def test_the_script_itself_refuses_an_unknown_setting_in_one_line(tmp_path: Path) -> None:
    script = ROOT / "pipelines" / "full_distill.py"
    done = subprocess.run(
        [sys.executable, script, "priming.stepz=1"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown setting priming.stepz=1: did you mean priming.steps?\n"
