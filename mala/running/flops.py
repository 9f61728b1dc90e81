"""How many FLOPs a training step takes."""

import torch

from mala.lora import LoRALinear
from mala.model import Llama


def flops_per_token(model: Llama, seq_len: int) -> int:
    """Model FLOPs of a training step, forward and backward, per token of blocks of `seq_len`.

    As PaLM counts them (arXiv 2204.02311, appendix B): what gradient checkpointing computes again does not
    count, and attention counts in full, though under the causal mask half would do. Each element of a matrix
    takes 2 FLOPs forward, 2 for the gradient of its input (in the first block that takes embeddings that
    train) and 2 for its own if it trains. The embeddings are looked up, which takes none.
    """
    flops = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # LoRALinear and lm_head are, too
            lora = [module.lora_A, module.lora_B] if isinstance(module, LoRALinear) else []
            for matrix in [module.weight, *lora]:
                flops += matrix.numel() * (6 if matrix.requires_grad else 4)
    config = model.config
    return flops + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
