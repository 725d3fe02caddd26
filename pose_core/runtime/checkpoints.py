"""A phase's checkpoints in object storage: which of them can be trusted, which are kept, and what each stands for.

Each is a folder ``step-0000050-<attempt>`` below ``checkpoints/`` of the phase's artifact. Its ``manifest.json`` is
written last and lists every object with its size: a folder without one, or with an object missing, is a leftover that
nothing reads. An attempt writes to folders of its own, so one that is still alive somewhere cannot spoil another's.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch

from pose_core.errors import StorageError
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store
from pose_core.training import checkpoint, parallel
from pose_core.training.state import Networks

FOLDER, MANIFEST = "checkpoints", "manifest.json"
_WRITE_SECONDS = 1800.0
"""How long ranks wait for the slowest of them to write, besides what the store may be away."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as its manifest describes it."""

    folder: str
    step: int
    good_step: int
    """Its step, or 0 where an alarm rang."""
    armed: list[str]
    """Figures that alarms watch from then on."""
    position: str
    """Where its data go on, as JSON."""
    objects: dict[str, int] = field(default_factory=dict)
    """What it consists of, with sizes in bytes."""


class Kept:
    """The committed checkpoints of a phase, oldest first; one process looks after them."""

    def __init__(self, files: SteadyFiles, keep: int):
        self.files, self.keep = files, keep
        self.all = self._read()

    def commit(self, saved: Saved) -> None:
        """Make ``saved`` a checkpoint, and remove those that are not kept any more.

        The ``keep`` newest without an alarm stay, and the newest of all; where fewer had none, newest others, too.
        """
        self.files.write(f"{saved.folder}/{MANIFEST}", (json.dumps(asdict(saved), indent=2) + "\n").encode())
        self.all.append(saved)
        stay = sorted(self.all, key=lambda each: (each.good_step, each.step))[-self.keep :]
        for each in [each for each in self.all[:-1] if each not in stay]:
            if self._remove(each.folder):
                self.all.remove(each)

    def remove_leftovers(self) -> None:
        """Remove whatever is no checkpoint: attempts that were cut off while they wrote."""
        known = {each.folder for each in self.all}
        for folder in sorted({stored.key.partition("/")[0] for stored in self.files.stored()} - known):
            self._remove(folder)

    def _read(self) -> list[Saved]:
        sizes: dict[str, dict[str, int]] = defaultdict(dict)
        for stored in self.files.stored():
            folder, _, key = stored.key.partition("/")
            sizes[folder][key] = stored.size
        found = [self._manifest(folder) for folder, objects in sizes.items() if MANIFEST in objects]
        whole = [each for each in found if each and each.objects.items() <= sizes[each.folder].items()]
        return sorted(whole, key=lambda each: (each.step, each.folder))

    def _manifest(self, folder: str) -> Saved | None:
        try:
            saved = Saved(**json.loads(self.files.read(f"{folder}/{MANIFEST}")))
        except (ValueError, TypeError):
            return None
        return saved if saved.folder == folder else None

    def _remove(self, folder: str) -> bool:
        try:
            # The manifest first: what is cut off here must not pass for a checkpoint.
            self.files.store.delete_prefix(f"{folder}/{MANIFEST}")
            self.files.store.delete_prefix(folder)
        except StorageError as error:
            _log.warning("%s; the old checkpoint %s is removed later", error, folder)
            return False
        return True


def last_step(artifact: Store, retry_seconds: float) -> int:
    """The step of a phase's newest checkpoint; 0 without one."""
    return max((each.step for each in Kept(SteadyFiles(artifact.child(FOLDER), retry_seconds), 1).all), default=0)


class PhaseCheckpoints:
    """What a rank of a phase saves and restores; every rank must make one and call its methods in the same order."""

    def __init__(self, artifact: Store, keep: int, retry_seconds: float):
        self._files = SteadyFiles(artifact.child(FOLDER), retry_seconds)
        self._saver = checkpoint.Saver(_WRITE_SECONDS + retry_seconds)
        self._kept: Kept | None = None
        if parallel.rank() == 0:
            self._kept = Kept(self._files, keep)
            self._kept.remove_leftovers()
        self._attempt = self._saver.from_first_rank(uuid.uuid4().hex[:8])
        self.waited_seconds = 0.0
        """How long saving has held up the training."""

    def newest(self) -> Saved | None:
        """The newest checkpoint."""
        return self._choose(lambda kept: kept[-1])

    def newest_good(self) -> Saved | None:
        """The newest that no alarm rang at."""
        best = self._choose(lambda kept: max(kept, key=lambda each: each.good_step))
        return best if best and best.good_step else None

    def load(self, saved: Saved, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> int:
        """Restore networks and optimisers in place; the number of finished steps.

        Raises:
            CheckpointError: it is damaged, or of other networks.
            StorageGoneError: the store stayed away.
        """
        return checkpoint.load(self._files.child(saved.folder), networks, optimizers)

    def save(
        self,
        step: int,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        *,
        good_step: int,
        armed: list[str],
        position: str,
        before_commit: Callable[[], None],
    ) -> None:
        """Begin to save; what is given may change as soon as this returns.

        ``before_commit`` is called on the first rank, in the background, before the checkpoint counts.

        Raises:
            PoseError: why the checkpoint before this one could not be saved.
        """
        started = time.monotonic()
        saved = Saved(f"step-{step:07d}-{self._attempt}", step, good_step, armed, position)

        def commit(objects: dict[str, int]) -> None:
            assert self._kept is not None
            before_commit()
            self._kept.commit(replace(saved, objects=objects))

        self._saver.start(self._files.child(saved.folder), step, networks, optimizers, commit)
        self.waited_seconds += time.monotonic() - started

    def wait(self) -> None:
        """Return once what was begun is committed.

        Raises:
            PoseError: why it could not be.
        """
        started = time.monotonic()
        self._saver.wait()
        self.waited_seconds += time.monotonic() - started

    def _choose(self, choice: Callable[[list[Saved]], Saved]) -> Saved | None:
        self.wait()
        mine = choice(self._kept.all) if self._kept and self._kept.all else None
        return self._saver.from_first_rank(mine)
