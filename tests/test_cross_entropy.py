"""mala.cross_entropy against float64."""

import pytest
import torch

from mala.cross_entropy import linear_cross_entropy, token_nll


def test_cross_entropy_against_float64(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(70, 16, generator=generator)
    targets = torch.randint(0, 70, (50,), generator=generator)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    monkeypatch.setattr("mala.cross_entropy.CHUNK_BYTES", 4 * 70 * 8)  # chunks of eight rows
    assert torch.allclose(token_nll(hidden, weight, targets).double(), exact, rtol=1e-5)
    targets[::3] = -100
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(exact[targets != -100].mean().item(), rel=1e-5)
    assert token_nll(hidden[:0], weight, targets[:0]).shape == (0,)
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]).item() == 0
