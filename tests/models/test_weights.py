"""Weights come from safetensors alone, a slice at a time, and a folder that does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pose_core.errors import CheckpointError
from pose_core.models import families, wan
from pose_core.models.weights import SINGLE_FILE, Weights


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A complete folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "wan"))


@pytest.fixture
def split(folder: Path) -> Path:
    """The same weights in two files with an index, as large models are published."""
    place = folder / "transformer"
    stored = load_file(place / SINGLE_FILE)
    (place / SINGLE_FILE).unlink()
    names = sorted(stored)
    files = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: stored[name] for name in held}, place / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (place / f"{SINGLE_FILE}.index.json").write_text(json.dumps(index))
    return folder


def test_rows_are_read_alone_and_in_the_precision_asked_for(folder: Path) -> None:
    name = "blocks.0.ffn.net.0.proj.weight"
    whole = load_file(folder / "transformer" / SINGLE_FILE)[name]
    rows = torch.empty(5, whole.shape[1], dtype=torch.bfloat16)
    Weights(folder).read(name, rows, first_row=7)
    assert torch.equal(rows, whole[7:12].to(torch.bfloat16))


def test_nothing_is_read_of_a_weight_without_rows_here(folder: Path) -> None:
    Weights(folder).read("scale_shift_table", torch.empty(0, 2, 32), first_row=1)


def test_split_weights_are_the_same(tiny_folder: Path, split: Path) -> None:
    whole, parts = (wan.load(place).module.state_dict() for place in (tiny_folder, split))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_tensors_are_had_by_name_from_one_file_or_many(tiny_folder: Path, split: Path) -> None:
    stored, whole, parts = load_file(tiny_folder / "transformer" / SINGLE_FILE), Weights(tiny_folder), Weights(split)
    assert set(whole) == set(parts) == set(stored) and len(whole) == len(parts) == len(stored)
    assert all(torch.equal(whole[name], value) and torch.equal(parts[name], value) for name, value in stored.items())


def test_a_half_fetched_folder_is_refused(split: Path) -> None:
    (split / "transformer" / "second.safetensors").unlink()
    refused(split, "second.safetensors: ")


def test_a_damaged_index_is_refused(split: Path) -> None:
    (split / "transformer" / f"{SINGLE_FILE}.index.json").write_text("{}")
    refused(split, f"{SINGLE_FILE}.index.json is damaged")


def test_an_index_cannot_lead_out_of_its_folder(split: Path) -> None:
    place = split / "transformer"
    index = json.loads((place / f"{SINGLE_FILE}.index.json").read_text())
    (place / "second.safetensors").rename(split / "second.safetensors")
    moved = {name: file.replace("second", "../second") for name, file in index["weight_map"].items()}
    (place / f"{SINGLE_FILE}.index.json").write_text(json.dumps({"weight_map": moved}))
    refused(split, "missing weights")


def test_a_pickle_is_named_and_not_opened(folder: Path) -> None:
    place = folder / "transformer"
    (place / SINGLE_FILE).unlink()
    (place / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    refused(folder, "diffusion_pytorch_model.bin, a pickle, which is not opened")


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "transformer" / SINGLE_FILE).unlink()
    refused(folder, f"it has no {SINGLE_FILE}")


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    file = folder / "transformer" / SINGLE_FILE
    stored = load_file(file)
    save_file(stored | {"proj_out.bias": torch.zeros(3)}, file)
    refused(folder, "proj_out.bias is (3,) in the file and (32,) by config.json")


def test_adapters_of_a_module_are_not_asked_of_the_files(folder: Path) -> None:
    from pose_core.models.lora import add_adapter

    model = wan.load(folder, meta=True)
    role = add_adapter(model, "generator", 2)
    module, weights = model.unread[0]
    weights.check(module)
    assert all(not value.is_meta for value in role.weights().values())


def refused(folder: Path, text: str) -> None:
    """Loading and checking fail in one line that holds ``text``, as something the person can correct in the call."""
    model = families.get("wan").load_teacher(folder, meta=True)
    for load in (lambda: wan.load(folder), lambda: [weights.check(module) for module, weights in model.unread]):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert text in str(caught.value) and str(folder / "transformer") in str(caught.value)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
