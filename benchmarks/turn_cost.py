"""What a turn costs, as a multiple of one plain forward and backward pass of the same transformer; what a run holds.

Turns are timed as the training loop takes them, loss and backward pass, on one torch thread, each between two plain
passes of flow matching on the generator: whatever slows the machine down slows both. The transformer is a small Wan
with an image branch, wide enough that its matrices and not Python are what is timed. Bytes are those of the published
14B image-to-video model on one worker in bfloat16, counted on networks built without weights by the training's code.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from figures import Figure, record, show
from torch import Tensor

from pose_core import config
from pose_core.method.flow import flow_matching
from pose_core.models import small
from pose_core.models.folders import SHIPPED, local_teacher
from pose_core.models.video_model import Condition
from pose_core.runtime.cli import positive_int
from pose_core.settings import Settings
from pose_core.training.build import build_networks, phase_turns
from pose_core.training.plan import PHASES, plan_run
from pose_core.training.state import Batch, Draws, Networks
from pose_core.training.turns import Turn

BARS = {
    "turn_fake": 1.2,
    "turn_priming_generator": 2.2,
    "turn_discriminator": 1.3,
    "turn_equilibrium_generator": 2.4,
}
"""The most each turn may cost; a public DMD2 trainer was measured at 3.3 to 3.9 (generator) and 2.2 to 3.8 (critic)."""
NAMES = {
    ("priming", "fake"): "turn_fake",
    ("priming", "generator"): "turn_priming_generator",
    ("equilibrium", "discriminator"): "turn_discriminator",
    ("equilibrium", "generator"): "turn_equilibrium_generator",
}
ONE_BASE_BAR = 2.5
SHIPPED_LAYERS = 6
"""Blocks of the embedded domain's transformer, for which the default of ``equilibrium.feature_blocks`` is."""
LARGEST = "wan21_i2v_14b"
TEXT_TOKENS, IMAGE_TOKENS, LATENTS = 16, 5, (9, 4, 8)


def main() -> None:
    arguments = parse_arguments()
    load_average = os.getloadavg()[0]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder), arguments.heads, arguments.layers)
        figures = time_turns(Path(folder), arguments)
    figures += count_bytes()
    show(figures)
    if arguments.record:
        conditions = {
            "transformer": f"{arguments.layers} blocks, width {32 * arguments.heads}, image branch",
            "batch": f"{arguments.batch} clips of {LATENTS[0] * LATENTS[1] * LATENTS[2] // 4} tokens",
            "bytes": f"{LARGEST}, bfloat16, one worker: weights, gradients, moments and average a generator parameter",
            "torch_threads": torch.get_num_threads(),
        }
        print(f"recorded in {record('turn_cost', figures, conditions, load_average)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"heads": (12, "attention heads of 32 channels"), "layers": (6, "blocks"), "batch": (4, "clips a turn")}
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=positive_int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=positive_int, default=10, help="figures are medians of as many (default: %(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/turn_cost.json")
    return parser.parse_args()


def save_teacher(folder: Path, heads: int, layers: int) -> None:
    """A transformer with random weights and the image encoder whose tokens it takes, as a diffusers folder."""
    torch.manual_seed(0)
    small.build_transformer(heads=heads, layers=layers).save_pretrained(folder / "transformer")
    small.build_image_encoder()[0].save_pretrained(folder / "image_encoder")


def time_turns(folder: Path, arguments: argparse.Namespace) -> list[Figure]:
    # The default's blocks, at the same depth of however many there are here.
    blocks = [block * arguments.layers // SHIPPED_LAYERS for block in config.load("", []).equilibrium.feature_blocks]
    settings = config.load("", [f"equilibrium.feature_blocks={blocks}"])
    batch, null_text = draw_batch(arguments.batch), torch.zeros(1, TEXT_TOKENS, small.TEXT_WIDTH)
    figures = []
    for phase in PHASES:
        networks = build_networks(phase, settings, folder, folder, null_text, device=torch.device("cpu"))
        for turn in phase_turns(phase, settings):
            name = NAMES[phase, turn.name]
            ratios = measure(networks, turn, batch, arguments.repeats)
            figures.append(Figure(name, median(ratios), "x", BARS[name], len(ratios)))
    return figures


def draw_batch(clips: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    channels, extra = small.LATENT_CHANNELS, small.LATENT_CHANNELS + small.TEMPORAL_FACTOR
    shapes = (channels, *LATENTS), (TEXT_TOKENS, small.TEXT_WIDTH), (IMAGE_TOKENS, small.IMAGE_WIDTH), (extra, *LATENTS)
    x_0, *condition = (torch.randn(clips, *shape, generator=generator) for shape in shapes)
    return Batch(x_0, Condition(*condition))


def measure(networks: Networks, turn: Turn, batch: Batch, repeats: int) -> list[float]:
    """The turn's time over that of the plain passes before and after it, once a repeat; the first is a warm-up."""

    def draws() -> Draws:
        return Draws(0, 0, turn.name, 0, torch.device("cpu"))

    def plain() -> Tensor:
        drawn = draws()
        eps, t = drawn.normal(batch.x_0), drawn.uniform(batch.x_0)
        return flow_matching(networks.v_theta(batch.condition), batch.x_0, eps, t)

    ratios = []
    for _ in range(repeats + 1):
        before = seconds(networks, plain)
        own = seconds(networks, lambda: turn.loss(networks, batch, draws()).total)
        ratios.append(2 * own / (before + seconds(networks, plain)))
    return ratios[1:]


def seconds(networks: Networks, loss: Callable[[], Tensor]) -> float:
    """Wall-clock seconds of a loss and its backward pass."""
    started = perf_counter()
    loss().backward()
    ended = perf_counter()
    for group in networks.groups().values():
        for parameter in group.values():
            parameter.grad = None
    return ended - started


def count_bytes() -> list[Figure]:
    """Bytes a worker holds a parameter of the generator, by phase and by what of the generator learns."""
    text = (SHIPPED / f"{LARGEST}.yaml").read_text()
    figures = []
    for phase in PHASES:
        for mode in ("full", "lora", "one_base"):
            settings: Settings = config.load(text, [f"training.generator={mode}", "training.workers=1"])
            teacher = local_teacher(settings.model.teacher, settings.model.revision, weights=False)
            plan = plan_run(settings, teacher)
            held = plan.workers[phase]
            value = (held.weights + held.gradients + held.moments + held.average) / plan.parameters["teacher"]
            bar = ONE_BASE_BAR if mode == "one_base" else None
            figures.append(Figure(f"bytes_per_parameter_{phase}_{mode}", value, "B", bar, 1))
    return figures


if __name__ == "__main__":
    main()
