"""Find a model by its folder or hub name, and load it with its adapter and tokenizer."""

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
    """Return the folder `name`. If there is none and it looks like `org/name`, download it from the hub or
    use the cached copy. A plan needs no weights. Raises UserError if the hub does not provide it."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(f"{name}: no such folder; to use the hub: pip install huggingface_hub") from None
    files = ["*.json", "*.jinja", "tokenizer.model"]
    if with_weights:  # the .bin is a pickle: see read_bin
        files += ["model*.safetensors", "adapter_model.safetensors", "adapter_model.bin"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no such repository, a gated one, no network, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        found = f"there is no such folder, and the Hugging Face hub does not provide it ({reason})"
        raise UserError(f"{name}: {found}; check the name, the network and `hf auth login`") from None


def load_model(
    base: Path, adapter: Path | None, dtype: torch.dtype, world: World, shard: str = "off"
) -> tuple[Llama, Tokenizer]:
    """Load a model for inference, and its tokenizer: the adapter's own if it has one. shard: with `on` the
    processes share one model, with `off` each has its own. `auto` is `on` if a GPU cannot hold the model."""
    model = Llama.from_pretrained(base, dtype, "meta")  # names, shapes and dtypes, without memory
    if adapter is not None:
        load_adapter(model, adapter)
    tokenizer = load_tokenizer(adapter if adapter is not None and holds_tokenizer(adapter) else base)
    tokenizer.check_fits(model.config.vocab_size)
    if shard == "auto" and world.device != "cpu":
        weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        is_too_large = weights > 0.8 * torch.cuda.mem_get_info(world.device)[0]  # leave room for batches
        shard = "on" if world.sum(torch.tensor(int(is_too_large), device=world.device)) else "off"
    distributed.shard(model, world if shard == "on" else World(device=world.device))
    fill_weights(model, base)
    if adapter is not None:
        fill_adapter(model, adapter)
    return model.eval(), tokenizer
