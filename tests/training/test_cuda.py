"""What holds on the CPU holds on a GPU, through NCCL and FSDP2 as a worker uses them; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from phases import CASES, PHASES, build_phase, differing, files, load, save

from pose_core.models import families
from pose_core.training import checkpoint, collectives, loop
from pose_core.training.telemetry import PARTS, Memory, StepTimes, clock_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
]
GPU = torch.device("cuda", 0)
TOLERANCE = 1e-3
"""Relative, for losses and gradient norms of the first steps: kernels add up in other orders."""


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("ranks")
    backends = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backends, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_steps_report_what_they_report_on_the_cpu(tiny_folder: Path, name: str) -> None:
    there, here = build_phase(name, tiny_folder), build_phase(name, tiny_folder, sharded=True, device=GPU)
    assert all(value.device == GPU for value in here.tensors().values())
    for phase in (there, here):
        phase.train(0, 2)
    for on_cpu, on_gpu in zip(there.history, here.history, strict=True):
        for curve, value in on_cpu.items():
            if curve.endswith(("/loss", "/gradient_norm")):
                assert on_gpu[curve] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), curve


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("kept", ["full", "selective"])
def test_recomputed_activations_give_the_same_losses(tiny_folder: Path, name: str, kept: str) -> None:
    options = ["training.precision=bfloat16"]
    plain = build_phase(name, tiny_folder, *options, sharded=True, device=GPU)
    again = build_phase(
        name, tiny_folder, *options, f"training.activation_checkpointing={kept}", sharded=True, device=GPU
    )
    for phase in (plain, again):
        phase.train(0, 1)
    for curve, value in plain.history[0].items():
        if curve.endswith("/loss"):
            assert again.history[0][curve] == pytest.approx(value, rel=0.02, abs=1e-3), curve


@pytest.mark.parametrize("name", PHASES)
def test_compiled_blocks_give_the_same_losses(tiny_folder: Path, name: str) -> None:
    plain = build_phase(name, tiny_folder, sharded=True, device=GPU)
    compiled = build_phase(name, tiny_folder, "training.compile_blocks=true", sharded=True, device=GPU)
    for phase in (plain, compiled):
        phase.train(0, 1)
    for curve, value in plain.history[0].items():
        if curve.endswith("/loss"):
            assert compiled.history[0][curve] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), curve


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_the_gpu_is_restored_bit_by_bit(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    phase, restored = (build_phase(name, tiny_folder, sharded=True, device=GPU) for _ in range(2))
    phase.train(0, 2)
    save(tmp_path / "saved", 2, phase)
    assert load(tmp_path / "saved", restored) == 2
    assert differing(phase.tensors(), restored.tensors()) == []


def test_what_is_staged_is_the_state_of_its_step(tiny_folder: Path, tmp_path: Path) -> None:
    """Steps that run while a checkpoint is written do not reach into it."""
    phase, restored = (build_phase("priming", tiny_folder, sharded=True, device=GPU) for _ in range(2))
    phase.train(0, 1)
    saver = checkpoint.Saver()
    before = phase.tensors()
    saver.start(files(tmp_path), 1, phase.networks, phase.optimizers, commit=lambda objects: None)
    phase.train(1, 3)
    saver.wait()
    load(tmp_path, restored)
    assert differing(before, restored.tensors()) == []


@pytest.mark.parametrize("name", PHASES)
def test_time_and_memory_are_told(tiny_folder: Path, name: str) -> None:
    phase = build_phase(name, tiny_folder, sharded=True, device=GPU)
    groups = phase.networks.groups()
    times = StepTimes(clock_of(GPU))
    memory = Memory(phase.networks, phase.optimizers, [loop.updated_by(turn, groups) for turn in phase.turns], GPU)
    memory.begin_step()
    with collectives.recorded(times.part, GPU):
        phase.train(0, 2, record=times.part)
    memory.end_step()
    times.end_step()
    torch.cuda.synchronize(GPU)
    times.end_step()
    steps, seconds = times.take()
    assert steps >= 1 and set(seconds) == set(PARTS)
    assert all(seconds[part] > 0 for part in ("forward", "backward", "optimiser", "communication"))
    held = memory.roles()
    assert held["activations"] > 0
    assert sum(held.values()) == torch.cuda.max_memory_allocated(GPU)


def test_a_video_is_encoded_sampled_and_decoded_as_on_the_cpu(tiny_folder: Path) -> None:
    family = families.of(tiny_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 9, 32, 32, 3), dtype=np.uint8)
    found = []
    for device in ("cpu", "cuda"):
        codec = family.load_codec(tiny_folder, 6, device)
        model = family.load_teacher(tiny_folder)
        model.module.to(device)
        latents = codec.encode_video(pixels)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        condition = codec.encode_condition(["a seven moving up and left"], pixels[:, 0], 9)
        with torch.no_grad():
            velocity = model.velocity(noise.to(device), torch.ones(1, device=device), condition)
        video = codec.decode(noise - velocity.cpu())
        found.append((latents.cpu(), velocity.cpu(), torch.as_tensor(video)))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
