"""Compare mala.cross_entropy and mala.loss with float64.

The Triton kernel runs in Triton's interpreter, on a CPU.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import mala.cross_entropy
from mala.cross_entropy import linear_cross_entropy, token_nll
from mala.loss import cpu, triton_kernel

# Triton chooses its interpreter when it is imported, so the last test runs this file again in a process
# that has chosen it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["chunked", "triton"] if INTERPRETED else ["chunked"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def problem(n, d, v, dtype=torch.float32, ignored=0.2, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (spread * torch.randn(v, d, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return hidden, weight, targets


def results(hidden, weight, targets, loss):
    gradients = torch.autograd.grad(loss, [hidden, weight])
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def exact(hidden, weight, targets):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    total = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return results(hidden, weight, targets, total / (targets != -100).sum().clamp(min=1))


def reference(hidden, weight, targets):
    """Return F.cross_entropy of all logits at once, in float32."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum().clamp(min=1)


def error(found, expected):
    return [
        ((a - b).norm() / (b.norm() + 1e-30)).item() if b.norm() > 0 else a.norm().item()
        for a, b in zip(found, expected)
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(n=st.integers(0, 40), d=st.integers(1, 33), v=st.integers(1, 300), dtype=st.sampled_from(sorted(DTYPES)),
       ignored=st.sampled_from([0.0, 0.3, 1.0]), spread=st.sampled_from([0.01, 1.0, 30.0]), seed=st.integers(0, 99),
       budget=st.integers(1, 100_000), block=st.sampled_from([16, 64, 512]))  # fmt: skip
@settings(deadline=None, max_examples=25 if INTERPRETED else 200, derandomize=True)
def test_as_accurate_as_cross_entropy_on_float32_logits(
    implementation, n, d, v, dtype, ignored, spread, seed, budget, block
):
    hidden, weight, targets = problem(n, d, v, DTYPES[dtype], ignored, seed, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mala.cross_entropy, "CHUNK_BYTES", {"cpu": budget})
        patch.setattr(triton_kernel, "BLOCK", block)
        patch.setattr(cpu, "LOGIT_ROWS", 3)
        patch.setattr(cpu, "WEIGHT_ROWS", block)
        loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
        assert loss.dtype == torch.float32 and loss.shape == ()
        found = results(hidden, weight, targets, loss)
        nll = token_nll(hidden, weight, targets)
    theirs = results(hidden, weight, targets, reference(hidden, weight, targets))
    expected = exact(hidden, weight, targets)
    # Both round, so allow twice the reference's error and a few units in the last place of the operands.
    ulp = torch.finfo(DTYPES[dtype]).eps
    for ours, other in zip(error(found, expected), error(theirs, expected)):
        assert ours <= 2 * other + 4 * ulp, (found, theirs, expected)
    assert torch.allclose(nll.sum().double(), found[0] * (targets != -100).sum(), rtol=1e-4, atol=1e-5)
    assert (nll[targets == -100] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_is_the_slope_of_the_loss(implementation):
    hidden, weight, targets = problem(6, 5, 11)
    loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
    gradients = torch.autograd.grad(3 * loss, [hidden, weight])  # a loss that the caller has scaled
    step = 1e-2
    for x, gradient in zip((hidden, weight), gradients):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                x.add_(sign * step * direction)
                ends.append(
                    linear_cross_entropy(hidden, weight, targets, implementation=implementation).double()
                )
                x.sub_(sign * step * direction)
        assert (gradient * direction).sum().item() == pytest.approx(
            3 * (ends[0] - ends[1]).item() / (2 * step), rel=1e-3
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [260_164, 50_257, 32_001, 32_000, 65, 7])
def test_real_vocabularies_which_few_numbers_divide(v, dtype, implementation):
    hidden, weight, targets = problem(5, 8, v, DTYPES[dtype])
    targets[0] = v - 1  # one of the last pieces, which a GPU multiplies separately
    loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
    theirs = reference(hidden, weight, targets)
    expected = exact(hidden, weight, targets)
    found, of_theirs = (error(results(hidden, weight, targets, x), expected) for x in (loss, theirs))
    assert all(
        ours <= 2 * other + 4 * torch.finfo(DTYPES[dtype]).eps for ours, other in zip(found, of_theirs)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_micro_batches_add_up_in_the_weights_own_gradient(n, dtype, implementation, monkeypatch):
    monkeypatch.setattr(mala.cross_entropy, "CHUNK_BYTES", {"cpu": 10_000})
    parts, master = [problem(rows, 6, 100, dtype, seed=rows) for rows in (n, 12)], problem(1, 6, 100)[1]
    step = 0
    for hidden, _, targets in parts:
        step = step + linear_cross_entropy(hidden, master, targets, implementation=implementation) / 2
    expected = torch.autograd.grad(step, [master, *(hidden for hidden, *_ in parts)])
    losses = 0
    for hidden, _, targets in parts:
        part = linear_cross_entropy(hidden, master, targets, implementation=implementation, share=0.5)
        part.backward()
        losses += part.detach()
    assert losses == pytest.approx(step.item(), rel=1e-6)
    for found, wanted in zip([master, *(hidden for hidden, *_ in parts)], expected):
        assert found.grad.dtype == found.dtype
        assert (found.grad - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()


def test_a_share_of_what_cannot_be_added_in_place():
    """In-place addition is impossible if the weight is frozen, not float32, or the result of a computation."""
    hidden, weight, targets = problem(12, 6, 20)
    for other in (weight.detach(), weight.detach().bfloat16().requires_grad_(), weight * 1):
        half = linear_cross_entropy(hidden, other, targets, share=0.5)
        whole = linear_cross_entropy(hidden, other, targets)
        wanted = [x for x in (hidden, other) if x.requires_grad]
        pairs = zip(torch.autograd.grad(half, wanted), torch.autograd.grad(whole, wanted))
        assert half.item() == pytest.approx(whole.item() / 2)
        assert all(torch.allclose(2 * a, b, rtol=1e-2, atol=1e-4) for a, b in pairs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(implementation):
    hidden, weight, targets = (
        torch.full((3, 1), 1e4),
        torch.tensor([[1.0], [-1.0], [0.999], [3.0]]),
        torch.tensor([0, 1, 3]),
    )
    loss = linear_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), targets, implementation=implementation
    )
    assert loss.item() == pytest.approx((2e4 + 4e4 + 0) / 3)
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ignored_and_nothing_at_all(implementation):
    for n in (0, 5):
        hidden, weight, targets = problem(n, 4, 7, ignored=1.1)
        loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
        assert loss.item() == 0
        loss.backward()
        assert not hidden.grad.any() and not weight.grad.any() and hidden.grad.shape == hidden.shape
        assert token_nll(hidden, weight, targets).shape == (n,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_gradients_that_are_wanted_are_formed(implementation, monkeypatch):
    products = []
    original = cpu.add_product
    monkeypatch.setattr(cpu, "add_product", lambda *args: (products.append(args[0].shape), original(*args)))
    hidden, weight, targets = problem(6, 5, 11)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
    assert not loss.requires_grad and not products
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, targets, implementation=implementation)
    loss.backward()
    assert products == [hidden.shape] and frozen.grad is None
    assert torch.allclose(hidden.grad, exact(hidden, weight, targets)[1].float(), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_of_larger_tensors(implementation):
    hidden, weight, targets = problem(12, 6, 20)
    expected = exact(hidden[::2, :5], weight[:, 1:], targets[::2])
    views = [hidden.detach()[::2, :5].requires_grad_(), weight.detach()[:, 1:].requires_grad_(), targets[::2]]
    found = results(*views, linear_cross_entropy(*views, implementation=implementation))
    assert max(error(found, expected)) < 1e-5


def test_autocast_and_other_defaults_change_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "WEIGHT_ROWS", 2)  # so that add_product splits its operands
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = problem(12, 6, 100, dtype)
        expected = results(hidden, weight, targets, linear_cross_entropy(hidden, weight, targets))
        nll = token_nll(hidden, weight, targets)
        torch.set_default_dtype(torch.float16)
        try:
            with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
                found = results(hidden, weight, targets, linear_cross_entropy(hidden, weight, targets))
                assert torch.equal(token_nll(hidden, weight, targets), nll)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_operands_that_do_not_fit_are_refused():
    hidden, weight, targets = problem(6, 5, 11)
    for wrong in ((hidden, weight, targets[:5]), (hidden, weight, targets.int()), (hidden, weight[:, :4], targets),
                  (hidden[None], weight, targets), (hidden.double(), weight, targets)):  # fmt: skip
        for call in (linear_cross_entropy, token_nll):
            with pytest.raises(ValueError, match="expected"):
                call(*wrong)


def test_more_rows_than_pieces(monkeypatch):
    # Two chunks. In both, dWeight is a sum over 70,000 rows, which is more than 16 * WEIGHT_ROWS.
    monkeypatch.setattr(mala.cross_entropy, "CHUNK_BYTES", {"cpu": 4 * 3 * 70_000})
    hidden, weight, targets = problem(140_000, 2, 3)
    found = results(hidden, weight, targets, linear_cross_entropy(hidden, weight, targets))
    assert max(error(found, exact(hidden, weight, targets))) < 1e-5


def test_master_weights_get_float32_gradients_under_bfloat16_products():
    hidden, weight, targets = problem(64, 16, 50, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    found = results(hidden, master, targets, linear_cross_entropy(hidden, master, targets))
    assert (
        torch.autograd.grad(linear_cross_entropy(hidden, master, targets), master)[0].dtype == torch.float32
    )
    assert max(error(found, exact(hidden, weight, targets))) < 2**-7


def test_a_second_backward_is_refused_and_a_wrong_target_named():
    hidden, weight, targets = problem(6, 5, 11)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    for wrong in (11, -1, -101):
        targets[4] = wrong
        for call in (
            lambda: linear_cross_entropy(hidden, weight, targets),
            lambda: token_nll(hidden, weight, targets),
        ):
            with pytest.raises(
                ValueError, match=rf"target {wrong} at index 4 has no row: expected 0 to 10, or -100"
            ):
                call()
    targets[4] = 3
    # Another id for "ignored".
    mine = linear_cross_entropy(hidden, weight, targets.where(targets >= 0, 7), ignore_index=7)
    assert mine.isfinite()


def test_chunks_are_bounded_by_the_budget(monkeypatch):
    held = []
    original = mala.cross_entropy._chunks

    def watch(*args):
        for rows, hidden, weight, targets, memory in original(*args):
            held.append((len(hidden), memory.untyped_storage().nbytes()))
            yield rows, hidden, weight, targets, memory

    monkeypatch.setattr(mala.cross_entropy, "_chunks", watch)
    monkeypatch.setattr(mala.cross_entropy, "CHUNK_BYTES", {"cpu": 4 * 1000 * 170})
    hidden, weight, targets = problem(500, 4, 1000)
    linear_cross_entropy(hidden, weight, targets).backward()
    # Three chunks of up to 170 rows. Equally full ones have 166.7, rounded up to a multiple of 16, but within
    # the budget.
    assert held == [(170, 4 * 1000 * 170), (170, 4 * 1000 * 170), (160, 4 * 1000 * 170)]


if INTERPRETED:

    def test_the_kernel_reads_nothing_for_a_target_that_has_no_row():
        logits = torch.randn(3, 8)
        found = triton_kernel.row_losses(logits, torch.tensor([8, -100, -1]), -100, torch.tensor(1.0))
        assert found[[0, 2]].isnan().all() and found[1] == 0 and not logits[1].any()

    def test_the_kernel_finds_rows_beyond_2_to_the_31():
        # The stride is 2^30, so the third row begins at 2^31. Only pages that are touched take memory.
        logits = torch.empty(2 * 2**30 + 8, dtype=torch.float16).as_strided((3, 8), (2**30, 1))
        logits.copy_(torch.arange(24).view(3, 8) / 4)
        expected = F.cross_entropy(logits.float(), torch.tensor([1, 2, 3]), reduction="none")
        found = triton_kernel.row_losses(logits, torch.tensor([1, 2, 3]), -100, torch.tensor(1.0))
        assert torch.allclose(found, expected) and logits.sum().abs() < 1e-2

else:

    def test_the_triton_kernel_in_its_interpreter():
        pytest.importorskip("triton")
        rest = ["-o", "addopts=", "-p", "no:cacheprovider", "-k", "not chunked"]
        done = subprocess.run([sys.executable, "-m", "pytest", *rest, __file__], cwd=ROOT,
                              env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "passed" in done.stdout.splitlines()[-1]
