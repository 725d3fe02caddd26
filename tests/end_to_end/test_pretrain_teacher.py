"""The command that makes the shipped teachers, with a handful of steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file
from torch import Tensor

PROJECT = Path(__file__).resolve().parents[2]
FEW = ["--clips", "12", "--vae-steps", "2", "--batch", "2"]

pytestmark = pytest.mark.integration


def pretrain(folder: Path, *arguments: str, exit_code: int = 0) -> str:
    command = [sys.executable, str(PROJECT / "pipelines" / "pretrain_teacher.py"), "--work", str(folder / "work"), *FEW]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == exit_code, done.stderr[-2000:]
    return done.stderr if exit_code else done.stdout


def weights(teacher: Path, part: str = "transformer") -> dict[str, Tensor]:
    return load_file(teacher / part / "diffusion_pytorch_model.safetensors")


def test_teachers_of_both_tasks_load_in_stock_pipelines_and_are_not_trained_twice(tmp_path: Path) -> None:
    image, text = tmp_path / "i2v", tmp_path / "t2v"
    told = pretrain(tmp_path, "--out", str(image), "--teacher-steps", "2")
    assert f"wrote {image}" in told and not image.with_name("i2v.partial").exists()
    assert WanImageToVideoPipeline.from_pretrained(image).transformer.config.image_dim is not None
    after_two = weights(image)

    checkpoint = tmp_path / "work" / "teacher-i2v-0.pt"
    made = checkpoint.stat().st_mtime_ns
    pretrain(tmp_path, "--out", str(image), "--teacher-steps", "2")
    assert checkpoint.stat().st_mtime_ns == made, "nothing was left to train"
    assert all(value.equal(after_two[name]) for name, value in weights(image).items())

    pretrain(tmp_path, "--task", "t2v", "--start-from", str(image), "--out", str(text), "--teacher-steps", "1")
    assert WanPipeline.from_pretrained(text).transformer.config.image_dim is None
    kept = {path.name for path in (tmp_path / "work").glob("[tv]*.pt")}
    assert kept == {"vae-0.pt", "teacher-i2v-0.pt", "teacher-t2v-from-i2v-0.pt"}, "a checkpoint an origin and seed"

    told = pretrain(tmp_path, "--start-from", str(tmp_path), "--out", str(text), exit_code=2)
    assert told == f"error: --start-from {tmp_path} has no model_index.json: name a teacher's folder\n"

    longer = tmp_path / "longer"
    more = "--task", "t2v", "--work", str(tmp_path / "elsewhere"), "--start-from", str(text), "--out", str(longer)
    pretrain(tmp_path, *more, "--seed", "1", "--teacher-steps", "1", "--timestep-shift", "2", "--precision", "bfloat16")
    assert not list((tmp_path / "elsewhere").glob("vae*"))
    assert all(value.equal(weights(image, "vae")[name]) for name, value in weights(longer, "vae").items())
    assert (image / "vae" / "config.json").read_text() == (longer / "vae" / "config.json").read_text()
    assert not all(value.equal(weights(text)[name]) for name, value in weights(longer).items())

    sharper = tmp_path / "sharper"
    decoder = "--decoder-steps", "2", "--decoder-noise", "0.2", "--only-vae", "--seed", "1"
    pretrain(tmp_path, "--start-from", str(image), "--out", str(sharper), *decoder)
    assert all(value.equal(after_two[name]) for name, value in weights(sharper).items())
    eyes = [load_file(folder / "image_encoder" / "model.safetensors") for folder in (image, sharper)]
    assert all(value.equal(eyes[1][name]) for name, value in eyes[0].items()), "it sees first frames as before"
    before, after = weights(image, "vae"), weights(sharper, "vae")
    moved = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert moved == {"decoder", "post_quant_conv"}, "latents are as they were"
    assert (image / "vae" / "config.json").read_text() == (sharper / "vae" / "config.json").read_text()

    told = pretrain(tmp_path, "--out", str(sharper), "--decoder-steps", "2", exit_code=2)
    assert told == "error: --decoder-steps trains on the VAE of --start-from: name its folder\n"
    told = pretrain(tmp_path, "--out", str(sharper), "--start-from", str(image), "--only-vae", exit_code=2)
    assert told == "error: --only-vae trains nothing with --start-from, which keeps a VAE: add --decoder-steps\n"
    told = pretrain(tmp_path, "--out", str(sharper), "--decoder-noise", "0.2", exit_code=2)
    assert told == "error: --decoder-noise 0.2 trains no decoder: add --decoder-steps\n"
