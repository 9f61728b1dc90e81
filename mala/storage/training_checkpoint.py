"""The checkpoints of a training run, in folders `step-N/`. Each holds:

    adapter_config.json, adapter_model.safetensors    the adapter after N steps, in PEFT's format;
    model.safetensors                                 or all weights in float32, if all of them train
    tokenizer.model, tokenizer.json, …                the tokenizer
    optimizer.safetensors                             AdamW's two moments of each trained parameter
    training_state.json                               `step`, `identity` (prepare.py), and the run log's sums

It holds no random state, because a step's data and dropout follow from the seed and the step alone. Its
tensors are not sharded, so any number of processes can continue from it.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mala.cli import UserError
from mala.storage.files import read_json, write_json
from mala.storage.tokenizer_files import copy_companions
from mala.storage.weights import WEIGHTS, Tensors, write_tensors

ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "training_state.json"


def write_state(folder: Path | None, moments: Tensors, state: dict[str, Any]) -> None:
    """Add the optimizer's tensors (`moments`) and the JSON `state` to a folder with the trained weights. With
    folder=None a process only contributes its part (see `write_tensors`)."""
    write_tensors(folder and folder / OPTIMIZER, moments)
    if folder is not None:
        write_json(folder / STATE, state)


def save_checkpoint(model: nn.Module, folder: Path | None, base: Path, dtype: torch.dtype) -> None:
    """Write all weights in `dtype` as a plain checkpoint, with the base's small files. folder: as above."""
    weights = dict(model.named_parameters())
    planned = {name: torch.empty(w.shape, dtype=dtype, device="meta") for name, w in weights.items()}
    write_tensors(folder and folder / WEIGHTS, planned, lambda name: weights[name].to(dtype))
    if folder is not None:
        copy_companions(base, folder)


def read_state(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE)


def trained_file(folder: Path) -> Path:
    """Return the path of the trained weights: model.safetensors if all weights train, else the adapter."""
    return folder / (WEIGHTS if (folder / WEIGHTS).exists() else ADAPTER)


def step_of(folder: Path) -> int:
    """Return N for a folder `step-N`, and 0 for any other folder."""
    name, _, number = folder.name.partition("-")
    return int(number) if name == "step" and number.isdecimal() else 0


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders `step-N/` in a folder, in the order of N."""
    return sorted((entry for entry in folder.glob("step-*") if step_of(entry)), key=step_of)


def check_intact(folder: Path) -> None:
    """Raise UserError if a checkpoint has a missing or damaged file. A read error, such as that of a network
    disk that is offline, does not count as damage and is raised as OSError."""
    for file in (trained_file(folder), folder / OPTIMIZER):
        try:
            safe_open(file, framework="pt").keys()  # this compares the file's size with its header
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{file}: missing or damaged ({error})") from None
    state = read_state(folder)
    if type(state.get("step")) is not int or not isinstance(state.get("identity"), dict):
        raise UserError(f"{folder / STATE}: no 'step' or no 'identity'; expected a file that train.py wrote")


def newest_intact(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None if there is none. Raises UserError if all are damaged."""
    found = checkpoints(folder)
    for newest in reversed(found):
        try:
            check_intact(newest)
            return newest
        except UserError as error:
            print(f"{newest}: damaged, so an earlier checkpoint is tried ({error})", file=sys.stderr)
    if not found:
        return None
    raise UserError(f"{folder}: no checkpoint is intact; restore one, or start over with --resume never")


def set_aside(folder: Path) -> None:
    """Rename a checkpoint so that no run continues from it. The user may delete it."""
    aside = folder.with_name(folder.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"{folder}: set aside as {aside.name}", file=sys.stderr)
