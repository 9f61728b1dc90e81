"""What the loss takes, and what it refuses."""

import torch
from torch import Tensor

_checked: set[tuple[torch.device, bool]] = set()


def check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, is_training: bool) -> None:
    """Raise ValueError for operands that do not fit, or a target without a row (a GPU is asked that once)."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden.dtype}, expected float32, bfloat16 or float16")
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        shapes = f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}, expected (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        found = f"targets are {targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"{found}, expected int64 ({len(hidden)},)")
    if targets.is_cuda and (targets.device, is_training) in _checked:
        return
    V = len(weight)
    wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        expected = f"expected 0 to {V - 1}, or {ignore_index}"
        raise ValueError(f"target {int(targets[at])} in place {at} has no row: {expected}")
    _checked.add((targets.device, is_training))
