"""What the tests share."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracles must not look for anything outside
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from mala.model import LlamaConfig  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the real data lie beside the project, not in it")


def tiny_config(**changes) -> LlamaConfig:
    sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaConfig(**{**sizes, **heads, **changes})
