"""What can go wrong, in words for the person at the keyboard.

Every message names the thing, the value and the remedy in one line. The command line prints it without a traceback
(``--debug`` shows one) and exits with the error's code: 2 where the person can correct it in the call, 1 otherwise.
"""


class PoseError(Exception):
    """Root of all errors this project raises on purpose.

    ``in_call=True`` says that another argument, setting or environment variable in the same call would help (exit 2).
    """

    exit_code = 1

    def __init__(self, message: str, *, in_call: bool | None = None):
        super().__init__(message)
        if in_call is not None:
            self.exit_code = 2 if in_call else 1


class ConfigError(PoseError):
    """A setting or an argument that the person who typed it can correct."""

    exit_code = 2


class DataError(PoseError):
    """Videos, captions or prepared shards that cannot be used."""


class StorageError(PoseError):
    """The object store or folder cannot be reached, read or written.

    ``passing`` says that the same request may do better later, or with credentials read anew.
    """

    passing = False


class StorageGoneError(StorageError):
    """The store was given all the time that the settings allow; starting again would only wait again."""


class ReplacedError(StorageError):
    """An object is not the one that reading it began with."""


class CheckpointError(PoseError):
    """Weights or training state that are missing, partial or do not fit."""


class ClusterError(PoseError):
    """Ray cannot be reached or started, or a job on it failed."""
