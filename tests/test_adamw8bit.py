"""Test tools.adamw8bit against PyTorch's own AdamW."""

import pytest
import torch

from tools import adamw8bit as adamw
from tools.adamw8bit import AdamW8bit, blocks, decode, encode


@pytest.mark.parametrize("shape", [(5, 256), (3, 8), (1, 1), (0, 128), (4, 130)])
@pytest.mark.parametrize("moment", adamw.CODES)
def test_what_is_decoded_is_near_and_is_encoded_to_the_same_codes(shape, moment):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
    x = x if moment == "exp_avg" else x.square()
    codes, scales = encode(x, moment)
    found = decode(codes, scales, moment)
    p, n, dtype = adamw.CODES[moment]
    assert codes.dtype == dtype and codes.shape == x.shape and found.dtype == torch.float32
    if not x.numel():
        return
    # On the scale of |x / s|^(1/p) the codes are evenly spaced, so rounding moves x by at most half a step.
    largest = blocks(x).abs().amax(2, keepdim=True)
    there, back = ((blocks(y).abs() / largest) ** (1 / p) * n for y in (x, found))
    assert (there - back).abs().max() <= 0.5 + 1e-3 and (found * x >= 0).all()
    assert torch.equal(blocks(found).abs().amax(2), scales)  # the largest element of a block is exact
    again = encode(found, moment)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


def test_zeros_stay_zeros():
    for moment in adamw.CODES:
        assert not decode(*encode(torch.zeros(2, 256), moment), moment).any()


def steps(optimizer_of, number: int) -> tuple[float, torch.optim.Optimizer]:
    """Train a matrix towards a least squares solution, some rows rarely. Return loss and optimizer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(60, 256, generator=generator))
    goal = torch.randn(60, 256, generator=generator)
    optimizer = optimizer_of([weight])
    for _ in range(number):
        seen = torch.rand(60, 1, generator=generator) < torch.linspace(0.05, 1, 60)[:, None]
        noise = torch.randn(60, 256, generator=generator)
        weight.grad = seen * (weight.detach() - goal + 0.1 * noise)
        optimizer.step()
    return (weight.detach() - goal).square().mean().item(), optimizer


def test_it_learns_as_fast_as_with_float32_moments(monkeypatch):
    monkeypatch.setitem(adamw.CHUNK, "cpu", 7 * 256)  # the last chunk is smaller
    settings = dict(lr=0.05, weight_decay=0.01, fused=True)
    for number in (1, 20, 100):
        theirs, _ = steps(lambda weights: torch.optim.AdamW(weights, **settings), number)
        ours, optimizer = steps(lambda weights: AdamW8bit(weights, **settings), number)
        assert ours == pytest.approx(theirs, rel=1e-6 if number == 1 else 0.1)
    weight = optimizer.param_groups[0]["params"][0]
    held = sum(part.nbytes for part in optimizer.state[weight].values()) - 4  # without the 4 bytes of `step`
    assert held == weight.numel() * 2 * (1 + 4 / 128)
