"""LoRA files of a generator that people can load elsewhere: diffusers' format, and the names ComfyUI knows.

The matrices are those that training left as an adapter, or are extracted from a fully trained generator: the best
approximation of its change by matrices of low rank (truncated SVD).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights(folder)`` looks for."""
COMFYUI_FILE = "comfyui_lora.safetensors"
DOWN, UP, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EXACT_SVD_SIDE = 1024
"""Shorter side up to which a matrix is decomposed exactly; of larger ones a randomised SVD finds the largest parts."""
EXTRA_DIRECTIONS, POWER_ITERATIONS = 16, 4

WAN_NAMES = (
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("proj_out", "head.head"),
)
COMFYUI_NAMES = {"WanTransformer3DModel": WAN_NAMES, "LTXVideoTransformer3DModel": ()}
"""Transformer class: how a module is called there and in the original checkpoint, which ComfyUI's names follow."""

Lora = dict[str, Tensor]
"""``<module>.lora_A.weight [r, in]`` and ``<module>.lora_B.weight [out, r]``, perhaps ``<module>.lora_B.bias [out]``,
by the module's name in diffusers; the change is ``B A``, without a scale."""


@dataclass(frozen=True)
class Extraction:
    """How much of a generator's change its extracted LoRA misses, as a Frobenius norm relative to the change's."""

    rank: int
    matrices_error: float
    """Of the matrices that a LoRA covers."""
    total_error: float
    """Of all weights: what a LoRA has no place for (norms, convolutions, modulation tables) counts as lost."""
    error_by_rank: dict[int, float] = field(default_factory=dict)
    """``matrices_error`` that lower ranks would have."""


def trained_lora(file: Path) -> Lora:
    """The adapter that ``lora.Role.save`` left in ``file``, as it was trained."""
    return load_file(file)


def linear_layers(module: nn.Module) -> list[str]:
    """Names of a network's linear layers, those a LoRA can change; the network may be on the meta device."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def extract_lora(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], linear: Iterable[str], rank: int
) -> tuple[Lora, Extraction]:
    """The LoRA of ``rank`` that is nearest to the change from ``base`` to ``tuned``, and how near it is.

    Both hold a network's full weights by name; ``linear`` names its linear layers. Biases of linear layers, where all
    have one, are taken along whole. One matrix at a time is in memory, on the GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = set(linear)
    with_bias = all(f"{layer}.bias" in base for layer in layers)
    lora: Lora = {}
    changed = lost = covered = uncovered = 0.0
    spectrum = torch.zeros(rank, dtype=torch.float64)
    for name in tuned:  # published files may hold more than the network has
        change = tuned[name].to(device, torch.float32) - base[name].to(device, torch.float32)
        energy = float(change.double().square().sum())
        changed += energy
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == "weight":
            lora[f"{layer}.{DOWN}"], lora[f"{layer}.{UP}"], values = _factors(change, rank)
            rest = change - lora[f"{layer}.{UP}"] @ lora[f"{layer}.{DOWN}"]
            lost += float(rest.double().square().sum())
            covered += energy
            spectrum[: len(values)] += values.double().square().cpu()
        elif layer in layers and kind == "bias" and with_bias:
            lora[f"{layer}.{BIAS}"] = change
        else:
            uncovered += energy
    kept = spectrum.cumsum(0).tolist()
    by_rank = {each: _share(covered - kept[each - 1], covered) for each in _lower_ranks(rank)}
    report = Extraction(rank, _share(lost, covered), _share(lost + uncovered, changed), by_rank)
    return {name: value.cpu().contiguous() for name, value in lora.items()}, report


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A [rank, in]``, ``B [out, rank]`` and the singular values kept of ``change [out, in]``.

    Small matrices are filled up with zeros: some loaders scale a file's layers by one and the same rank.
    """
    side = min(change.shape)
    if side <= max(EXACT_SVD_SIDE, rank):
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        directions = min(rank + EXTRA_DIRECTIONS, side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change, q=directions, niter=POWER_ITERATIONS)
        right = right.T
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    root, missing = values.sqrt(), rank - len(values)
    return F.pad(root[:, None] * right, (0, 0, 0, missing)), F.pad(left * root, (0, missing)), values


def _lower_ranks(rank: int) -> list[int]:
    """Powers of two from 4 on, below ``rank``."""
    return [2**power for power in range(2, rank.bit_length()) if 2**power < rank]


def _share(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0


def comfyui_lora(lora: Lora, transformer_class: str) -> Lora | None:
    """``lora`` under the names that ComfyUI's loaders use; None for a family whose names are not known."""
    names = COMFYUI_NAMES.get(transformer_class)
    if names is None:
        return None
    renamed = {}
    for name, value in lora.items():
        path = f".{name}"
        for ours, theirs in (*names, (BIAS, "diff_b")):
            path = f"{path}.".replace(f".{ours}.", f".{theirs}.", 1).removesuffix(".")
        renamed[f"diffusion_model{path}"] = value
    return renamed


def write_lora(lora: Lora, folder: Path, transformer_class: str, extraction: Extraction | None = None) -> None:
    """Write ``lora`` below ``folder`` in diffusers' format and, where its names are known, in ComfyUI's.

    ``extraction.json`` says how near it is to the generator it was taken from, if it was not trained as a LoRA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    save_file({f"transformer.{name}": value for name, value in lora.items()}, folder / DIFFUSERS_FILE, metadata)
    if (renamed := comfyui_lora(lora, transformer_class)) is not None:
        save_file(renamed, folder / COMFYUI_FILE, metadata)
    if extraction is not None:
        (folder / "extraction.json").write_text(json.dumps(asdict(extraction), indent=2) + "\n")
