"""AdamW (arXiv 1711.05101) with one byte per element in each of its two moments. PyTorch's takes four bytes.

    LLaMA 2 7B with 260,164 rows: 2.1 billion trained elements, 17.1 GB of moments in float32, 4.4 GB here

Blockwise quantization (arXiv 2110.02861): BLOCK neighbours in a row share a scale s, their largest magnitude.
An element x is stored as an integer c from -n to n:

    x = s · sign(c) · |c / n|^p        p = 2, n = 127 for the first moment; p = 4, n = 255 for the second

The powers place more codes near 0, where most elements are. The second moment is a mean of squares, so its
power is twice as high. Decoding and encoding again gives the same bits.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

BLOCK = 128  # elements per scale of 4 bytes; a row whose length is not a multiple has one scale
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # elements decoded to float32 at a time
CODES = {"exp_avg": (2, 127, torch.int8), "exp_avg_sq": (4, 255, torch.uint8)}  # p, n, dtype


def blocks(x: Tensor) -> Tensor:
    """Reshape (rows, columns) to (rows, blocks of a row, elements of a block)."""
    return x.unflatten(1, (-1, BLOCK)) if x.shape[1] % BLOCK == 0 else x[:, None]


def encode(x: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    """Encode float32 (rows, columns) as one-byte codes of that shape and float32 scales (rows, blocks)."""
    p, n, dtype = CODES[moment]
    scales = blocks(x).abs().amax(2)
    ratio = blocks(x) / scales[..., None].clamp(min=torch.finfo(torch.float32).tiny)
    return ((ratio.abs() ** (1 / p) * n).round() * ratio.sign()).to(dtype).view_as(x), scales


def decode(codes: Tensor, scales: Tensor, moment: str) -> Tensor:
    """Return the float32 (rows, columns) that `encode` was given, rounded."""
    p, n, _ = CODES[moment]
    ratio = blocks(codes).float() / n
    return (ratio.abs() ** p * ratio.sign() * scales[..., None]).view(codes.shape)


@functools.cache
def codecs(device: str) -> tuple[Callable, Callable]:
    """Return `encode` and `decode`, compiled on a GPU."""
    if device == "cpu":
        return encode, decode
    return torch.compile(encode, dynamic=True), torch.compile(decode, dynamic=True)


class AdamW8bit(torch.optim.AdamW):
    """PyTorch's AdamW for matrices and vectors, with moments of one byte per element.

    A step processes some rows at a time: it decodes their moments, calls PyTorch's fused AdamW kernel, and
    encodes the new moments. On a GPU decoding is one compiled kernel, and so is encoding. In a vector each
    element has its own scale. A parameter's state is sharded like the parameter.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            names = ("lr", "weight_decay", "eps", "amsgrad", "maximize")
            settings = {name: group[name] for name in names} | dict(zip(("beta1", "beta2"), group["betas"]))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                kept = [state[f"{moment}{part}"] for moment in CODES for part in ("", "_scales")]
                whole = [local(tensor) for tensor in (parameter, parameter.grad, *kept)]
                device = whole[0].device.type
                rows = max(1, CHUNK[device] // whole[0].shape[1])
                to_codes, from_codes = codecs(device)
                for weight, gradient, *codes in zip(*(tensor.split(rows) for tensor in whole)):
                    m, v = from_codes(*codes[:2], "exp_avg"), from_codes(*codes[2:], "exp_avg_sq")
                    adamw([weight], [gradient], [m], [v], [], [state["step"].clone()], fused=True, **settings)
                    encoded = *to_codes(m, "exp_avg"), *to_codes(v, "exp_avg_sq")
                    for old, new in zip(codes, encoded):
                        old.copy_(new)
                state["step"] += 1

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return `step`, and each moment's codes under its name and scales under its name + `_scales`."""
        state = self.state[parameter]
        if not state:
            scale_of_blocks = parameter.detach()
            if parameter.ndim == 2:
                scale_of_blocks = scale_of_blocks[:, : blocks(local(parameter)).shape[1]]
            state["step"] = torch.zeros((), device=local(parameter).device)
            for moment, (_, _, dtype) in CODES.items():
                state[moment] = torch.zeros_like(parameter, dtype=dtype)
                state[f"{moment}_scales"] = torch.zeros_like(scale_of_blocks)
        return state


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor sharded by FSDP2, else all rows. A vector becomes a column."""
    tensor = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return tensor if tensor.ndim == 2 else tensor[:, None]
