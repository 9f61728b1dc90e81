"""The weights of a checkpoint in the Hugging Face layout: `model.safetensors`, or shards and their index.

- Weights are read through a memory map, one tensor at a time, so memory never holds a checkpoint twice.
- A pickle can run any code, so none is loaded. The exception is `read_bin`, which reads only tensors.
"""

import json
import zipfile
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mala.cli import UserError
from mala.running.distributed import fill, parts
from mala.storage.files import atomic_file, read_json, refuse_pointer, write_json

Tensors = dict[str, Tensor]  # name -> tensor
Device = torch.device | str
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 1000**3  # the same limit as in transformers
# safetensors' names of dtypes. A file holds its tensors by dtype, from the last of this list to the first.
DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
          torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
          torch.float64: "F64", torch.int64: "I64"}  # fmt: skip
# Suffixes of weight files. These are not copied from one checkpoint to another with the small files.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def read_tensors(file: Path, only: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a safetensors file, all or only those in `only`, as views of a memory map."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not only or name in only:
                    yield name, tensors.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; download the checkpoint as safetensors") from None
    except OSError as error:  # for example because it is a folder
        raise UserError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise damaged(file, f"truncated or not a safetensors file ({error})") from None


def read_bin(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from a file of `torch.save`, the format of PEFT's first adapters."""
    open(file, "rb").close()  # raise the system's own error if it cannot be opened
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception:  # the unpickler fails in many ways on bytes that are not a pickle
        raise damaged(file, "truncated, or not only tensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: found a {type(tensors).__name__}, expected a dict of tensors")
    yield from tensors.items()


def damaged(file: Path, found: str) -> UserError:
    """Return the error for a file that holds no readable tensors. Raises UserError for a Git LFS pointer."""
    refuse_pointer(file)
    return UserError(f"{file}: {found}; download it again")


def weight_files(directory: Path) -> list[Path]:
    """Return the path of `model.safetensors`, or the paths of the shards that the index names."""
    index = directory / INDEX
    if (directory / WEIGHTS).exists() or not index.exists():
        return [directory / WEIGHTS]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: no 'weight_map' from tensor names to files; download it again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index}: names the file {shard!r}, expected a file in the same folder")
        if not (directory / shard).exists():
            raise UserError(f"{directory / shard}: there is no such file, but {INDEX} names it; download it")
    return [directory / shard for shard in shards]


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every (name, tensor) of a model folder. Raises UserError if two of its files hold one tensor."""
    places: dict[str, str] = {}
    for file in weight_files(directory):
        for name, tensor in read_tensors(file):
            if name in places:
                raise UserError(f"{file}: holds {name!r}, as {places[name]} does; download both files again")
            places[name] = file.name
            yield name, tensor


def load_weights(model: nn.Module, directory: Path, dtype: torch.dtype | None, device: Device) -> None:
    """Load a model folder into a Llama on `meta`, one tensor at a time, in `dtype` and on `device`.
    Raises UserError if a tensor is missing, unexpected, of the wrong shape or not floating point."""
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    is_tied, tied = model.config.tie_word_embeddings, []
    for name, tensor in read_weights(directory):
        if name.endswith("rotary_emb.inv_freq"):  # a buffer in old exports; computed from the config here
            continue
        if is_tied and name in ("model.embed_tokens.weight", "lm_head.weight"):
            tied.append(tensor)
            if name == "lm_head.weight":  # old exports store the tied matrix twice
                continue
        if name not in missing:
            raise UserError(f"{directory}: the weights hold {name!r}, which config.json has no place for")
        shape = missing.pop(name)
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            expected = f"floating point {tuple(shape)} from config.json; use files of one checkpoint"
            raise UserError(f"{directory}: {name} is {found}, expected {expected}")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
    if missing:
        first = next(iter(missing))
        raise UserError(f"{directory}: the weights lack {len(missing)} tensors, the first is {first!r}")
    model.tie_weights()
    if len(tied) == 2 and not torch.equal(*tied):
        raise UserError(f"{directory}: lm_head.weight and embed_tokens differ, but config.json ties them")


def fill_weights(model: nn.Module, directory: Path) -> None:
    """Load a model folder into a Llama that was planned on `meta` and has memory now. If it is sharded, each
    process fills its own shard. Skips a matrix with a new number of rows: the adapter holds its values."""
    parameters = dict(model.named_parameters())
    for name, tensor in read_weights(directory):
        if name in parameters and parameters[name].shape == tensor.shape:
            fill(parameters[name], tensor, model.compute_dtype)  # rounded, as if loaded in this dtype
            rows = getattr(model.get_submodule(name.rpartition(".")[0]), "token_adapter", None)
            if rows is not None:
                fill(rows.trainable_tokens_delta, tensor[rows.index], model.compute_dtype)


def write_weights(directory: Path, tensors: Tensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index. Keep the order."""
    shards, room = [{}], max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes

    files, count = {WEIGHTS: shards[0]}, len(shards)
    (directory / INDEX).unlink(missing_ok=True)
    if count > 1:
        files = {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_tensors(directory / file, shard)
    if count > 1:  # written last, so the index never names a missing shard
        write_index(directory, [directory / file for file in files])
    for file in {*directory.glob("model*.safetensors")} - {directory / name for name in files}:
        file.unlink()  # left by an earlier checkpoint with other shards


def write_index(directory: Path, shards: list[Path]) -> None:
    """Write the index of `shards`: the name of the shard that holds each tensor, and the total size."""
    found = [(file.name, name, tensor) for file in shards for name, tensor in read_tensors(file)]
    totals = {"total_size": sum(tensor.nbytes for *_, tensor in found)}
    totals["total_parameters"] = sum(tensor.numel() for *_, tensor in found)
    weight_map = {name: file for file, name, _ in found}
    write_json(directory / INDEX, {"metadata": totals, "weight_map": weight_map})


def write_tensors(file: Path | None, tensors: Tensors, make: Callable[[str], Tensor] | None = None) -> None:
    """Write one safetensors file as a stream, byte for byte what `safetensors.torch.save_file` writes.

    It copies at most one tensor at a time, or one part of a sharded tensor. If the model is sharded, all
    processes must call this; those that only contribute their parts pass file=None. make: name -> tensor,
    called just before that tensor is written; `tensors` then only give shapes and dtypes, on `meta`.
    File format (github.com/huggingface/safetensors): the header's length (8 bytes, little-endian), the
    header (JSON: dtype, shape and byte range of each tensor), then the tensors' bytes.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers and PEFT check for this
    names = sorted(tensors, key=lambda name: (-[*DTYPES].index(tensors[name].dtype), name))
    for name in names:
        tensor = tensors[name]
        span = [end, end := end + tensor.numel() * tensor.itemsize]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
    content = (part for name in names for part in parts(make(name) if make else tensors[name]))
    if file is None:
        deque(content, maxlen=0)  # runs the generator to its end
        return
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # pad, so that the tensors begin at a multiple of 8 bytes
    with atomic_file(file, "wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in content:  # flat, because a 0-d tensor cannot be viewed as bytes
            opened.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
