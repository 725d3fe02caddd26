"""Peak host memory of each of two FSDP2 ranks while they load one transformer, over what its folder's size allows.

The folder is made for the purpose: a Wan transformer with random float32 weights, in several safetensors files. Every
rank's shard is compared with the files afterwards, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from figures import Figure, record, show
from loopback import run_as_rank
from torch.distributed.tensor import DTensor

from pose_core.models import families
from pose_core.models.weights import Weights
from pose_core.settings import TrainingSettings
from pose_core.training import parallel

RANKS = 2
SHARE, FIXED_BYTES = 0.6, 300e6
"""The bar: this share of the folder's size, and so many bytes for the process itself."""
MEGABYTE = 1e6


def main() -> None:
    arguments = parse_arguments()
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_folder(folder, arguments.layers)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found = measure(folder)
    bar, most = SHARE * size + FIXED_BYTES, {key: max(each[key] for each in found) for key in found[0]}
    taken = most["peak"] - most["before"]
    figures = [
        Figure("loading_peak_over_bar", most["peak"] / bar, "x", 1.0, RANKS),
        Figure("loading_peak_a_rank", most["peak"] / MEGABYTE, "MB", bar / MEGABYTE, RANKS),
        Figure("libraries_a_rank", most["before"] / MEGABYTE, "MB", None, RANKS),
        Figure("loading_alone_a_rank", taken / MEGABYTE, "MB", SHARE * size / MEGABYTE, RANKS),
        Figure("loaded_proportional_a_rank", most["proportional"] / MEGABYTE, "MB", None, RANKS),
        Figure("folder_size", size / MEGABYTE, "MB", None, 1),
        Figure("differing_weights", sum(each["differing"] for each in found), "weights", 0.0, 1),
    ]
    show(figures)
    if arguments.record:
        conditions = {"transformer": f"{arguments.layers} blocks of Wan 2.1 1.3B, float32", "ranks": RANKS}
        print(f"recorded in {record('loading_memory', figures, conditions, load_average)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    # The ranks import this file, too: the command line's libraries, storage among them, would count as theirs, and so
    # would what diffusers imports when it is not `pose_core.models` that imports it first.
    from pose_core.runtime.cli import positive_int

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=positive_int, default=5, help="blocks of 190 MB (default: %(default)s, about 1 GB)"
    )
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/loading_memory.json")
    return parser.parse_args()


def make_folder(folder: Path, layers: int) -> None:
    """A transformer like that of Wan 2.1 1.3B, with fewer blocks."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers, in_channels=16
    )
    module.save_pretrained(folder / "transformer", max_shard_size="400MB")


def measure(folder: Path) -> list[dict[str, float]]:
    """What each rank found, in a fresh process each."""
    found: SimpleQueue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (folder, found), nprocs=RANKS)
    return [found.get() for _ in range(RANKS)]


def _rank(rank: int, folder: Path, found: Any) -> None:
    run_as_rank(rank, RANKS, folder, lambda: found.put(load(folder)))


def load(folder: Path) -> dict[str, float]:
    """This rank's shards of the teacher, and what they cost it."""
    family = families.get("wan")
    before = peak_bytes()
    model = family.load_teacher(folder, meta=True)
    training = TrainingSettings()
    parallel.shard_model(model, training, parallel.build_mesh(training, torch.device("cpu")))
    found: dict[str, float] = {"before": before, "peak": peak_bytes(), "proportional": proportional_bytes()}
    return found | {"differing": count_differing(model.module, folder)}


def peak_bytes() -> int:
    """The most memory this process ever held, mapped files included."""
    return _kernel_says("status", "VmHWM")


def proportional_bytes() -> int:
    """What this process holds now; of a page that n processes share, the libraries' code above all, an n-th."""
    return _kernel_says("smaps_rollup", "Pss")


def _kernel_says(file: str, name: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def count_differing(module: torch.nn.Module, folder: Path) -> int:
    """Weights of which this rank's rows are not those of the files."""
    weights, differing = Weights(folder), 0
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        mine, whole = parameter.to_local(), torch.empty(parameter.shape)
        weights.read(name, whole)
        first = parallel.rank() * -(-len(whole) // RANKS)
        differing += not torch.equal(mine, whole[first : first + len(mine)])
    return differing


if __name__ == "__main__":
    main()
