"""The loss of a language model from hidden states and the head's weight, so that no caller ever holds the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
# `token_nll` keeps one chunk of float32 logits at a time: at 260,164 words, 2^28 bytes are 257 tokens.
CHUNK_BYTES = 2**28


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, in nats per target, of `targets` under softmax(hidden @ weight.T).

    hidden: (N, D). weight: (V, D), `lm_head.weight`. targets: (N,) int64 in [0, V), or -100 to be left out.
    Returns a float32 scalar; 0 if every target is left out. The softmax is taken in float32 whatever the operands.
    """
    logits = (hidden @ weight.to(hidden.dtype).T).float()  # (N, V)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.no_grad()
def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every target, in nats, without gradients: (N, D), (V, D), (N,) -> (N,) float32."""
    weight = weight.to(hidden.dtype)
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    parts = [
        F.cross_entropy((h @ weight.T).float(), t, reduction="none") for h, t in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
