"""Say what a run needs before money is spent: memory a GPU by role, what fits, hours and price, by number of GPUs.

Every phase is simulated, a step of it with the real networks, sharding and turns, on tensors that hold no numbers:
neither weights nor GPUs are needed.
"""

import argparse

from pose_core.runtime import cli
from pose_core.runtime.planning import Rates, longest_clip, plan


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", type=cli.counts, default=None, help="numbers of GPUs, e.g. 8,16,32 (training.workers)"
    )
    for name, default, meaning in (
        ("memory", 80.0, "GiB of one GPU"),
        ("reserve", 0.08, "share of it kept free for the driver, communication and fragmentation"),
        ("teraflops", 989.0, "of one GPU at the precision of computation"),
        ("utilisation", 0.4, "share of them that is reached"),
        ("gigabytes", 50.0, "that one GPU receives a second from the others"),
        ("price", 2.5, "of one GPU for an hour"),
    ):
        help_text = f"{meaning} (default: %(default)g)"
        parser.add_argument(f"--gpu-{name}", type=cli.positive, default=default, metavar="NUMBER", help=help_text)
    parser.add_argument("--longest-clip", action="store_true", help="look for the most frames that fit instead")
    parser.add_argument("--no-suggestions", action="store_true", help="do not look for what makes a misfit fit")


def main(arguments: cli.Arguments) -> None:
    typed = arguments.options
    rates = Rates(
        memory=typed.gpu_memory,
        reserve=typed.gpu_reserve,
        teraflops=typed.gpu_teraflops,
        utilisation=typed.gpu_utilisation,
        gigabytes=typed.gpu_gigabytes,
        price=typed.gpu_price,
    )
    if typed.longest_clip:
        return longest_clip(arguments.settings, rates)
    counts = typed.gpus or [arguments.settings.training.workers]
    plan(arguments.settings, counts, rates, suggest=not typed.no_suggestions)


if __name__ == "__main__":
    cli.run(main, __doc__, options=options)
