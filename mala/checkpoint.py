"""Files: safe writing, and the weights of a checkpoint in the Hugging Face layout.

- Nothing is half-written: a file or a folder is made beside its place, flushed to the disk, then renamed.
- Weights are read through a memory map, one tensor at a time: no second copy of a checkpoint is ever in memory.
- Only safetensors; a pickle can run any code and is never loaded.
- A checkpoint of a training run is a folder `step-N/`: an adapter as PEFT knows it, the optimizer's state, and what else the
  next step depends on. It holds whole tensors, so that any number of processes can go on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mala.cli import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 1000**3  # as transformers cuts
COPY_BYTES = 2**24  # at a time: large enough for the speed of the disk


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write to; it takes its place when the block ends, and is gone if the block raises."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        with named(path):
            yield temporary
            os.chmod(temporary, mode)  # safetensors makes its files readable by their owner alone
            _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """A write that fails, on a full disk for instance, does not say to which file it was; this does, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: could not be written ({reason}); make room or name another folder") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """`atomic_path`, opened: text is UTF-8."""
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def _flush(path: Path) -> None:
    """To the disk itself: a file that was only renamed may be empty after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it takes its place when the block ends, and is gone if the block raises.

    Raises UserError where `path` exists, unless `replace`.
    """
    if path.exists() and not replace:
        raise UserError(f"{path}: the output folder exists; name another or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a run after a kill takes away what that left
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with named(path):
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
        if path.exists():  # a rename cannot replace a folder that holds something
            shutil.rmtree(path)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path, expected: str = "a model or adapter folder as the hub holds it") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none; `expected` says what it belongs to."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; expected {expected}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, nested too deeply
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def read_tensors(file: Path, only: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a safetensors file, or of `only` those names that it holds; the tensors are views of a memory
    map, paged in when touched."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not only or name in only:
                    yield name, tensors.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; download the checkpoint again, in safetensors format") from None
    except OSError as error:  # a folder of that name, say
        raise UserError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); download it again") from None


def read_bin(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a file of `torch.save`, as PEFT wrote adapters at first: tensors only, no other pickle."""
    open(file, "rb").close()  # what cannot be opened is the system's to say
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception:  # on bytes that are no pickle its unpickler fails in many ways
        raise UserError(f"{file}: truncated, or it holds more than tensors; expected weights in torch.save's format") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: found a {type(tensors).__name__}, expected a dict of tensors")
    yield from tensors.items()


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a model folder: `model.safetensors`, or the shards that its index names."""
    for file in weight_files(directory):
        yield from read_tensors(file)


def weight_files(directory: Path) -> list[Path]:
    """`model.safetensors` of a model folder, or the shards that its index names."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return [directory / WEIGHTS]
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{directory / INDEX}: no 'weight_map' from tensor names to files; download it again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{directory / INDEX}: names the file {shard!r}, expected one in the same folder")
    return [directory / shard for shard in shards]


def rewrite_tensors(source: Path, target: Path, changed: dict[str, torch.Tensor]) -> None:
    """Copy a safetensors file, with other tensors of the same dtype in place of those in `changed`.

    The others are copied as bytes and never loaded. A safetensors file is the length of its header (8 bytes, little-endian),
    the header, JSON that gives for each tensor its dtype, shape and place, and the tensors' bytes, one after the other
    (github.com/huggingface/safetensors, "Format").
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        data = old.tell()
        metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
        order = sorted(header, key=lambda name: header[name]["data_offsets"])
        new_header, end = {}, 0
        for name in order:
            start, stop = header[name]["data_offsets"]
            shape, size = header[name]["shape"], stop - start
            if name in changed:
                shape, size = list(changed[name].shape), changed[name].nbytes
            new_header[name] = {"dtype": header[name]["dtype"], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        encoded = json.dumps({**metadata, **new_header}, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8 bytes
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            if name in changed:
                new.write(changed[name].detach().cpu().contiguous().view(torch.uint8).numpy())
                continue
            start, stop = header[name]["data_offsets"]
            old.seek(data + start)
            for left in range(stop - start, 0, -COPY_BYTES):
                new.write(old.read(min(left, COPY_BYTES)))


# What does not go with a checkpoint whose weights or words were changed: weights in other formats, and the old words.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
VOCABULARY = ("tokenizer.model", "tokenizer.json", "added_tokens.json")


def copy_companions(source: Path, target: Path, with_vocabulary: bool) -> None:
    """Copy the small files of a model folder that lie beside its weights: generation_config.json, the licence, ..."""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in OTHER_WEIGHTS or file.name == INDEX
        if file.is_file() and not is_weights and (with_vocabulary or file.name not in VOCABULARY):
            shutil.copyfile(file, target / file.name)


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index, in the order of `tensors`."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes

    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        write_tensors(directory / name, shard)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX]:  # of an earlier checkpoint, cut otherwise
        if stale.name not in names and (stale.name != INDEX or len(shards) == 1):
            stale.unlink(missing_ok=True)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file; `format: pt` is what transformers and PEFT look for."""
    with atomic_path(file) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})


# Checkpoints of a training run: adapter_config.json, adapter_model.safetensors, tokenizer.model, optimizer.safetensors (AdamW's
# two moments) and training_state.json. There is no random state: what a step sees and drops out follows from seed and step.

ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "training_state.json"


def write_training_state(folder: Path, moments: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Make an adapter's folder a checkpoint: `moments` are the optimizer's tensors, `state` is JSON."""
    write_tensors(folder / OPTIMIZER, moments)
    write_json(folder / STATE, state)


def step_of(folder: Path) -> int:
    """N of a folder `step-N`, 0 of any other."""
    name, _, number = folder.name.partition("-")
    return int(number) if name == "step" and number.isdecimal() else 0


def checkpoints(folder: Path) -> list[Path]:
    """The folders `step-N/` in a folder, in order of N."""
    return sorted((entry for entry in folder.glob("step-*") if step_of(entry)), key=step_of)


def read_state(folder: Path) -> dict[str, Any]:
    """training_state.json: `step`, how many are done; `loss`, `logged_step` (mala/log.py) and `identity` (mala/prepare.py)."""
    return read_json(folder / STATE)


def check_whole(folder: Path) -> None:
    """Raise UserError where a checkpoint lacks a file or holds a damaged one. (What cannot be read, on a network disk that is
    gone for a while, is no damage: the OSError goes through.)"""
    for file in (folder / ADAPTER, folder / OPTIMIZER):
        try:
            safe_open(file, framework="pt").keys()  # compares the size with what the header says
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{file}: missing or damaged ({error})") from None
    state = read_state(folder)
    if type(state.get("step")) is not int or not isinstance(state.get("identity"), dict):
        raise UserError(f"{folder / STATE}: there is no 'step' or no 'identity'; expected what train.py leaves in a checkpoint")


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that is whole, None where there is none at all; damaged ones are named on stderr.

    Raises UserError where all are damaged.
    """
    for newest in reversed(checkpoints(folder)):
        try:
            check_whole(newest)
            return newest
        except UserError as error:
            print(f"{newest}: damaged, so one before it is looked for ({error})", file=sys.stderr)
    if checkpoints(folder):
        raise UserError(f"{folder}: no checkpoint is whole; bring one back, or start over with --resume never")
    return None


def set_aside(folder: Path) -> None:
    """Rename a checkpoint so that no run takes it any more; to delete it is the user's to do."""
    aside = folder.with_name(folder.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"{folder}: set aside as {aside.name}", file=sys.stderr)


def lock(folder: Path, wait: bool = False) -> IO:
    """Lock a folder until the file that is returned is closed, at the latest when the process ends, however it ends.

    Where another process holds the lock, wait for it, or raise UserError. Where the system has no flock nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another run is writing here; wait for it, or name another folder") from None
    except (ImportError, OSError):
        pass
    return file
