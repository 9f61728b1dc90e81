"""Checkpoints by their name on the Hugging Face hub, such as `meta-llama/Llama-2-7b-hf`."""

from __future__ import annotations

import re
from pathlib import Path

from mala.cli import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a model or an adapter is read from. The only pickles are adapters of PEFT's first versions, loaded as tensors alone.
FILES = ["*.json", "model*.safetensors", "adapter_model.safetensors", "adapter_model.bin", "tokenizer.model"]


def find(name: str) -> Path:
    """The folder `name`; where there is none and it reads like `org/name`, the hub's repository, downloaded or from its cache.

    Raises UserError where it is neither, where the package huggingface_hub is missing, and where the hub has or gives nothing.
    """
    if Path(name).exists() or not NAME.fullmatch(name):
        return Path(name)
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(f"{name}: there is no such folder; to take it from the Hugging Face hub: pip install huggingface_hub"
                        ) from None  # fmt: skip
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of many kinds: no such repository, a gated one, no network and nothing in the cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: there is no such folder, and the Hugging Face hub does not give it ({reason[:200]}); check "
                        "the name, log in with `hf auth login`, or download it where there is a network") from None  # fmt: skip
