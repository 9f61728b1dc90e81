"""The step from logits to losses and gradients, as a Triton kernel for CUDA: two reads and one write."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # Triton is not available on every platform
    triton = None

BLOCK = 8192  # logits that a program of the kernel processes at a time: 32 in each of 256 threads


def _block(V: int) -> int:
    """Return the smallest power of two that is at least V, but at most BLOCK."""
    return min(2 ** (V - 1).bit_length(), BLOCK)


def row_width(V: int) -> int:
    """Return how many logits a row takes in memory: whole blocks, because the kernel accesses only those."""
    return -(-V // _block(V)) * _block(V)


def row_losses(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None) -> Tensor:
    """Like `row_losses` in mala/loss/cpu.py. Rows of `logits` (C, V) begin at multiples of `row_width(V)`."""
    C, V = logits.shape
    assert logits.stride(1) == 1 and logits.stride(0) % _block(V) == 0  # see the kernel
    targets = targets.contiguous()
    losses = torch.empty(C, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, maybe another one
        arguments = (logits, logits.stride(0), targets, losses, losses if scale is None else scale)
        _row_kernel[(C,)](*arguments, V, ignore_index, scale is not None, _block(V), num_warps=8)
    return losses


if triton is not None:

    @triton.jit
    def _row_kernel(logits, stride, targets, losses, scale, V, ignore_index,  # noqa: ANN001, Triton's own types
                    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """Store the loss of one row of V logits, and replace the logits by scale · (p - e).

        Pass 1 reads the row in blocks. Each of BLOCK lanes keeps in registers the largest logit that it has
        seen and the sum of exp(logit - largest). The sum is rescaled when a larger logit comes (online
        softmax, arXiv 1805.02867), so no exponent is above 0 and none overflows. Then the lanes are combined.
        Pass 2 reads the row again, mostly from the cache, and writes exp(logit - largest) / total, minus 1 at
        the target, times the scale. Rows begin at multiples of BLOCK, so whole blocks are read and written,
        16 bytes a thread at a time. Memory beyond V counts as -inf; what pass 2 writes there is not read.
        """
        row = tl.program_id(0).to(tl.int64)  # row * stride could exceed 2^31: at 8,192 rows of 262,144 logits
        logits += row * stride
        target = tl.load(targets + row)
        is_kept = target != ignore_index
        # Load this now, because another warp may overwrite it in pass 2 first. NaN if the target has no row.
        has_row = (target >= 0) & (target < V)
        target_logit = tl.load(logits + target, mask=is_kept & has_row, other=float("nan")).to(tl.float32)
        lanes = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], -3e38, tl.float32)  # not -inf, because -inf - -inf is NaN
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            z = tl.where(columns < V, tl.load(logits + columns).to(tl.float32), -float("inf"))
            larger = tl.maximum(largest, z)
            total = total * tl.exp(largest - larger) + tl.exp(z - larger)
            largest = larger
        row_largest = tl.max(largest)
        row_total = tl.sum(total * tl.exp(largest - row_largest))
        tl.store(losses + row, tl.where(is_kept, tl.log(row_total) + (row_largest - target_logit), 0.0))
        if WITH_GRADIENT:
            factor = tl.load(scale)
            for start in range(0, V, BLOCK):
                columns = start + lanes
                z = tl.load(logits + columns).to(tl.float32)
                # Trap: for logits of several hundred, z - log Σ exp would have a rounding error of 1e-5.
                gradient = tl.exp(z - row_largest) * (factor / row_total)
                gradient -= tl.where(columns == target, factor, 0.0)
                tl.store(logits + columns, tl.where(is_kept, gradient, 0.0))
