"""From a name to a model and its tokenizer: a folder or a hub name, an adapter on it."""

import re
from pathlib import Path

import torch

from mala.cli import UserError
from mala.model import Llama
from mala.running import distributed
from mala.running.distributed import World
from mala.storage.peft_adapter import fill_adapter, load_adapter
from mala.storage.tokenizer_files import holds_tokenizer
from mala.storage.weights import fill_weights
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer


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
