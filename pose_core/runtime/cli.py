"""The command line that every script in ``pipelines/`` shares: arguments, settings, errors and exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pose_core import config
from pose_core.errors import ConfigError, PoseError
from pose_core.runtime import settings_list
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

DEFAULT_CONFIG = Path(__file__).parents[2] / "pipelines" / "configs" / "digits_i2v.yaml"


@dataclass(frozen=True)
class Arguments:
    """What was typed: the settings after all overrides, and the switches."""

    settings: Settings
    debug: bool
    dry_run: bool = False
    rehearse: bool = False
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    """What a script has of its own."""


def run(
    main: Callable[[Arguments], None],
    description: str,
    *,
    dry_run: bool = False,
    rehearse: bool = False,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Parse the command line, call ``main`` and turn errors into one line and an exit code.

    ``dry_run`` and ``rehearse`` say whether the script has that switch; ``options`` adds arguments of its own.
    """
    parser = _parser(description, dry_run, rehearse)
    if options is not None:
        options(parser)
    typed = parser.parse_intermixed_args()
    with errors_for_people(typed.debug):
        settings = config.load(_read(typed.config), typed.settings, source=str(typed.config))
        if typed.list_settings:
            return print(settings_list.listing(settings))
        switches = getattr(typed, "dry_run", False), getattr(typed, "rehearse", False)
        main(Arguments(settings, typed.debug, *switches, typed))


@contextmanager
def errors_for_people(debug: bool) -> Iterator[None]:
    """Inside, libraries keep quiet and an error becomes one line and an exit code."""
    _quiet(debug)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except PoseError as error:
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where} (--debug shows where it happened)", 1, debug)


def _fail(message: str, exit_code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(exit_code) from None


def _parser(description: str, dry_run: bool, rehearse: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Settings are typed as section.key=value, e.g. priming.steps=200 training.workers=4;\n"
        "--list-settings shows them all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that replace the config's")
    parser.add_argument(
        "--config", default=str(DEFAULT_CONFIG), help="YAML file, or its s3:// address (default: the digits demo)"
    )
    parser.add_argument(
        "--list-settings", action="store_true", help="print every setting with its value, range and meaning, and stop"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and every log line")
    parser.add_argument("--version", action="version", version=f"pose {project_version()}")
    if dry_run:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check settings, storage and cluster, print what every stage would hold, and stop",
        )
    if rehearse:
        parser.add_argument(
            "--rehearse",
            action="store_true",
            help="run the same settings on this machine's CPU with a small model, kill a worker on the way, and stop",
        )
    return parser


def counts(text: str) -> list[int]:
    """An argparse type: whole numbers of at least 1, with commas between them."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers of at least 1, such as 8,16,32")
    return [int(part) for part in parts]


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def project_version() -> str:
    """The installed version, or ``unknown`` for a checkout that was never installed."""
    try:
        return version("pose")
    except PackageNotFoundError:
        return "unknown"


def _read(location: str) -> str:
    """The text of a config file, local or in object storage."""
    if "://" in location:
        folder, _, name = location.rpartition("/")
        return Store.open(folder).read_text(name)
    try:
        return Path(location).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"--config {location} cannot be read: {reason}; see pipelines/configs for examples") from None


def _quiet(debug: bool) -> None:
    """Keep the libraries' chatter out of the way of what a person should read."""
    if debug:
        return
    warnings.filterwarnings("ignore")
    for name in ("ray", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
