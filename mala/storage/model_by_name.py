"""From a name to a model and its tokenizer: a folder, what train.py left, an adapter, or a hub name."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mala.cli import UserError, option
from mala.model import Llama
from mala.running import distributed
from mala.running.distributed import World
from mala.storage.files import read_json
from mala.storage.peft_adapter import fill_adapter, load_adapter
from mala.storage.tokenizer_files import holds_tokenizer
from mala.storage.weights import fill_weights
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer

DEMO_RUN = Path("out/demo")  # what `python train.py` leaves
TINY_LLAMA = Path(__file__).resolve().parents[2] / "assets/tiny-llama"


@dataclass
class ModelSettings:
    """The settings of a command line that runs a model."""

    model: str | None = option(None, "a checkpoint, train.py's --out or a hub name; default: the demo's")
    adapter: str | None = option(None, "in PEFT's format, folder or hub name; its tokenizer goes first")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16", "float16"))


def find_folder(name: str, with_weights: bool = True) -> Path:
    """The folder `name`; if there is none and it reads like `org/name`, the hub's, downloaded or cached.
    Without weights it is enough for a plan. Raises UserError if the hub cannot be asked or gives nothing."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(f"{name}: no such folder; to ask the hub: pip install huggingface_hub") from None
    files = ["*.json", "*.jinja", "tokenizer.model"]
    if with_weights:  # the only pickle is that of PEFT's first adapters, see read_bin
        files += ["model*.safetensors", "adapter_model.safetensors", "adapter_model.bin"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of many kinds: no such repository, a gated one, no network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        found = f"there is no such folder, and the Hugging Face hub does not give it ({reason})"
        raise UserError(f"{name}: {found}; check the name, the network and `hf auth login`") from None


def find_model(model: str | None, adapter: str | None) -> tuple[Path, Path | None]:
    """The folders of the base checkpoint and of the adapter, if there is one. By default they are what
    `python train.py` left, else the bundled tiny LLaMA."""
    found = find_folder(adapter) if adapter else None
    if found and not model:
        return base_of(found), found
    folder = find_folder(model) if model else DEMO_RUN if (DEMO_RUN / "adapter").is_dir() else TINY_LLAMA
    trained = folder / "adapter"
    if not trained.is_dir():
        return folder, found
    base = folder / "base" if (folder / "base").is_dir() else base_of(trained)  # train.py left the folder
    return base, found or trained


def base_of(adapter: Path) -> Path:
    """The base checkpoint that an adapter names. Raises UserError if it is neither here nor on the hub."""
    file = adapter / "adapter_config.json"
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: names no base_model_name_or_path; give the base with --model")
    base = find_folder(name)
    if not base.is_dir():
        raise UserError(f"{file}: names the base {name}, which is not here; give it with --model")
    return base


def load_model(
    base: Path, adapter: Path | None, dtype: torch.dtype, world: World, shard: str = "off"
) -> tuple[Llama, Tokenizer]:
    """To run, not to train. An adapter's tokenizer goes before its base's. shard: `on`, the processes share
    one model, `off`, each has its own; `auto`, they share one that some process's GPU cannot hold."""
    model = Llama.from_pretrained(base, dtype, "meta")  # names, shapes and dtypes, without memory
    if adapter is not None:
        load_adapter(model, adapter)
    tokenizer = load_tokenizer(adapter if adapter is not None and holds_tokenizer(adapter) else base)
    tokenizer.check_fits(model.config.vocab_size)
    if shard == "auto" and world.device != "cpu":
        weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        is_too_large = weights > 0.8 * torch.cuda.mem_get_info(world.device)[0]  # the rest: batches
        shard = "on" if world.sum(torch.tensor(int(is_too_large), device=world.device)) else "off"
    distributed.shard(model, world if shard == "on" else World(device=world.device))
    fill_weights(model, base)
    if adapter is not None:
        fill_adapter(model, adapter)
    return model.eval(), tokenizer
