"""The loss of a language model from hidden states and the head's weight, without N x V memory.

With MaLA-500's 260,164 pieces, the logits of 4,096 tokens take 4.3 GB in float32, and training usually keeps
several copies. Here the rows are processed in chunks. The forward pass computes a chunk's logits, replaces
them by their gradient, and from it computes the gradients of the hidden states and of the weight. The next
chunk reuses the memory, so at most CHUNK_BYTES of logits are ever held, however large N is.

Let h be a row of the hidden states, z = h Wᵀ its logits, p = softmax(z), y the target and e its one-hot row:

    loss = log Σ exp(z) - z_y     d loss/d z = p - e     d loss/d h = (p - e) W     d loss/d W = (p - e)ᵀ h

mala/loss/ turns logits into losses and (p - e) / count, with a Triton kernel on CUDA and with PyTorch's
operations on any other device. The softmax and the sums of both gradients are float32, whatever the operands'
dtype. Shapes: N rows (B · T), D hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mala.loss import cpu, triton_kernel

IGNORE_INDEX = -100
# Most bytes of logits in a chunk: at V = 260,164, 257 float32 rows on a CPU, 4,096 bfloat16 rows on a GPU.
# Fewer rows would slow the matrix products, and each chunk reads and writes dWeight.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
# A GPU multiplies at full rate only if every dimension is a multiple of 8. 260,164 is not, and cuBLAS would
# use kernels of older chips, half as fast. So a GPU multiplies the last V mod 64 pieces separately.
ALIGNMENT = 64
_checked: set[tuple[torch.device, bool]] = set()  # each (GPU, is_training) whose targets were checked once


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    implementation: str | None = None,
    share: float | None = None,
    only: tuple[Tensor, slice | list[int]] | None = None,
) -> Tensor:
    """Return the mean NLL, in nats per target, of `targets` under softmax(hidden @ weight.T).

    - hidden: (N, D) float32, bfloat16 or float16, the dtype of the matrix products and of the logits.
    - weight: (V, D), the weight of `lm_head`, cast to that dtype.
    - targets: (N,) int64 in [0, V), or `ignore_index`, which the mean leaves out.
    - implementation: `chunked` or `triton`; by default `triton` on CUDA, else `chunked`.
    - share: the micro-batch's share of its step. It multiplies the loss, and the forward pass adds dWeight to
      `weight.grad`, which saves a second (V, D) and a pass over it. So do not scale the loss afterwards.
    - only: if only some rows of the weight train: a leaf (n, D) float32 with their values, and their indices
      in the weight. Only these rows get a gradient; the rest of dWeight is not computed.

    The loss is a float32 scalar, 0 if every target is ignored. Gradients have the operands' dtypes. Autocast
    has no effect. Raises ValueError for operands that do not fit and for a target outside [0, V). On CUDA
    only the first calls check the targets; later a wrong one makes the loss NaN.
    """
    is_training = torch.is_grad_enabled()
    _check(hidden, weight, targets, ignore_index, is_training)
    trained, index = only or (weight, None)
    mode = (ignore_index, implementation or _default(hidden), is_training, share, index)
    return _LinearCrossEntropy.apply(hidden, trained, weight.detach(), targets, *mode)


@torch.no_grad()
def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of every target in nats, without gradients: (N, D), (V, D), (N,) -> (N,) float32."""
    _check(hidden, weight, targets, IGNORE_INDEX, is_training=False)
    implementation = _default(hidden)
    chunks = _chunks(implementation, hidden, weight.to(hidden.dtype), targets)
    losses = [_forward_backward(implementation, chunk, IGNORE_INDEX) for _, *chunk in chunks]
    return torch.cat(losses) if losses else hidden.new_empty(0, dtype=torch.float32)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, is_training: bool) -> None:
    """Raise ValueError for operands that do not fit or a target without a row (checked once on a GPU)."""
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
        raise ValueError(f"target {int(targets[at])} at index {at} has no row: {expected}")
    _checked.add((targets.device, is_training))


def _default(hidden: Tensor) -> str:
    return "triton" if hidden.is_cuda and triton_kernel.triton is not None else "chunked"


def _chunks(implementation: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple]:
    """Yield for each chunk: its rows, hidden states (C, D), the weight, targets (C,), memory for logits."""
    N, V = len(hidden), len(weight)
    width = triton_kernel.row_width(V) if implementation == "triton" else V
    rows = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (hidden.element_size() * width))
    even = -(-N // max(1, -(-N // rows)))  # rows of each of the fewest chunks; -(-a // b) rounds a / b up
    rows = max(1, min(rows, -(-even // 16) * 16))  # rounded up to 16, for speed, if that fits
    memory = hidden.new_empty(rows * width)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        yield chunk, hidden[chunk], weight, targets[chunk], memory[: (chunk.stop - start) * width]


@torch.autocast("cpu", enabled=False)  # autocast would cast some products and not others
@torch.autocast("cuda", enabled=False)
def _forward_backward(
    implementation: str,
    chunk: list[Tensor],
    ignore_index: int,
    scale: Tensor | None = None,
    d_hidden: Tensor | None = None,
    d_weight: Tensor | None = None,
    is_first: bool = True,
    index: slice | list[int] | None = None,
) -> Tensor:
    """Return the losses of a chunk's rows, (C,) float32, 0 if ignored, and add up gradients times `scale`.

    - chunk: what `_chunks` yields after its rows. With a scale, the logits in it become scale · (p - e).
    - d_hidden, d_weight: (C, D) and (V, D) float32, or None for no gradient. If `is_first`, d_weight is
      not initialised yet. index: the rows of the weight that train, if not all; then d_weight is (n, D).
    """
    hidden, weight, targets, memory = chunk
    C, V = len(hidden), len(weight)
    columns = [slice(0, V)]  # of the logits, each range multiplied by itself
    if implementation == "triton":
        logits, full = memory.view(C, -1)[:, :V], V - V % ALIGNMENT  # (C, V)
        columns = [part for part in (slice(0, full), slice(full, V)) if part.start < part.stop]
        for part in columns:
            torch.mm(hidden, weight[part].T, out=logits[:, part])
        losses = triton_kernel.row_losses(logits, targets, ignore_index, scale)
    elif hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        logits = memory.view(V, C).T
        losses = cpu.logits_and_losses(logits, hidden, weight, targets, ignore_index, scale)
    else:
        logits = torch.mm(hidden, weight.T, out=memory.view(C, V))
        losses = cpu.row_losses(logits, targets, ignore_index, scale)
    for part in columns:
        if d_hidden is not None:
            cpu.add_product(d_hidden, logits[:, part], weight[part])  # (C, V) (V, D) -> (C, D)
        if d_weight is not None and index is None:
            cpu.add_product(d_weight[part], logits[:, part].T, hidden, is_first)  # (V, C) (C, D) -> (V, D)
    if d_weight is not None and index is not None:
        cpu.add_product(d_weight, logits[:, index].T, hidden, is_first)  # (n, C) (C, D) -> (n, D)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """`forward` forms the gradients along with the loss; `backward` scales them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, trained: Tensor, weight: Tensor, targets: Tensor, *mode: Any
    ) -> Tensor:
        """Return the loss. trained: the weight, or only its rows that train, which stand at `index`."""
        ignore_index, implementation, is_training, share, index = mode
        wants_hidden, wants_weight = (is_training and wanted for wanted in ctx.needs_input_grad[:2])
        in_place = wants_weight and share is not None and trained.is_leaf and trained.dtype == torch.float32
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        is_first, d_weight = not in_place or trained.grad is None, None
        if wants_weight:
            d_weight = torch.empty_like(trained, dtype=torch.float32) if is_first else trained.grad
        factor = (share or 1.0) / (targets != ignore_index).sum().clamp(min=1).float()
        scale = factor if wants_hidden or wants_weight else None
        for rows, *chunk in _chunks(implementation, hidden, weight.to(hidden.dtype), targets):
            gradients = [d_hidden[rows] if wants_hidden else None, d_weight, is_first, index]
            total += _forward_backward(implementation, chunk, ignore_index, scale, *gradients).sum()
            is_first = False
        if wants_weight and is_first:  # there was no chunk, so it is not written yet
            d_weight.zero_()
        if in_place:
            trained.grad, d_weight = d_weight, None
        ctx.gradients, ctx.dtypes = [d_hidden, d_weight], (hidden.dtype, trained.dtype)
        return total * factor

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:  # they are scaled in place, to save a second (V, D)
            raise RuntimeError("backward ran a second time on this loss; call linear_cross_entropy again")
        pairs, ctx.gradients = zip(ctx.gradients, ctx.dtypes), None
        d_hidden, d_weight = (None if one is None else one.mul_(d_loss).to(dtype) for one, dtype in pairs)
        return d_hidden, d_weight, *[None] * 7  # none for the weight, the targets and the mode
