"""The safetensors files of a network, read a slice at a time: nothing in them is run, nothing else of them is held."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pose_core.errors import CheckpointError

SINGLE_FILE = "diffusion_pytorch_model.safetensors"
REOPEN_BYTES = 2**20
"""A file is mapped into memory; closing it after so many bytes read gives the pages back that were looked at."""
PIECE_BYTES = 2**20
"""Rows are copied so many bytes at a time (at least one row): a piece is held twice, in the file's precision too."""


class Weights(Mapping[str, Tensor]):
    """The weights of ``<folder>/<part>`` by name: one safetensors file, or several with an index.

    Raises:
        CheckpointError: once they are asked for: there are none, or they cannot be read (correctable in the call).
    """

    def __init__(self, folder: Path, part: str = "transformer"):
        self.place = folder / part
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def __getitem__(self, name: str) -> Tensor:
        """One whole tensor, in the file's precision."""
        value = self._file(self.files[name]).get_tensor(name)
        self._read_bytes += value.numel() * value.element_size()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, name: str, into: Tensor, first_row: int = 0) -> None:
        """Fill ``into`` with the tensor ``name``, or with its rows from ``first_row`` on, in ``into``'s precision."""
        if into.numel() == 0:
            return
        file = self.files[name]
        if not into.ndim:
            into.copy_(self._file(file).get_slice(name)[...])
            return
        rows = max(1, PIECE_BYTES // (into[0].numel() * into.element_size()))
        for piece in into.split(rows):
            value = self._file(file).get_slice(name)[first_row : first_row + len(piece)]
            piece.copy_(value)
            first_row += len(piece)
            self._read_bytes += value.numel() * value.element_size()

    def fill(self, module: nn.Module) -> None:
        """Give a module that was built on the meta device its weights, whole, in the precision it was built in.

        Raises:
            CheckpointError: see ``check``.
        """
        self.check(module)
        filled = {}
        for name, empty in module.state_dict().items():
            filled[name] = torch.empty(empty.shape, dtype=empty.dtype, device="cpu")
            self.read(name, filled[name])
        self.close()
        module.load_state_dict(filled, assign=True)

    def check(self, module: nn.Module) -> None:
        """Compare names and shapes, by the files' headers, with those of ``module``; adapters are skipped.

        Raises:
            CheckpointError: no safetensors, a damaged file, or weights that do not belong to the module (exit code 2).
        """
        wanted = {stock_name(name): tensor for name, tensor in module.state_dict().items() if not is_adapter(name)}
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
        there = {name for name in self.files if not any(re.search(pattern, name) for pattern in ignored)}
        for fault, names in (("missing", wanted.keys() - there), ("unexpected", there - wanted.keys())):
            if names:
                raise CheckpointError(
                    f"{self.place} has {len(names)} {fault} weights, e.g. {min(names)}: "
                    "its weights and its config.json must belong together",
                    in_call=True,
                )
        for name, tensor in wanted.items():
            shape = tuple(self._file(self.files[name]).get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise self._unusable(f"{name} is {shape} in the file and {tuple(tensor.shape)} by config.json")
        self.close()

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._open, self._read_bytes = None, 0

    @property
    def files(self) -> dict[str, Path]:
        """The file that holds each weight."""
        if not hasattr(self, "_files"):
            self._files = self._locate()
        return self._files

    def _locate(self) -> dict[str, Path]:
        index = self.place / f"{SINGLE_FILE}.index.json"
        if index.is_file():
            try:
                named = {name: self.place / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise self._unusable(f"{index.name} is damaged ({error}), fetch the folder again") from None
            return {name: file for name, file in named.items() if file.parent == self.place}
        file = self.place / SINGLE_FILE
        if not file.is_file():
            pickles = sorted(other.name for other in self.place.glob("*.bin"))
            raise self._unusable(
                f"it holds {pickles[0]}, a pickle, which is not opened: convert it to safetensors"
                if pickles
                else f"it has no {SINGLE_FILE}"
            )
        return dict.fromkeys(self._file(file).keys(), file)

    def _file(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file or self._read_bytes > REOPEN_BYTES:
            self.close()
            try:
                self._open = (file, safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise self._unusable(f"{file.name}: {' '.join(str(error).split())}") from None
        return self._open[1]

    def _unusable(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.place} cannot be loaded: {reason}", in_call=True)


def stock_name(name: str) -> str:
    """A weight's name in the stock module, whether or not adapters wrap it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter."""
    return ".lora_" in name
