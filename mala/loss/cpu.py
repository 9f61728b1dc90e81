"""The step from logits to losses and gradients, in PyTorch's operations, for all devices without the kernel.

Each operation reads what the one before it wrote, so the logits are processed in parts that stay in a CPU's
cache. (`add_product` computes the gradients on every device.) Shapes: see mala/cross_entropy.py.
"""

import math

import torch
from torch import Tensor

# Rows of logits, or of the weight, processed at a time: 4 to 8 MB at V = 260,164 and C = 256.
LOGIT_ROWS, WEIGHT_ROWS = 8, 4096


def row_losses(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None) -> Tensor:
    """Return the loss of every row of `logits` (C, V): (C,) float32, 0 if ignored.

    With a scale, a scalar, also overwrite `logits` with scale · (p - e), or with zeros if ignored. One
    softmax gives both. The largest logit m of a row has the probability p(m) = exp(m) / Σ exp, so
    log Σ exp = m - log p(m). Because p(m) is at least 1/V, it cannot underflow.
    """
    losses = []
    scratch = logits.new_empty((min(LOGIT_ROWS, len(logits)), logits.shape[1]), dtype=torch.float32)
    for part, target in zip(logits.split(LOGIT_ROWS), targets[:, None].split(LOGIT_ROWS)):  # (c, V), (c, 1)
        kept = target != ignore_index
        index = target.where(kept, 0)
        p = scratch[: len(part)].copy_(part)
        target_logit, largest = p.gather(1, index), p.amax(1, keepdim=True)
        torch.softmax(p, 1, out=p)
        # Trap: a logarithm, at most log V, loses digits if it is first added to a logit of several hundred.
        losses.append((largest - target_logit - p.amax(1, keepdim=True).log()).where(kept, 0)[:, 0])
        if scale is not None:
            p.scatter_add_(1, index, -torch.ones_like(largest))
            part.copy_(p.mul_(scale).masked_fill_(~kept, 0))
    return torch.cat(losses)


def logits_and_losses(
    logits: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None
) -> Tensor:
    """Compute the logits, some rows of the weight at a time, and return what `row_losses` does. `logits`
    (C, V) is a transposed view: in memory the logits of one piece are adjacent. That makes W the left factor
    of the product, which takes a CPU two thirds of the time."""
    largest = torch.full_like(targets, -torch.inf, dtype=torch.float32)  # (C,)
    for some, z in zip(weight.split(WEIGHT_ROWS), logits.T.split(WEIGHT_ROWS)):  # (v, D), (v, C)
        torch.mm(some, hidden.T, out=z)
        largest = torch.maximum(largest, z.amax(0))
    kept = targets != ignore_index
    at_target = torch.arange(len(targets), device=targets.device), targets.where(kept, 0)
    target_logit = logits[at_target]

    total = torch.zeros_like(largest)
    for z in logits.T.split(WEIGHT_ROWS):
        # exp(z - largest), at most 1. On a CPU, PyTorch's exp2 takes a third of the time of its exp.
        total += z.sub_(largest).mul_(1 / math.log(2)).exp2_().sum(0)
    if scale is not None:
        logits.mul_((scale / total.where(kept, torch.inf))[:, None])
        logits[at_target] -= scale * kept
    # Trap: a logarithm, at most log V, loses digits if it is first added to a logit of several hundred.
    return (total.log() + (largest - target_logit)).where(kept, 0)


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """Add a @ b to `total`, or set it to a @ b if `is_first`. `total` is float32 for any dtype of a and b."""
    beta = 0 if is_first else 1  # with 0 `total` is not read, so NaN in it does no harm
    if a.dtype == torch.float32:
        if a.shape[1] > 16 * WEIGHT_ROWS and not is_first and not a.is_cuda:
            # dHidden sums over all pieces. Split into four sums, that takes a CPU a tenth less time.
            v = a.shape[1] // 4
            quarters = a[:, : 4 * v].unflatten(1, (4, v)).transpose(0, 1)  # (4, C, v)
            total += torch.bmm(quarters, b[: 4 * v].unflatten(0, (4, v))).sum(0)  # (4, v, D) -> (C, D)
            a, b = a[:, 4 * v :], b[4 * v :]
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # PyTorch 2.8 adds a @ b unrounded
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        for part, rows in zip(total.split(WEIGHT_ROWS), a.split(WEIGHT_ROWS)):
            part.copy_(rows @ b) if is_first else part.add_((rows @ b).float())
