"""Runs in the vbench package's own environment, not in the project's: scores one folder of videos.

    python -I vbench_program.py REQUEST.json RESULT.json

The request names ``videos``, ``info`` (the suite's entries), ``dimensions``, ``ratio`` and ``device``; the result holds
each dimension's raw score, its detail, and the packages' versions. It is run where the suite lies at
``vbench2_beta_i2v`` and DreamSim's weights at ``models``, as the package expects. It must import nothing of pose_core.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path

PACKAGES = ("vbench", "torch", "torchvision", "numpy", "opencv-python-headless", "decord")


def import_torchvision() -> None:
    """Import torchvision beside a torch without CUDA, too.

    The index's wheel for Linux holds operators for CUDA only; without them the import fails, although VBench uses
    nothing but the transforms. Declaring the two operators that it looks for is enough.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.pose_operators = library  # it must live as long as the process


def stand_in_for_visualizer() -> None:
    """Camera motion imports a class that draws tracks, which the wheel leaves out and only ``save_video`` would use."""
    name = "vbench2_beta_i2v.third_party.cotracker.utils.visualizer"
    module = types.ModuleType(name)
    module.Visualizer = None  # type: ignore[attr-defined]
    sys.modules[name] = module


def score(request: dict) -> dict:
    """What VBench-I2V makes of the request, dimension by dimension."""
    from vbench2_beta_i2v import VBenchI2V

    suite = VBenchI2V(request["device"], request["info"], str(Path("scores").absolute()))
    scores, details = {}, {}
    for dimension in request["dimensions"]:
        # ``local`` makes it look for weights where they were put, not download them.
        suite.evaluate(
            videos_path=request["videos"],
            name=dimension,
            dimension_list=[dimension],
            local=True,
            resolution=request["ratio"],
            imaging_quality_preprocessing_mode="longer",
        )
        details[dimension] = json.loads(Path(f"scores/{dimension}_eval_results.json").read_text())[dimension]
        scores[dimension] = float(details[dimension][0])
    return {"scores": scores, "details": details}


def main(request: str, result: str) -> None:
    import_torchvision()
    stand_in_for_visualizer()
    found = score(json.loads(Path(request).read_text()))
    found["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
