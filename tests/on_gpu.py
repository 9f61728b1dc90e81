"""Compare what a GPU computes with what a CPU computes in float32 or float64.

test_gpu.py starts this file. To check the tests themselves on a CPU:
`MALA_GPU=cpu python -m pytest -n 0 tests/on_gpu.py`.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_config
from test_train import SHORT, call

from mala.cross_entropy import linear_cross_entropy, token_nll
from mala.generate import generate
from mala.lora import LoRAConfig, add_lora, train_all, trainable_parameters
from mala.model import Llama, document_mask
from mala.scoring import documents_nll, loglikelihoods
from mala.words.tokenizer import Tokenizer
from tools.known_models import init_weights
from tools.memory_plan import Step, memory_plan

DEVICE = os.environ["MALA_GPU"]
TINY = ROOT / "assets/tiny-llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, v", [(1, 7), (300, 7), (64, 128), (70, 32_001), (33, 50_257), (40, 260_164)])
def test_the_loss_and_its_gradients(n, v, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 128, generator=generator).to(dtype)
    weight = (torch.randn(v, 128, generator=generator) / 3).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[::3] = -100
    targets[0] = v - 1
    operands = [tensor.to(DEVICE) for tensor in (hidden, weight)]
    found, bits = [], []
    for share in (None, None, 0.5):
        h, w = (
            tensor.float().requires_grad_() if share else tensor.clone().requires_grad_()
            for tensor in operands
        )
        h = h.to(dtype) if share else h  # as in training: hidden states in bfloat16, a float32 weight
        loss = linear_cross_entropy(h, w, targets.to(DEVICE), share=share)
        loss.backward()
        found = [loss.detach() / (share or 1), w.grad / (share or 1)]
        bits.append([loss.detach(), w.grad])
        exact_weight = weight.detach().double().requires_grad_()
        exact = F.cross_entropy(hidden.detach().double() @ exact_weight.T, targets)
        exact.backward()
        for a, b in zip(found, (exact.detach(), exact_weight.grad)):
            assert (a.cpu().double() - b).norm() <= 20 * torch.finfo(dtype).eps * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(*bits[:2]))  # two runs give the same bits
    nll = token_nll(*operands, targets.to(DEVICE))
    assert nll.sum().item() == pytest.approx(exact.item() * (targets != -100).sum().item(), rel=0.02)


def choose(model: Llama, what: str) -> None:
    """Make "lora" with the embeddings and head train, or "rows" of these only, or "all" weights."""
    if what == "all":
        return train_all(model)
    rows = list(range(model.config.vocab_size * 7 // 10, model.config.vocab_size))
    rows = {"modules_to_save": (), "trainable_token_indices": {"embed_tokens": rows, "lm_head": rows}}
    add_lora(model, LoRAConfig(lora_dropout=0.0, **(rows if what == "rows" else {})))


def step_of(dtype: torch.dtype, device: str, is_compiled: bool, recomputed: int, what="lora", **sizes):
    """Return the loss and all gradients of a training step of two micro-batches."""
    model = Llama(
        tiny_config(vocab_size=1001, hidden_size=64, intermediate_size=176, num_hidden_layers=3, **sizes)
    )
    init_weights(model, 0)
    model.to(dtype)
    torch.manual_seed(0)
    choose(model, what)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(device).train()
    model.recomputed_blocks = recomputed
    torch._dynamo.reset()
    for block in model.model["layers"]:
        if is_compiled:
            block.compile()
    tokens = torch.randint(1001, (4, 33), generator=torch.Generator().manual_seed(1)).to(device)
    total = 0
    for rows in (slice(0, 2), slice(2, 4)):
        x, y = tokens[rows, :-1], tokens[rows, 1:]
        mask = document_mask(x, int(x[0, 9]), model.compute_dtype) if what == "all" else None
        loss = model(x, targets=y, share=0.5, mask=mask)
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.cpu() for parameter in trainable_parameters(model).values()]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize("what, kv_heads", [("lora", 4), ("lora", 2), ("rows", 2), ("all", 2)])
def test_a_step_has_the_loss_and_gradients_of_a_cpus(what, kv_heads, recomputed, is_compiled):
    sizes = {"what": what, "num_key_value_heads": kv_heads}
    expected, wanted = step_of(torch.float32, "cpu", False, 0, **sizes)
    for dtype, loss_error, error in ((torch.float32, 1e-5, 1e-3), (torch.bfloat16, 1e-3, 0.05)):
        loss, gradients = step_of(dtype, DEVICE, is_compiled, recomputed, **sizes)
        assert loss == pytest.approx(expected, rel=loss_error)
        for a, b in zip(gradients, wanted):
            assert (a - b).norm() <= error * b.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="tests/test_memory_plan.py measures on a CPU")
@pytest.mark.parametrize(
    "recomputed, what", [(0, "lora"), (2, "lora"), (4, "lora"), (0, "rows"), (0, "all"), (4, "all")]
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_step_takes_the_planned_memory(is_compiled, recomputed, what):
    config = tiny_config(vocab_size=50_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048)  # fmt: skip
    with torch.device(DEVICE):
        model = Llama(config).to(torch.bfloat16)
    choose(model, what)
    model.recomputed_blocks = recomputed
    torch._dynamo.reset()
    for block in model.model["layers"]:
        if is_compiled:
            block.compile()
    trained = list(trainable_parameters(model.train()).values())
    optimizer = torch.optim.AdamW(trained, fused=True)
    for turn in range(2):
        for _ in range(2):
            tokens = torch.randint(50_000, (8, 2048), device=DEVICE)
            model(tokens, targets=tokens, share=0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
        if turn == 0:
            torch.cuda.reset_peak_memory_stats()
    parts = memory_plan(model, Step(2048, 8, True, device="cuda", is_compiled=is_compiled))
    planned = sum(size for name, _, size in parts if not name.startswith("CUDA"))
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.05)


def test_scores_and_generated_text_are_those_of_a_cpu():
    tokenizer = Tokenizer.from_pretrained(TINY)
    documents = ["one", "two words", "a rather long document that goes on " * 9, "x"] * 40
    labels = [" a", " be good", " see what comes of it"]
    encoded = [(tokenizer.encode(text), [tokenizer.encode(label) for label in labels]) for text in documents]
    ids, found = tokenizer.encode("The topic of the news", bos=True), []
    for device, is_compiled in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        model = Llama.from_pretrained(TINY, torch.float32, device).eval()
        torch._dynamo.reset()
        for block in model.model["layers"]:
            if is_compiled:
                block.compile(dynamic=True)
        nll, counts = documents_nll(model, tokenizer, documents)
        scores = loglikelihoods(model, encoded)
        text = list(generate(model, ids, 30, temperature=0)) if not is_compiled else None
        found.append((torch.tensor(nll), torch.tensor(scores), text))
    for nll, scores, text in found[1:]:
        assert torch.allclose(nll, found[0][0], rtol=1e-4, atol=1e-3)
        assert torch.allclose(scores, found[0][1], rtol=1e-4, atol=1e-3)
        assert text is None or text == found[0][2]


def losses(out: Path) -> torch.Tensor:
    return torch.tensor(
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    )


def test_runs_of_all_settings_and_a_resumed_one_have_the_losses_of_a_cpu(tmp_path):
    short = [
        *SHORT,
        "--log-every",
        "1",
        "--save-every",
        "3",
        "--keep",
        "9",
        "--lora-dropout",
        "0",
        "--dtype",
        "float32",
    ]
    runs = {
        "cpu": ["--device", "cpu"],
        "eager": ["--device", DEVICE, "--compile", "off"],
        "compiled": ["--device", DEVICE, "--compile", "on", "--micro-batch-size", "2"],
        "recomputed": ["--device", DEVICE, "--compile", "on", "--gradient-checkpointing", "on"],
        "8bit": ["--device", DEVICE, "--compile", "on", "--moments", "8bit"],
        "all": [
            "--device",
            DEVICE,
            "--train",
            "all",
            "--attend",
            "document",
            "--eval-every",
            "3",
            "--samples",
            "swh_Latn",
        ],
        "new": ["--device", DEVICE, "--train-rows", "new", "--eval-every", "3", "--samples", "swh_Latn"],
    }
    for name, more in runs.items():
        done = call("train.py", *short, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    step_3 = tmp_path / "compiled/checkpoints/step-3"
    done = call("train.py", *short, *runs["compiled"], "--resume", step_3, "--out", tmp_path / "resumed")
    assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "cpu")
    for name in ("all", "new"):  # these train other weights, so each needs its own CPU run
        done = call("train.py", *short, *runs[name], "--device", "cpu", "--out", tmp_path / f"{name}-cpu")
        assert (losses(tmp_path / name) - losses(tmp_path / f"{name}-cpu")).abs().max() < 2e-3, name
    for name in [*runs.keys() - {"all", "new"}, "resumed"]:
        assert (losses(tmp_path / name) - expected[-len(losses(tmp_path / name)) :]).abs().max() < 2e-3, name
    assert len(losses(tmp_path / "resumed")) == 3
    for bench in ("nll", "sib200"):
        command = ["evaluate.py", "--bench", bench, "--model", tmp_path / "compiled", "--limit", "8"]
        done = call(*command, "--device", DEVICE, "--out", tmp_path / bench)
        assert done.returncode == 0, done.stderr
