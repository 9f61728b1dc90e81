"""The shapes of published LLaMA checkpoints for plans, benchmarks and tests, and random weights for them."""

from typing import Any

import torch

from mala.model import Llama, LlamaConfig

NAMED = {
    "llama-2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
                         rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
                         rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                         bos_token_id=128000, eos_token_id=128001),
    "tinyllama-1.1b": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                           num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5),
    "demo": dict(vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                 num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5),  # assets/tiny-llama
}  # fmt: skip


def named(name: str, **changes: Any) -> LlamaConfig:
    """Return the config of a model in NAMED, with `changes` such as another `vocab_size`."""
    return LlamaConfig(**{**NAMED[name], **changes})


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Initialise weights for training from scratch: matrices N(0, initializer_range²), biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, model.config.initializer_range, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
