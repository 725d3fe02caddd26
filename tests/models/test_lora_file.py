"""LoRA files hold a generator's change: exactly at full rank, as well as a rank allows below it, and say how well."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from pose_core.models import lora_file, wan
from pose_core.models.lora_file import (
    BIAS,
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    DOWN,
    UP,
    Lora,
    comfyui_lora,
    extract_lora,
    linear_layers,
    write_lora,
)
from pose_core.models.weights import Weights

WAN = "WanTransformer3DModel"


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> dict[str, Tensor]:
    return dict(Weights(tiny_folder))


@pytest.fixture(scope="module")
def linear(tiny_folder: Path) -> list[str]:
    return linear_layers(wan.load(tiny_folder, meta=True).module)


def moved(base: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """``base`` with noise on the weights named."""
    noise, chosen = torch.Generator().manual_seed(0), set(names)
    return {
        name: value + (0.05 * torch.randn(value.shape, generator=noise) if name in chosen else 0)
        for name, value in base.items()
    }


def norm(values: Iterable[Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in values) ** 0.5


def applied(base: dict[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """``base`` with the LoRA merged in, by the definition."""
    merged = dict(base)
    for name in base:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and f"{layer}.{UP}" in lora:
            merged[name] = base[name] + lora[f"{layer}.{UP}"] @ lora[f"{layer}.{DOWN}"]
        if kind == "bias" and f"{layer}.{BIAS}" in lora:
            merged[name] = base[name] + lora[f"{layer}.{BIAS}"]
    return merged


def test_a_change_of_low_rank_is_found_whole(base: dict[str, Tensor], linear: list[str]) -> None:
    noise = torch.Generator().manual_seed(0)
    tuned = dict(base)
    for layer in linear:
        rows, columns = base[f"{layer}.weight"].shape
        factors = torch.randn(rows, 4, generator=noise), torch.randn(4, columns, generator=noise)
        tuned[f"{layer}.weight"] = base[f"{layer}.weight"] + factors[0] @ factors[1]
        tuned[f"{layer}.bias"] = base[f"{layer}.bias"] + torch.randn(rows, generator=noise)
    lora, report = extract_lora(base, tuned, linear, rank=4)
    assert report.total_error < 1e-4
    for name, value in applied(base, lora).items():
        torch.testing.assert_close(value, tuned[name], rtol=1e-3, atol=1e-4)
    assert {len(value) for name, value in lora.items() if name.endswith(DOWN)} == {4}


def test_the_error_is_the_part_of_the_change_that_is_lost(base: dict[str, Tensor], linear: list[str]) -> None:
    tuned = moved(base, base)
    lora, report = extract_lora(base, tuned, linear, rank=16)
    merged, matrices = applied(base, lora), [f"{layer}.weight" for layer in linear]
    for names, error in ((matrices, report.matrices_error), (list(base), report.total_error)):
        lost, changed = (norm(tuned[n] - found[n] for n in names) for found in (merged, base))
        assert error == pytest.approx(lost / changed, rel=1e-4)
    # The best that rank 16 allows (Eckart and Young), not just some approximation.
    best = [torch.linalg.svdvals(tuned[name] - base[name])[16:] for name in matrices]
    assert report.matrices_error == pytest.approx(norm(best) / norm(tuned[n] - base[n] for n in matrices), rel=1e-4)
    _, lower = extract_lora(base, tuned, linear, rank=8)
    assert report.error_by_rank == pytest.approx({4: report.error_by_rank[4], 8: lower.matrices_error}, rel=1e-4)
    assert 0 < report.matrices_error < lower.matrices_error < report.error_by_rank[4] < 1


def test_what_a_lora_has_no_place_for_counts_as_lost(base: dict[str, Tensor], linear: list[str]) -> None:
    norms = [name for name in base if "norm" in name or "scale_shift" in name or "patch_embedding" in name]
    _, report = extract_lora(base, moved(base, norms), linear, rank=4)
    assert (report.matrices_error, report.total_error) == (0, 1)


def test_what_a_file_holds_beside_the_network_is_left_alone(base: dict[str, Tensor], linear: list[str]) -> None:
    lora, report = extract_lora(base | {"left.over": torch.ones(3)}, moved(base, base), linear, rank=4)
    assert report == extract_lora(base, moved(base, base), linear, rank=4)[1]
    assert not any(name.startswith("left") for name in lora)


def test_no_change_gives_a_lora_that_changes_nothing(base: dict[str, Tensor], linear: list[str]) -> None:
    lora, report = extract_lora(base, base, linear, rank=4)
    assert (report.matrices_error, report.total_error) == (0, 0)
    assert all(torch.equal(value, base[name]) for name, value in applied(base, lora).items())


def test_the_randomised_decomposition_of_large_matrices_comes_close_to_the_best(
    base: dict[str, Tensor], linear: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = moved(base, [f"{layer}.weight" for layer in linear])
    _, exact = extract_lora(base, tuned, linear, rank=8)
    monkeypatch.setattr(lora_file, "EXACT_SVD_SIDE", 16)
    first, randomised = extract_lora(base, tuned, linear, rank=8)
    # White noise has the slowest spectrum there is: the hardest case.
    assert exact.matrices_error <= randomised.matrices_error * (1 + 1e-6) <= exact.matrices_error * 1.01
    again, _ = extract_lora(base, tuned, linear, rank=8)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_both_files_hold_the_same_and_diffusers_own_converter_says_so(
    base: dict[str, Tensor], linear: list[str], tmp_path: Path
) -> None:
    lora, report = extract_lora(base, moved(base, base), linear, rank=4)
    write_lora(lora, tmp_path, WAN, report)
    ours, comfyui = load_file(tmp_path / DIFFUSERS_FILE), load_file(tmp_path / COMFYUI_FILE)
    assert len(ours) == len(comfyui) == 3 * len(linear)
    converted = _convert_non_diffusers_wan_lora_to_diffusers(comfyui)
    assert set(converted) == set(ours)
    assert all(torch.equal(converted[name], ours[name]) for name in ours)
    written = json.loads((tmp_path / "extraction.json").read_text())
    assert (written["rank"], written["total_error"]) == (4, report.total_error)


def test_comfyui_names_are_those_of_the_original_checkpoint() -> None:
    empty = torch.zeros(0)
    names = {
        f"blocks.7.attn1.to_out.0.{DOWN}": "diffusion_model.blocks.7.self_attn.o.lora_A.weight",
        f"blocks.0.attn2.add_k_proj.{UP}": "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight",
        f"blocks.0.ffn.net.2.{BIAS}": "diffusion_model.blocks.0.ffn.2.diff_b",
        f"proj_out.{DOWN}": "diffusion_model.head.head.lora_A.weight",
    }
    assert list(comfyui_lora(dict.fromkeys(names, empty), WAN) or {}) == list(names.values())


def test_a_family_without_known_names_gets_the_diffusers_file_alone(tmp_path: Path) -> None:
    write_lora({f"a.{DOWN}": torch.zeros(1, 2), f"a.{UP}": torch.zeros(2, 1)}, tmp_path, "SomeTransformer")
    assert [path.name for path in tmp_path.iterdir()] == [DIFFUSERS_FILE]
