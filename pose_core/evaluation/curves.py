"""Loss curves of a comparison as one picture: a panel a method, because their losses are not the same quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Curves = Sequence[tuple[int, Mapping[str, float]]]
"""Values by name after so many generator updates."""

COLUMNS = 3


def loss_picture(curves: Mapping[str, Sequence[Curves]], file: Path, *, losses: str = "/loss") -> None:
    """Write a PNG: for every method a panel with each of its turns' losses, one line a seed, over generator updates."""
    # Only who draws waits for it.
    from matplotlib.figure import Figure

    lines = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 3 * lines), layout="constrained")
    for index, (method, seeds) in enumerate(curves.items()):
        axes = figure.add_subplot(lines, COLUMNS, index + 1, title=method, xlabel="generator updates", ylabel="loss")
        names = [name for name in _names(seeds) if name.endswith(losses)]
        for number, name in enumerate(names):
            for seed, points in enumerate(seeds):
                line = [(updates, values[name]) for updates, values in points if name in values]
                label = name.removesuffix(losses) if seed == 0 else None
                axes.plot(*zip(*line, strict=True), color=f"C{number}", linewidth=0.8, label=label)
        if names:
            axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def _names(seeds: Sequence[Curves]) -> list[str]:
    return list(dict.fromkeys(name for points in seeds for _, values in points for name in values))
