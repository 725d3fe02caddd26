"""What a person sees of a stage: a bar on a terminal, few lines elsewhere, and events that carry it out of a job."""

from __future__ import annotations

import json

import pytest

from pose_core.runtime import progress
from pose_core.runtime.progress import EVENT_PREFIX, EVENTS_VARIABLE, Events, Terminal, display, replay


class Recorder:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def update(self, stage: str, done: int, total: int, **values: float) -> None:
        self.told.append((stage, done, total, values))

    def note(self, text: str) -> None:
        self.told.append((text,))

    def close(self) -> None:
        self.told.append(())


def test_events_arrive_at_the_tailers_display_as_they_were_sent(capsys: pytest.CaptureFixture[str]) -> None:
    events, recorder = Events(), Recorder()
    events.update("stability_priming", 3, 150, loss=0.25, norm=1e-9)
    events.note('2 clips were skipped: see [quarantine]\nand "this"')
    events.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert [replay(line, recorder) for line in lines] == [True, True]
    assert recorder.told == [
        ("stability_priming", 3, 150, {"loss": 0.25, "norm": 1e-9}),
        ('2 clips were skipped: see [quarantine]\nand "this"',),
    ]


@pytest.mark.parametrize("line", ["", "loss 0.25", EVENT_PREFIX + "{half a li", "x " + EVENT_PREFIX + "{}"])
def test_other_lines_of_a_log_are_left_to_the_tailer(line: str) -> None:
    recorder = Recorder()
    assert not replay(line, recorder)
    assert recorder.told == []


def test_an_event_is_one_line_of_json_behind_its_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    Events().update("prepare_data", 1, 2)
    line = capsys.readouterr().out
    assert line.startswith(EVENT_PREFIX) and line.endswith("\n")
    assert json.loads(line.removeprefix(EVENT_PREFIX))["stage"] == "prepare_data"


def test_without_a_terminal_there_is_a_line_at_every_tenth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    terminal = Terminal()
    for step in range(101):
        terminal.update("priming", step, 100, loss=step / 1000)
    terminal.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(0, 101, 10)]
    assert lines[5].split()[0] == "priming" and lines[5].endswith("loss 0.05")


def test_stages_count_their_tenths_apart_and_an_empty_one_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.update("first", 5, 10)
    terminal.update("second", 5, 10)
    terminal.update("empty", 0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["first", "second", "empty"]


def test_notes_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[red] is not markup, 1e-4 is not coloured: s3://bucket/run " + 40 * "long "
    Terminal().note(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_terminal_draws_a_bar_with_the_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = Terminal()
    terminal.update("priming", 30, 150, loss=0.25)
    terminal.close()
    out = capsys.readouterr().out
    assert "priming" in out and "30/150" in out and "loss 0.25" in out


def test_a_job_prints_events_and_a_person_gets_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVENTS_VARIABLE, "1")
    assert isinstance(display(), Events)
    monkeypatch.delenv(EVENTS_VARIABLE)
    assert isinstance(display(), progress.Terminal)
