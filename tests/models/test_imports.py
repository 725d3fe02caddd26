"""The models' libraries come without those that they would use if only they found them."""

from __future__ import annotations

import subprocess
import sys

LOOKS = """
import sys
from pose_core.models import families
for name in families.FILES:
    families.get(name)
print(sorted({"scipy", "boto3", "transformers", "peft"} & set(sys.modules)))
import boto3, scipy.stats
print(scipy.stats.t.ppf(0.5, 2), boto3.__name__)
"""


def printed(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def test_families_import_no_scipy_and_no_boto3_and_hide_neither_from_others() -> None:
    assert printed(LOOKS) == ["['peft', 'transformers']", "0.0 boto3"]


def test_what_was_imported_before_stays() -> None:
    assert printed(
        "import scipy, sys; before = scipy; import pose_core.models; print(sys.modules['scipy'] is before)"
    ) == ["True"]


def test_of_the_models_that_diffusers_knows_only_those_asked_for_are_imported() -> None:
    assert printed(
        "import sys, pose_core.models.wan as wan\n"
        "other = 'diffusers.models.transformers.cogvideox_transformer_3d'\n"
        "print(other in sys.modules, wan.WanTransformer3DModel.__module__)\n"
        "from diffusers.models.transformers import CogVideoXTransformer3DModel\n"
        "import diffusers\n"
        "print(diffusers.CogVideoXTransformer3DModel is CogVideoXTransformer3DModel, other in sys.modules)\n"
        "print(diffusers.models.transformers.WanTransformer3DModel is wan.WanTransformer3DModel)\n"
        "print(hasattr(diffusers.models.transformers, 'Nothing'))"
    ) == ["False diffusers.models.transformers.transformer_wan", "True True", "True", "False"]


def test_packages_that_were_imported_before_stay() -> None:
    assert printed(
        "import diffusers.models.autoencoders as before, sys; import pose_core.models.parts\n"
        "print(sys.modules['diffusers.models.autoencoders'] is before)"
    ) == ["True"]
