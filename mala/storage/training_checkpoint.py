"""The checkpoints of a training run, folders `step-N/`. One holds:

    adapter_config.json, adapter_model.safetensors    the adapter after N steps, as PEFT knows it;
    model.safetensors                                 or, if all weights train, these, in float32
    tokenizer.model, tokenizer.json, …                its tokenizer
    optimizer.safetensors                             AdamW's two moments of everything that trains
    training_state.json                               `step`, `identity` (prepare.py), and the run log's sums

It holds no random state: what a step sees and drops out follows from the seed and the step. Its tensors are
not sharded, so that any number of processes can go on from it.
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
    """Make an adapter's folder a checkpoint: `moments` are the optimizer's tensors, `state` is JSON. With
    folder=None a process only gives its part, see `write_tensors`."""
    write_tensors(folder and folder / OPTIMIZER, moments)
    if folder is not None:
        write_json(folder / STATE, state)


def save_checkpoint(model: nn.Module, folder: Path | None, base: Path, dtype: torch.dtype) -> None:
    """Write all weights in `dtype`, as a plain checkpoint with the companions of `base`. folder: as above."""
    weights = dict(model.named_parameters())
    planned = {name: torch.empty(w.shape, dtype=dtype, device="meta") for name, w in weights.items()}
    write_tensors(folder and folder / WEIGHTS, planned, lambda name: weights[name].to(dtype))
    if folder is not None:
        copy_companions(base, folder)


def read_state(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE)


def trained_file(folder: Path) -> Path:
    """What has trained: an adapter, or all weights."""
    return folder / (WEIGHTS if (folder / WEIGHTS).exists() else ADAPTER)


def step_of(folder: Path) -> int:
    """N of a folder `step-N`, 0 of any other."""
    name, _, number = folder.name.partition("-")
    return int(number) if name == "step" and number.isdecimal() else 0


def checkpoints(folder: Path) -> list[Path]:
    """The folders `step-N/` in a folder, in order of N."""
    return sorted((entry for entry in folder.glob("step-*") if step_of(entry)), key=step_of)


def check_intact(folder: Path) -> None:
    """Raise UserError if a checkpoint lacks a file or holds a damaged one. What cannot be read, on a network
    disk that is gone for a while, is no damage: the OSError goes through."""
    for file in (trained_file(folder), folder / OPTIMIZER):
        try:
            safe_open(file, framework="pt").keys()  # compares the size with what the header says
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{file}: missing or damaged ({error})") from None
    state = read_state(folder)
    if type(state.get("step")) is not int or not isinstance(state.get("identity"), dict):
        raise UserError(f"{folder / STATE}: no 'step' or no 'identity'; expected what train.py leaves there")


def newest_intact(folder: Path) -> Path | None:
    """The newest intact checkpoint in a folder, None if it has none. Raises UserError if all are damaged."""
    found = checkpoints(folder)
    for newest in reversed(found):
        try:
            check_intact(newest)
            return newest
        except UserError as error:
            print(f"{newest}: damaged, so one before it is looked for ({error})", file=sys.stderr)
    if not found:
        return None
    raise UserError(f"{folder}: no checkpoint is intact; bring one back, or start over with --resume never")


def set_aside(folder: Path) -> None:
    """Rename a checkpoint so that no run takes it any more; to delete it is the user's to do."""
    aside = folder.with_name(folder.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"{folder}: set aside as {aside.name}", file=sys.stderr)
