"""What the driver of a training phase tells its workers.

Light to import: Ray Train's own processes carry it too, and need neither torch nor the models.
"""

from __future__ import annotations

from dataclasses import dataclass

from pose_core.runtime.board import Board
from pose_core.runtime.feeding import TrainingData
from pose_core.runtime.storage import Store
from pose_core.runtime.tracking import Tracker
from pose_core.settings import Settings


@dataclass(frozen=True)
class PhaseJob:
    """Everything a rank needs to know; travels to every worker."""

    phase: str
    settings: Settings
    data: TrainingData
    artifact: Store
    """Where the phase's results go."""
    generator: Store | None
    """Artifact of the earlier phase whose generator this one starts from; None starts from the teacher."""
    tracker: Tracker
    board: Board
    """Where the workers say what they do."""

    @property
    def steps(self) -> int:
        return self.settings.priming.steps if self.phase == "priming" else self.settings.equilibrium.steps

    @property
    def ema_decay(self) -> float:
        return self.settings.priming.ema_decay if self.phase == "priming" else self.settings.equilibrium.ema_decay
