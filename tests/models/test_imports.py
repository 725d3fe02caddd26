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
