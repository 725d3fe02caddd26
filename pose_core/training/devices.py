"""What GPUs can compute at most, for the utilisation that a run reaches."""

from __future__ import annotations

PEAKS: dict[str, dict[str, float]] = {
    "GB200": {"bfloat16": 2500.0, "float32": 80.0},
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200 NVL": {"bfloat16": 835.5, "float32": 60.0},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.5, "float32": 60.0},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "H800": {"bfloat16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "A800": {"bfloat16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.05, "float32": 91.6},
    "L40": {"bfloat16": 181.05, "float32": 90.5},
    "L4": {"bfloat16": 121.0, "float32": 30.3},
    "A10G": {"bfloat16": 70.0, "float32": 35.0},
    "MI300X": {"bfloat16": 1307.4, "float32": 163.4},
}
"""Dense TFLOP/s by precision, of devices whose name as torch tells it holds the key; the first that does counts.

From the makers' data sheets: NVIDIA DGX B200 and GB200 NVL72, H200, H100, A100, L40S, L40, L4 (halved where a sheet
gives figures with sparsity), AWS for the A10G, AMD for the MI300X. ``float32`` is without TF32, which torch does not
use unless told to.
"""


def peak_teraflops(device_name: str, precision: str) -> float | None:
    """Dense TFLOP/s of a device at ``float32`` or ``bfloat16``; None where it is not known."""
    return next((peaks[precision] for name, peaks in PEAKS.items() if name in device_name), None)
