"""Compare folders of videos by how they move: dynamic degree, drift from the first frame, flicker.

    python pipelines/motion.py teacher_videos generator_videos --json motion.json

Runs anywhere, without a network or weights; the first folder is what the others are compared with, so that a generator
that has collapsed to still pictures is seen.
"""

import argparse
import json
from pathlib import Path

from pose_core.runtime import cli
from pose_core.runtime.motion_files import compare_folders, report
from pose_core.runtime.progress import display


def main(typed: argparse.Namespace) -> None:
    shown = display()
    try:
        figures = compare_folders(typed.folders, typed.images, shown.update)
    finally:
        shown.close()
    print(report(figures))
    if typed.json:
        typed.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of videos, searched deeply")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="first frames that the videos were made from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and every log line")
    return parser.parse_args()


if __name__ == "__main__":
    typed = parse()
    with cli.errors_for_people(typed.debug):
        main(typed)
