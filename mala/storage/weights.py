"""The weights of a checkpoint, in the Hugging Face layout: `model.safetensors`, or shards and their index.

- Weights are read through a memory map, one tensor at a time: no checkpoint is ever twice in memory.
- A pickle can run any code and is never loaded, except PEFT's first adapters, as tensors alone (`read_bin`).
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

Tensors = dict[str, Tensor]  # by name
Device = torch.device | str
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 1000**3  # as transformers cuts
# safetensors' names of dtypes, in the order in which it sorts the tensors of a file: the last come first.
DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
          torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
          torch.float64: "F64", torch.int64: "I64"}  # fmt: skip
# Weights in other formats, which do not go with a checkpoint of other weights.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def read_tensors(file: Path, only: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a safetensors file, or those among `only`, as views of a memory map."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not only or name in only:
                    yield name, tensors.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; get the checkpoint in safetensors format") from None
    except OSError as error:  # a folder of that name, say
        raise UserError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise damaged(file, f"truncated or not a safetensors file ({error})") from None


def read_bin(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a file of `torch.save`, as PEFT wrote adapters at first."""
    open(file, "rb").close()  # what cannot be opened is the system's to say
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception:  # on bytes that are no pickle its unpickler fails in many ways
        raise damaged(file, "truncated, or it holds more than tensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: found a {type(tensors).__name__}, expected a dict of tensors")
    yield from tensors.items()


def damaged(file: Path, found: str) -> UserError:
    """What to say of a file that holds no tensors."""
    refuse_pointer(file)
    return UserError(f"{file}: {found}; download it again")


def weight_files(directory: Path) -> list[Path]:
    """`model.safetensors` of a model folder, or the shards that its index names."""
    index = directory / INDEX
    if (directory / WEIGHTS).exists() or not index.exists():
        return [directory / WEIGHTS]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: no 'weight_map' from tensor names to files; download it again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index}: names the file {shard!r}, expected one in the same folder")
        if not (directory / shard).exists():
            raise UserError(f"{directory / shard}: there is no such file, but {INDEX} names it; download it")
    return [directory / shard for shard in shards]


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a model folder. Raises UserError for a tensor that lies in two of its files."""
    places: dict[str, str] = {}
    for file in weight_files(directory):
        for name, tensor in read_tensors(file):
            if name in places:
                raise UserError(f"{file}: holds {name!r}, as {places[name]} does; download both again")
            places[name] = file.name
            yield name, tensor


def load_weights(model: nn.Module, directory: Path, dtype: torch.dtype | None, device: Device) -> None:
    """Fill a Llama that was built on `meta` from a model folder: each tensor is mapped, cast and moved alone.
    Raises UserError if one is missing, left over, of another shape or not floating point."""
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    is_tied, tied = model.config.tie_word_embeddings, []
    for name, tensor in read_weights(directory):
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old exports hold; it follows from the config
            continue
        if is_tied and name in ("model.embed_tokens.weight", "lm_head.weight"):
            tied.append(tensor)
            if name == "lm_head.weight":  # old exports hold the one matrix twice
                continue
        if name not in missing:
            raise UserError(f"{directory}: the weights hold {name!r}, which config.json has no place for")
        shape = missing.pop(name)
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            expected = f"floating point {tuple(shape)} by config.json; the two are not of one checkpoint"
            raise UserError(f"{directory}: {name} is {found}, expected {expected}")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
    if missing:
        first = next(iter(missing))
        raise UserError(f"{directory}: the weights lack {len(missing)} tensors, the first is {first!r}")
    model.tie_weights()
    if len(tied) == 2 and not torch.equal(*tied):
        raise UserError(f"{directory}: lm_head.weight is not embed_tokens, but config.json ties the two")


def fill_weights(model: nn.Module, directory: Path) -> None:
    """Fill a Llama whose shapes and dtypes come from `load_weights` on `meta`, and which has memory now; of a
    sharded one, a process's part. What has other rows by now an adapter brings, and it is left out."""
    parameters = dict(model.named_parameters())
    for name, tensor in read_weights(directory):
        if name in parameters and parameters[name].shape == tensor.shape:
            fill(parameters[name], tensor, model.compute_dtype)  # as if it came to train only then
            rows = getattr(model.get_submodule(name.rpartition(".")[0]), "token_adapter", None)
            if rows is not None:
                fill(rows.trainable_tokens_delta, tensor[rows.index], model.compute_dtype)


def write_weights(directory: Path, tensors: Tensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index, in this order."""
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
    if count > 1:  # last: an index names no shard that is not there
        write_index(directory, [directory / file for file in files])
    for file in {*directory.glob("model*.safetensors")} - {directory / name for name in files}:
        file.unlink()  # of an earlier checkpoint, cut otherwise


def write_index(directory: Path, shards: list[Path]) -> None:
    """Write which shard each tensor lies in, from the shards themselves."""
    found = [(file.name, name, tensor) for file in shards for name, tensor in read_tensors(file)]
    totals = {"total_size": sum(tensor.nbytes for *_, tensor in found)}
    totals["total_parameters"] = sum(tensor.numel() for *_, tensor in found)
    weight_map = {name: file for file, name, _ in found}
    write_json(directory / INDEX, {"metadata": totals, "weight_map": weight_map})


def write_tensors(file: Path | None, tensors: Tensors, make: Callable[[str], Tensor] | None = None) -> None:
    """One safetensors file, to the byte what `safetensors.torch.save_file` writes, but as a stream: no more
    than a tensor is held beside the model, and of a sharded one a part at a time.

    Then all processes call it, with None for the file if they only give their parts. make: name -> tensor,
    called when its turn comes; `tensors`, on `meta`, then only say of which shapes and dtypes they will be.
    The file is the length of its header (8 bytes, little-endian), the header, JSON with every tensor's dtype,
    shape and place, and the tensors' bytes (github.com/huggingface/safetensors, "Format").
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0  # what transformers and PEFT look for
    names = sorted(tensors, key=lambda name: (-[*DTYPES].index(tensors[name].dtype), name))
    for name in names:
        tensor = tensors[name]
        span = [end, end := end + tensor.numel() * tensor.itemsize]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
    content = (part for name in names for part in parts(make(name) if make else tensors[name]))
    if file is None:
        deque(content, maxlen=0)  # asks for them all
        return
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8 bytes
    with atomic_file(file, "wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in content:  # flat, since a single number cannot be seen as bytes
            opened.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
