"""The loss between its matrix products as one Triton kernel, for CUDA: two reads of the logits, one write."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # not on every platform
    triton = None

BLOCK = 8192  # logits that a program of the kernel works on at a time: 32 in each of 256 threads


def _block(V: int) -> int:
    return min(2 ** (V - 1).bit_length(), BLOCK)


def row_width(V: int) -> int:
    """How many logits a row takes in memory: whole blocks, since the kernel reads and writes no others."""
    return -(-V // _block(V)) * _block(V)


def row_losses(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None) -> Tensor:
    """`row_losses` of mala/loss/cpu.py. Rows of `logits` (C, V) begin at multiples of `row_width(V)`."""
    C, V = logits.shape
    assert logits.stride(1) == 1 and logits.stride(0) % _block(V) == 0  # see the kernel
    targets = targets.contiguous()
    losses = torch.empty(C, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, which may be another
        arguments = (logits, logits.stride(0), targets, losses, losses if scale is None else scale)
        _row_kernel[(C,)](*arguments, V, ignore_index, scale is not None, _block(V), num_warps=8)
    return losses


if triton is not None:

    @triton.jit
    def _row_kernel(logits, stride, targets, losses, scale, V, ignore_index,  # noqa: ANN001, Triton's own types
                    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """One program, one row of V logits: its loss, and its logits turned into scale · (p - e).

        Pass 1 reads the row in blocks. Each of BLOCK lanes keeps, in registers, the largest logit that it has
        met and the sum of exp(logit - largest), rescaled when a larger one comes (online softmax, arXiv
        1805.02867): no exponent is ever above 0, so none overflows. The lanes are put together at the end of
        the row. Pass 2 reads the row again, mostly from the cache, and writes exp(logit - largest) / total,
        less 1 at the target, times the scale. Rows begin at multiples of BLOCK, so that whole blocks are read
        and written, 16 bytes a thread at a time; what lies beyond V is anything, and counts as -inf.
        """
        row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 8,255 rows of 260,164 logits
        logits += row * stride
        target = tl.load(targets + row)
        is_kept = target != ignore_index
        # Before anything is written: another warp may be ahead of this one. NaN for a target that has no row.
        has_row = (target >= 0) & (target < V)
        target_logit = tl.load(logits + target, mask=is_kept & has_row, other=float("nan")).to(tl.float32)
        lanes = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], -3e38, tl.float32)  # not -inf: -inf - -inf is no number
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
                # Not exp(z - log Σ exp): among logits of some hundreds that difference is rounded to 1e-5.
                gradient = tl.exp(z - row_largest) * (factor / row_total)
                gradient -= tl.where(columns == target, factor, 0.0)
                tl.store(logits + columns, tl.where(is_kept, gradient, 0.0))
