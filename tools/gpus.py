"""The FLOPs of a training step, and the published peak FLOP/s of GPUs."""

import re

import torch

from mala.lora import LoRALinear
from mala.model import Llama

# A part of `torch.cuda.get_device_name()` -> the maker's FLOP/s in bfloat16 with float32 sums, without
# sparsity (most data sheets give twice as much, with sparsity). V100 and T4 lack bfloat16: theirs is float16.
KNOWN_GPUS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835.5e12, "H200": 989e12,
    "H100 NVL": 835.5e12, "H100 PCIe": 756e12, "H100": 989e12, "H800 PCIe": 756e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "V100S": 130e12, "V100-SXM2": 125e12, "V100-PCIE": 112e12, "T4": 65e12,
    "MI325X": 1307e12, "MI300X": 1307e12, "MI210": 181e12,
    "MI250X": 191.5e12, "MI250": 181e12,  # half a card: PyTorch sees its two dies as two devices
}  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of the GPU that PyTorch calls `name`, or None if unknown."""
    if re.search(r"\b(MIG|Laptop|Ti|D)\b", name):  # a slice of a GPU, or a different chip with a similar name
        return None
    # Match whole words, because A100 contains A10. Take the longest, because H100 PCIe contains H100.
    found = [known for known in KNOWN_GPUS if re.search(rf"\b{known}\b", name)]
    return KNOWN_GPUS[max(found, key=len)] if found else None


def flops_per_token(model: Llama, seq_len: int) -> int:
    """Return the model FLOPs per token, forward and backward, of sequences of `seq_len` tokens.

    The count follows arXiv 2204.02311, appendix B:
    - An element of a matrix takes 2 FLOPs forward, 2 for the input's gradient, and 2 for its own gradient if
      it trains. An embedding lookup takes none.
    - Attention counts in full, although the causal mask leaves only half.
    - The second forward pass of gradient checkpointing does not count.
    """
    flops = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # LoRALinear and lm_head are, too
            lora = [module.lora_A, module.lora_B] if isinstance(module, LoRALinear) else []
            for matrix in [module.weight, *lora]:
                flops += matrix.numel() * (6 if matrix.requires_grad else 4)
            if rows := getattr(module, "token_adapter", None):  # lm_head's rows that train
                flops += 2 * rows.trainable_tokens_delta.numel()
    config = model.config
    return flops + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
