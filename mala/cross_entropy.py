"""The loss of a language model from hidden states and the head's weight, without N x V memory.

With MaLA-500's 260,164 words the logits of 4,096 tokens take 4.3 GB in float32, and training keeps several copies. Here they
are made for some rows at a time, turned into the gradient that they would receive, and that into the gradients of the hidden
states and of the weight; then they are overwritten by those of the next rows. So the gradient is formed in the forward pass,
and of the logits only one chunk is ever held, CHUNK_BYTES at most, however large N is. With p = softmax(h Wᵀ) and e one at
the target, the gradient of a row's loss, -log p_target, is p - e.

Three implementations of one mathematics:

- `reference`  F.cross_entropy on all logits: to read, and for tests
- `chunked`    PyTorch only, for CPUs and all other devices; on a CPU in float32 word by word, which suits its caches better
- `triton`     one kernel between the matrix products, for CUDA

Shapes: N rows (B · T), D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # not on every platform
    triton = None

IGNORE_INDEX = -100
# What the logits of a chunk may take, in bytes: at 260,164 words 257 rows in float32 on a CPU, 4,127 in bfloat16 on a GPU. With
# fewer the matrix products run below their full rate, and dWeight, which every chunk reads and writes whole, costs more.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
# What PyTorch's several operations go through in turn while it lies in a CPU's cache, at 260,164 words and 256 rows 4 to 8 MB:
ROWS, WORDS = 8, 4096


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX,
                         implementation: str | None = None) -> torch.Tensor:  # fmt: skip
    """Mean negative log-likelihood, in nats per target, of `targets` under softmax(hidden @ weight.T).

    hidden: (N, D) float32, bfloat16 or float16, the dtype of the matrix products and of the logits. weight: (V, D), the weight
    of `lm_head`, cast to it. targets: (N,) int64 in [0, V), or `ignore_index`, which is left out of the mean. Returns a float32
    scalar, 0 if every target is left out. The softmax is float32 whatever the operands, and so is the sum over chunks that
    makes dWeight, held from the forward to the backward pass; gradients come in the operands' dtypes. Autocast changes nothing.
    `implementation`: by default `triton` on CUDA, else `chunked`. Raises ValueError for operands of other shapes or dtypes and
    for a target outside [0, V); on CUDA that is looked for in the first training step only, later it makes the loss NaN.
    """
    check(hidden, weight, targets, ignore_index, is_training=torch.is_grad_enabled())
    implementation = implementation or _best(hidden)
    if implementation == "reference":
        logits = (hidden @ weight.to(hidden.dtype).T).float()  # (N, V)
        total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return total / (targets != ignore_index).sum().clamp(min=1)
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, implementation, torch.is_grad_enabled())


@torch.no_grad()
def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every target, in nats, without gradients: (N, D), (V, D), (N,) -> (N,) float32."""
    check(hidden, weight, targets, IGNORE_INDEX, is_training=False)
    implementation = _best(hidden)
    chunks = _chunks(implementation, hidden, weight.to(hidden.dtype), targets)
    losses = [_forward_backward(implementation, *chunk, IGNORE_INDEX, None, None) for _, *chunk in chunks]
    return torch.cat(losses) if losses else hidden.new_empty(0, dtype=torch.float32)


def _best(hidden: torch.Tensor) -> str:
    return "triton" if hidden.is_cuda and triton is not None else "chunked"


_checked_devices: set[torch.device] = set()


def check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, is_training: bool) -> None:
    """Raise ValueError for operands that do not fit, and for a target that is no word (on a GPU this answer is waited for)."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden.dtype}, expected float32, bfloat16 or float16")
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}, expected int64 ({len(hidden)},)")
    if is_training and targets.is_cuda and targets.device in _checked_devices:
        return
    vocab_size = len(weight)
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"target {int(targets[at])} in place {at} is no word: expected 0 to {vocab_size - 1}, or {ignore_index}"
        )
    if is_training:
        _checked_devices.add(targets.device)


def _chunks(implementation: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple]:
    """Yield, chunk by chunk: which rows, their hidden states (C, D), the weight, their targets (C,), memory for the logits."""
    N, V = len(hidden), len(weight)
    width = -(-V // _block(V)) * _block(V) if implementation == "triton" else V  # of a row in memory, see the kernel
    rows = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (hidden.element_size() * V))
    even = -(-N // max(1, -(-N // rows)))  # as many chunks, but evenly filled (both divisions round up) ...
    rows = max(1, min(rows, -(-even // 16) * 16))  # ... with a multiple of 16 rows, which matrix products like
    memory = hidden.new_empty(rows * width)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        yield chunk, hidden[chunk], weight, targets[chunk], memory[: (chunk.stop - start) * width]


class _LinearCrossEntropy(torch.autograd.Function):
    """`forward` makes the gradients along with the loss, `backward` scales them by the gradient of what is made of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int,
                implementation: str, is_training: bool) -> torch.Tensor:  # fmt: skip
        wants_hidden, wants_weight = (is_training and wanted for wanted in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        d_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
        for rows, *chunk in _chunks(implementation, hidden, weight.to(hidden.dtype), targets):
            d_chunk = d_hidden[rows] if wants_hidden else None
            total += _forward_backward(implementation, *chunk, ignore_index, d_chunk, d_weight, is_first=rows.start == 0).sum()
        if wants_weight and not len(hidden):
            d_weight.zero_()
        count = (targets != ignore_index).sum().clamp(min=1).float()
        ctx.gradients = [d_hidden, d_weight]
        ctx.dtypes, ctx.scale = (hidden.dtype, weight.dtype), 1 / count
        return total / count

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:  # they were scaled in place, to hold no second copy of (V, D)
            raise RuntimeError("the loss's gradient is taken a second time; it is formed once, call linear_cross_entropy again")
        gradients, ctx.gradients = ctx.gradients, None
        scale = d_loss * ctx.scale
        d_hidden, d_weight = (
            None if gradient is None else gradient.mul_(scale).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes)
        )
        return d_hidden, d_weight, None, None, None, None


@torch.autocast("cpu", enabled=False)  # it would cast some of the products and not others
@torch.autocast("cuda", enabled=False)
def _forward_backward(implementation: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                      memory: torch.Tensor, ignore_index: int, d_hidden: torch.Tensor | None,
                      d_weight: torch.Tensor | None, is_first: bool = True) -> torch.Tensor:  # fmt: skip
    """The losses of a chunk's rows: (C,) float32, 0 where ignored. Their gradients, float32, are added to d_hidden (C, D) and
    d_weight (V, D), where these are given; d_weight holds nothing yet if `is_first`. memory: C rows of V or more logits."""
    C, V = len(hidden), len(weight)
    with_gradient = d_hidden is not None or d_weight is not None
    if implementation == "chunked" and hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        # The same memory, but as (V, C): with W as its left factor a CPU's product takes two thirds of the time.
        logits = memory.view(V, C).T
        losses = _word_by_word(logits, hidden, weight, targets, ignore_index, with_gradient)
    else:
        logits = torch.mm(hidden, weight.T, out=memory.view(C, -1)[:, :V])
        row_by_row = {"chunked": row_losses_by_torch, "triton": row_losses_by_triton}[implementation]
        losses = row_by_row(logits, targets, ignore_index, with_gradient)
    if d_hidden is not None:
        _add_product(d_hidden, logits, weight)  # (C, V) (V, D) -> (C, D)
    if d_weight is not None:
        _add_product(d_weight, logits.T, hidden, is_first)  # (V, C) (C, D) -> (V, D)
    return losses


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool = False) -> None:
    """total += a @ b, or total = a @ b where `is_first`; `total` is float32 whatever the dtype of a and b."""
    beta = 0 if is_first else 1  # with 0 what `total` holds is not read, be it NaN
    if a.dtype == torch.float32:
        if a.shape[1] > 16 * WORDS and not is_first and not a.is_cuda:
            # dHidden is a sum over words, very many: as four sums, side by side on a CPU's cores, it takes a tenth less time.
            v = a.shape[1] // 4
            quarters = a[:, : 4 * v].unflatten(1, (4, v)).transpose(0, 1)  # (4, C, v)
            total += torch.bmm(quarters, b[: 4 * v].unflatten(0, (4, v))).sum(0)  # (4, C, v) (4, v, D) -> (C, D)
            a, b = a[:, 4 * v :], b[4 * v :]
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # PyTorch 2.8: the product is not rounded before it is added
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        for part, rows in zip(total.split(WORDS), a.split(WORDS)):
            part.copy_(rows @ b) if is_first else part.add_((rows @ b).float())


def _word_by_word(logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int,
                  with_gradient: bool) -> torch.Tensor:  # fmt: skip
    """Make the logits of all rows, some words at a time, and turn them into p - e, as `row_losses_by_torch` does row by row.

    `logits` (C, V) is the transpose of the memory, in which the logits of one word lie side by side.
    """
    largest = torch.full_like(targets, -torch.inf, dtype=torch.float32)  # (C,), as all below
    for words, x in zip(weight.split(WORDS), logits.T.split(WORDS)):  # (v, D), (v, C)
        torch.mm(words, hidden.T, out=x)
        largest = torch.maximum(largest, x.amax(0))
    kept = targets != ignore_index
    at_target = torch.arange(len(targets), device=targets.device), targets.where(kept, 0)
    target_logit = logits[at_target]

    total = torch.zeros_like(largest)
    for x in logits.T.split(WORDS):
        # exp(x - largest), whose exponents are never above 0. PyTorch's exp2 takes a third of the time of its exp on a CPU.
        total += x.sub_(largest).mul_(1 / math.log(2)).exp2_().sum(0)
    if with_gradient:
        logits.mul_((1 / total.where(kept, torch.inf))[:, None])
        logits[at_target] -= kept.float()
    # In this order: beside logits of some hundreds the logarithm, at most log V, would lose its digits.
    return (total.log() + (largest - target_logit)).where(kept, 0)


def row_losses_by_torch(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, with_gradient: bool) -> torch.Tensor:
    """The loss of every row of `logits` (C, V): (C,) float32, 0 where ignored. `with_gradient`: `logits` become p - e in place,
    or zeros where ignored.

    One softmax gives both: the largest logit m of a row has the probability exp(m) / sum exp, so log-sum-exp = m - log(p of m),
    and that p is at least 1/V: it cannot underflow.
    """
    losses = []
    scratch = torch.empty(min(ROWS, len(logits)), logits.shape[1], dtype=torch.float32, device=logits.device)
    for part, target in zip(logits.split(ROWS), targets[:, None].split(ROWS)):  # (c, V), (c, 1)
        kept = target != ignore_index
        index = target.where(kept, 0)
        p = scratch[: len(part)].copy_(part)
        target_logit, largest = p.gather(1, index), p.amax(1, keepdim=True)
        torch.softmax(p, 1, out=p)
        # In this order: beside logits of some hundreds the logarithm, at most log V, would lose its digits.
        losses.append((largest - target_logit - p.amax(1, keepdim=True).log()).where(kept, 0)[:, 0])
        if with_gradient:
            p.scatter_add_(1, index, -torch.ones_like(largest))
            part.copy_(p.masked_fill_(~kept, 0))
    return torch.cat(losses)


def row_losses_by_triton(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, with_gradient: bool) -> torch.Tensor:
    """`row_losses_by_torch` in one kernel: a row is read twice and written once, and nothing else is held."""
    C, V = logits.shape
    assert logits.stride(1) == 1 and logits.stride(0) % _block(V) == 0  # see the kernel
    targets = targets.contiguous()
    losses = torch.empty(C, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, which may be another
        _row_kernel[(C,)](logits, logits.stride(0), targets, losses, V, ignore_index, with_gradient, _block(V), num_warps=8)
    return losses


BLOCK = 8192  # logits that a program of the kernel works on at a time: 32 in each of 256 threads


def _block(V: int) -> int:
    return min(triton.next_power_of_2(V), BLOCK)


if triton is not None:

    @triton.jit
    def _row_kernel(logits, stride, targets, losses, V, ignore_index,  # noqa: ANN001, Triton has types of its own
                    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """One program, one row of V logits: its loss, and its logits turned into p - e.

        Pass 1 reads the row in blocks. Each of BLOCK lanes keeps, in registers, the largest logit that it has met and the sum
        of exp(logit - largest), rescaled when a larger one comes (online softmax, arXiv 1805.02867): no exponent is ever above
        0, so none overflows. The lanes are put together at the end of the row.
        Pass 2 reads the row again, mostly from the cache, and writes exp(logit - largest) / total, less 1 at the target.
        Rows begin at multiples of BLOCK, so that whole blocks are read and written, 16 bytes a thread at a time; what lies
        beyond V is anything, and counts as -inf. (The matrix products, too, are at their full rate on such rows only.)
        """
        row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride passes 2^31 at 8,255 rows of 260,164 words
        logits += row * stride
        target = tl.load(targets + row)
        is_kept = target != ignore_index
        # Before anything is written: another warp may be ahead of this one. NaN for a target that is no word.
        is_word = (target >= 0) & (target < V)
        target_logit = tl.load(logits + target, mask=is_kept & is_word, other=float("nan")).to(tl.float32)
        lanes = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], -3e38, tl.float32)  # not -inf: -inf - -inf is no number
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            x = tl.where(columns < V, tl.load(logits + columns).to(tl.float32), -float("inf"))
            larger = tl.maximum(largest, x)
            total = total * tl.exp(largest - larger) + tl.exp(x - larger)
            largest = larger
        row_largest = tl.max(largest)
        row_total = tl.sum(total * tl.exp(largest - row_largest))
        tl.store(losses + row, tl.where(is_kept, tl.log(row_total) + (row_largest - target_logit), 0.0))
        if WITH_GRADIENT:
            for start in range(0, V, BLOCK):
                columns = start + lanes
                x = tl.load(logits + columns).to(tl.float32)
                # Not exp(x - log-sum-exp): among logits of some hundreds that difference is rounded to 1e-5.
                p = tl.exp(x - row_largest) / row_total - (columns == target).to(tl.float32)
                tl.store(logits + columns, tl.where(is_kept, p, 0.0))
