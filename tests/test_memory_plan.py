"""Test tools.memory_plan, tools.gpus and tools.dry_run against what PyTorch really keeps, allocates and
multiplies."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_config
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mala.lora import LoRAConfig, add_lora, train_all, trainable_parameters
from mala.loss import cpu
from mala.model import Llama, LlamaConfig, document_mask
from mala.running.distributed import World
from mala.running.settings import Settings
from tools.adamw8bit import AdamW8bit
from tools.dry_run import print_plan, print_time
from tools.gpus import flops_per_token, peak_flops
from tools.known_models import named
from tools.memory_plan import Step, block_activations, memory_plan, recomputed_blocks, step_of


def planned(config: LlamaConfig, dtype=torch.float32, recomputed=0, device="meta", **lora) -> Llama:
    """Return a model with LoRA. lora: fields of LoRAConfig, or `train_all=True` to train all weights."""
    with torch.device(device):
        model = Llama(config).to(dtype)
    if lora.pop("train_all", False):
        train_all(model)
    else:
        add_lora(model, LoRAConfig(**lora))
    model.recomputed_blocks = recomputed
    return model.train()


def total(rows) -> int:
    return sum(size for *_, size in rows)


def kept_bytes(model: Llama, batch: int, seq_len: int) -> int:
    """Return the bytes of the storages, except parameters, that the first block keeps for its backward pass.

    Parameters do not grow with the number of tokens, and neither do views of them.
    """
    config, kept = model.config, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    angles = torch.zeros(seq_len, config.head_dim // 2)
    x = torch.randn(batch, seq_len, config.hidden_size, dtype=model.lm_head.weight.dtype).requires_grad_()
    x = x.to(model.compute_dtype)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model["layers"][0](x, angles, angles, None)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 24), (8, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_block_are_what_autograd_keeps(dtype, heads, dropout, targets):
    H, K, head_dim = heads
    config = tiny_config(
        hidden_size=64, intermediate_size=176, num_attention_heads=H, num_key_value_heads=K, head_dim=head_dim
    )
    model = planned(config, dtype, device="cpu", lora_dropout=dropout, target_modules=targets)
    # The difference removes what does not grow with the number of tokens: the angles, and A and B in the
    # compute dtype.
    per_token = (kept_bytes(model, 3, 32) - kept_bytes(model, 1, 32)) / (2 * 32)
    _, found = block_activations(model, 0, Step(32, 1, False))
    if dropout:
        assert found == per_token
    else:  # an input that layers share is counted for each of them
        assert per_token <= found <= 1.25 * per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_block_that_trains_whole(dtype):
    config = tiny_config(hidden_size=64, intermediate_size=176, head_dim=16)
    model = planned(config, dtype, device="cpu", train_all=True)
    per_token = (kept_bytes(model, 3, 32) - kept_bytes(model, 1, 32)) / (2 * 32)
    _, found = block_activations(model, 0, Step(32, 1, False))
    assert found == per_token


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", None])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_of_a_compiled_block_are_what_the_compiler_keeps(kv_heads, dropout, targets):
    """The compiler decides what to keep when it splits the graph into forward and backward. A backend that
    generates no code is therefore enough."""
    config = tiny_config(hidden_size=64, intermediate_size=176, num_key_value_heads=kv_heads)
    lora = {"lora_dropout": dropout, "target_modules": targets} if targets else {"train_all": True}
    model = planned(config, torch.bfloat16, device="cpu", **lora)
    torch._dynamo.reset()  # otherwise it compiles a function at most 8 times
    model.model["layers"][0].compile(backend="aot_eager_decomp_partition", dynamic=False)
    per_token = (kept_bytes(model, 3, 32) - kept_bytes(model, 1, 32)) / (2 * 32)
    _, found = block_activations(model, 0, Step(32, 1, False, is_compiled=True))
    assert per_token <= found <= (1.01 if dropout else 1.25) * per_token


def allocated_at_most(
    config, dtype, recomputed, accumulates, batch, seq_len, adamw=torch.optim.AdamW, masked=False, **lora
) -> int:
    """Return the peak of PyTorch's allocations in two training steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = planned(config, dtype, recomputed, **lora).to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        trained = list(trainable_parameters(model).values())
        optimizer = adamw(trained, fused=True)
        for _ in range(2):
            for _ in range(2 if accumulates else 1):
                tokens = torch.randint(config.vocab_size, (batch, seq_len))
                mask = document_mask(tokens, 1, dtype) if masked else None
                model(tokens, targets=tokens, share=0.5, mask=mask).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


@pytest.mark.parametrize("vocab_size, tied, batch, worst", [
    (10_000, False, 1, "loss"),
    (10_000, True, 1, "loss"),
    (10_000, False, 8, "loss"),
    (200, False, 8, "backward of a block"),
])  # fmt: skip
@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize(
    "dtype, recomputed", [(torch.float32, 0), (torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 3)]
)
def test_planned_memory_is_what_training_allocates(
    vocab_size, tied, batch, worst, accumulates, dtype, recomputed, monkeypatch
):
    monkeypatch.setattr(cpu, "WEIGHT_ROWS", 256)  # the default 4,096 would be much for so few pieces
    config = tiny_config(vocab_size=vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                         tie_word_embeddings=tied)  # fmt: skip
    rows = memory_plan(planned(config, dtype, recomputed), Step(32, batch, accumulates))
    allocated = allocated_at_most(config, dtype, recomputed, accumulates, batch, 32)
    assert 0.93 * allocated <= total(rows) <= 1.1 * allocated
    if accumulates:
        assert {part.partition(":")[0] for part, *_ in rows if ":" in part} == {worst}


@pytest.mark.parametrize("moments, recomputed", [("8bit", 0), ("8bit", 2), ("8bit", 4), ("float32", 2)])
def test_the_plan_of_settings_that_save_memory_is_within_a_twentieth(moments, recomputed, monkeypatch):
    monkeypatch.setattr(cpu, "WEIGHT_ROWS", 256)
    config = tiny_config(vocab_size=30_000, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                         max_position_embeddings=128)  # fmt: skip
    adamw, moment_bytes = (AdamW8bit, 1) if moments == "8bit" else (torch.optim.AdamW, 4)
    step = Step(128, 4, accumulates=True, moment_bytes=moment_bytes)
    found = total(memory_plan(planned(config, torch.bfloat16, recomputed), step))
    allocated = allocated_at_most(config, torch.bfloat16, recomputed, True, 4, 128, adamw)
    assert found == pytest.approx(allocated, rel=0.05)


NEW = list(range(20_000, 30_000))


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("dtype, recomputed, masked", [
    (torch.float32, 0, False), (torch.bfloat16, 0, False), (torch.bfloat16, 4, True), (torch.float32, 4, True),
])  # fmt: skip
@pytest.mark.parametrize("what", [
    {"train_all": True},
    {"modules_to_save": (), "trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
])  # fmt: skip
def test_the_plan_knows_all_weights_new_rows_and_masks(
    what, dtype, recomputed, masked, accumulates, monkeypatch
):
    monkeypatch.setattr(cpu, "WEIGHT_ROWS", 256)
    config = tiny_config(vocab_size=30_000, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                         max_position_embeddings=128)  # fmt: skip
    step = Step(128, 4, accumulates, attends_document=masked)
    found = total(memory_plan(planned(config, dtype, recomputed, **what), step))
    allocated = allocated_at_most(config, dtype, recomputed, accumulates, 4, 128, masked=masked, **what)
    assert found == pytest.approx(allocated, rel=0.07)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = planned(config, device="cpu")
    tokens = torch.randint(config.vocab_size, (2, 16))
    with FlopCounterMode(display=False) as counted:
        model(tokens, targets=tokens).backward()
    # PyTorch does not count a CPU's flash attention, and seq_len 0 leaves it out here, too.
    assert flops_per_token(model, 0) * tokens.numel() == counted.get_total_flops()
    attention = flops_per_token(model, 16) - flops_per_token(model, 0)
    assert (
        attention == 3 * 4 * config.num_hidden_layers * 16 * config.hidden_size
    )  # 3: the forward pass, and twice as much for the backward pass


def test_only_what_trains_has_the_gradient_of_a_weight():
    whole = planned(tiny_config(), target_modules=("q_proj",), r=4)
    frozen = planned(tiny_config(), target_modules=("q_proj",), r=4, modules_to_save=())
    assert flops_per_token(whole, 8) - flops_per_token(frozen, 8) == 2 * whole.lm_head.weight.numel()


def test_parameters_take_what_they_take():
    model = planned(tiny_config(), torch.bfloat16, device="cpu")
    rows = {part: size for part, _, size in memory_plan(model, Step(16, 1, False))}
    trained = sum(parameter.nbytes for parameter in trainable_parameters(model).values())
    assert rows["trained parameters"] == trained and rows["AdamW's two moments"] == 2 * trained
    assert rows["frozen parameters"] == sum(parameter.nbytes for parameter in model.parameters()) - trained
    sharded = {part: size for part, _, size in memory_plan(model, Step(16, 1, False, processes=4))}
    assert sharded["trained parameters"] == trained // 4 and sharded["AdamW's two moments"] == trained // 2


LLAMA2_7B = named("llama-2-7b", vocab_size=260164)
RECIPE = Settings(seq_len=4096, batch_size=8, micro_batch_size=1, device="cuda", dtype="bfloat16")


def on_a_gpu(recomputed: int, **changes) -> int:
    """Return the planned bytes of MaLA-500's recipe on one GPU, without those that PyTorch does not count."""
    step = step_of(replace(RECIPE, **changes), 1, "cuda")
    rows = memory_plan(planned(LLAMA2_7B, torch.bfloat16, recomputed), step)
    return sum(size for part, _, size in rows if not part.startswith("CUDA context"))


@pytest.mark.parametrize("recomputed, measured", [(32, 59.1e9), (0, 73.5e9)])
def test_the_plan_is_what_an_h100_showed(recomputed, measured):
    """Compare with PyTorch's own count at commit eb9a2d7 (80 GB GPU, LLaMA 2 7B with 260,164 rows). At that
    commit the loss held a second gradient of lm_head, and the script held the unused bfloat16 head."""
    gradient, head = 260164 * 4096 * 4, 260164 * 4096 * 2
    assert on_a_gpu(recomputed) + gradient + head == pytest.approx(measured, rel=0.01)


def test_moments_of_8_bits_fit_the_recipe_into_40_gb():
    assert on_a_gpu(32, moments="8bit") < 40e9 < on_a_gpu(32) < 60e9


@pytest.mark.parametrize("room, expected", [(20e9, 32), (60e9, 19), (math.inf, 0)])
def test_auto_recomputes_as_few_blocks_as_fit(room, expected):
    model = planned(LLAMA2_7B, torch.bfloat16)
    recomputed = recomputed_blocks(model, RECIPE, World(device="cuda"), room)
    assert recomputed == pytest.approx(expected, abs=1)
    if 0 < recomputed < 32:
        assert on_a_gpu(recomputed) + 1.5e9 <= room < on_a_gpu(recomputed - 1) + 1.5e9
    for setting, blocks in (("on", 32), ("off", 0)):
        chosen = replace(RECIPE, gradient_checkpointing=setting)
        assert recomputed_blocks(model, chosen, World(device="cuda"), room) == blocks


def test_a_plan_names_its_stage_and_says_where_it_fits(capsys):
    model = planned(LLAMA2_7B, torch.bfloat16)
    chosen = replace(RECIPE, gradient_checkpointing="on")
    print_plan(model, chosen, 1000, World(device="cuda"))
    printed = capsys.readouterr().out
    assert "training 2,135,457,792 of 8,611,729,408 parameters (24.8%)" in printed
    assert "32,768,000 tokens" in printed and "loss: lm_head, cast" in printed
    needed = (on_a_gpu(32) + 1.5e9) / 1e9
    assert re.search(rf"total +{needed:.2f}\n", printed)
    assert re.search(
        rf"--moments float32 --gradient-checkpointing on +{needed:.2f}  80 GB or more\n", printed
    )
    assert re.search(r"--moments 8bit --gradient-checkpointing on +\d\d\.\d\d  40 GB or more\n", printed)
    eight = total(memory_plan(model, step_of(replace(RECIPE, batch_size=64), 8, "cuda")))
    assert 20e9 < eight < needed * 1e9

    print_time(model, 32_768_000, 4096, 1, "NVIDIA H100 80GB HBM3")
    hours = 32_768_000 * flops_per_token(model, 4096) / 494.5e12 / 3600
    printed = capsys.readouterr().out
    assert printed == f"at half the peak of NVIDIA H100 80GB HBM3 (989 TFLOP/s): {hours:.2f} hours\n"
    print_time(model, 32_768_000, 4096, 1, "NVIDIA A10G")  # an unknown GPU
    assert not capsys.readouterr().out

    print_plan(model, replace(RECIPE, batch_size=16, micro_batch_size=16), 9, World(device="cuda"))
    assert re.search(r"float32 --gradient-checkpointing off +\d{3}\.\d\d +none\n", capsys.readouterr().out)


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA A10G", None),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA RTX 6000 Ada Generation", 364e12),
    ("Quadro RTX 6000", None),
    ("Tesla V100-SXM2-16GB", 125e12),
    ("AMD Instinct MI250X", 191.5e12),
    ("NVIDIA GB200", 2500e12),
])  # fmt: skip
def test_peak_flops_by_name(name, flops):
    assert peak_flops(name) == flops


def test_peak_memory_is_that_of_the_process_alone():
    """Linux starts a child's ru_maxrss at its parent's peak. So all runs of an experiment would show that."""
    child = "from tools.run_log import peak_memory; print(peak_memory('cpu'))"
    parent = f"""if True:
        import subprocess, sys
        held = b"x" * (1500 << 20)
        print(subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True).stdout)
    """
    ran = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True)
    assert 2**26 < int(ran.stdout) < 1000 << 20
