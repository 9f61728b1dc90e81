"""From a name to a model and its tokenizer: a folder, what `train.py` left, an adapter, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mala.checkpoint import read_json
from mala.cli import UserError, option
from mala.lora import load_adapter
from mala.model import Llama
from mala.tokenizer import Tokenizer, load_tokenizer

DEMO_RUN = Path("out/demo")  # what `python train.py` leaves
TINY_LLAMA = Path(__file__).resolve().parent.parent / "assets/tiny-llama"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a model or an adapter is read from. The only pickles are adapters of PEFT's first versions, loaded as tensors alone.
WEIGHTS = ["model*.safetensors", "adapter_model.safetensors", "adapter_model.bin"]
OTHERS = ["*.json", "tokenizer.model"]


def find(name: str, with_weights: bool = True) -> Path:
    """The folder `name`; where there is none and it reads like `org/name`, the hub's repository, downloaded or from its cache.
    with_weights: without them there is enough for a plan.

    Raises UserError where it is neither, where the package huggingface_hub is missing, and where the hub has or gives nothing.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        return Path(name)
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(f"{name}: there is no such folder; to take it from the Hugging Face hub: pip install huggingface_hub"
                        ) from None  # fmt: skip
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=OTHERS + (WEIGHTS if with_weights else [])))
    except Exception as error:  # of many kinds: no such repository, a gated one, no network and nothing in the cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: there is no such folder, and the Hugging Face hub does not give it ({reason[:200]}); check "
                        "the name, log in with `hf auth login`, or download it where there is a network") from None  # fmt: skip


@dataclass
class ModelSettings:
    """The settings of a command line that runs a model."""

    model: str | None = option(None, "a checkpoint: a folder, one that train.py left, or a name on the Hugging Face hub; "
                                     "default: out/demo, else assets/tiny-llama")  # fmt: skip
    adapter: str | None = option(
        None, "a LoRA adapter in PEFT's format, folder or hub name; its tokenizer goes before the model's"
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the weights and the computation; auto: float32 on a CPU, else bfloat16",
                        choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip


def find_model(model: str | None, adapter: str | None) -> tuple[Path, Path | None]:
    """The folders of the base checkpoint and of the adapter, if there is one; by default what `python train.py` left, else the
    bundled tiny LLaMA."""
    folder = find(model) if model else DEMO_RUN if (DEMO_RUN / "adapter").is_dir() else TINY_LLAMA
    found = find(adapter) if adapter else None
    if found and not model:
        return base_of(found), found
    if (folder / "adapter").is_dir():  # a folder that train.py left
        found = found or folder / "adapter"
        return folder / "base" if (folder / "base").is_dir() else base_of(folder / "adapter"), found
    return folder, found


def base_of(adapter: Path) -> Path:
    """The base checkpoint that an adapter names. Raises UserError where it names none that is here or on the hub."""
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{adapter / 'adapter_config.json'}: names no base_model_name_or_path; give the base with --model")
    base = find(named)
    if not base.is_dir():
        raise UserError(f"{adapter / 'adapter_config.json'}: names the base {named}, which is not here; give it with --model")
    return base


def load_model(base: Path, adapter: Path | None, dtype: torch.dtype, device: str) -> tuple[Llama, Tokenizer]:
    """To run, not to train. An adapter's tokenizer goes before its base's."""
    model = Llama.from_pretrained(base, dtype, device)
    tokenizer_in = base
    if adapter is not None:
        load_adapter(model, adapter)
        if any((adapter / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
            tokenizer_in = adapter
    tokenizer = load_tokenizer(tokenizer_in)
    tokenizer.check_fits(model.config.vocab_size)
    return model.eval(), tokenizer
