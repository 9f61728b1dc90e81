"""tools.memory_plan, flops and tools.dry_run against what PyTorch really keeps, allocates and
multiplies."""

import pytest
import torch
from conftest import tiny_config
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mala.lora import LoRAConfig, add_lora, trainable_parameters
from mala.model import Llama, LlamaConfig
from mala.running.flops import flops_per_token
from tools.dry_run import Sizes, print_plan, print_time
from tools.gpus import peak_flops
from tools.memory_plan import block_activations, memory_plan


def planned(config: LlamaConfig, dtype=torch.float32, checkpointing=False, device="meta", **lora) -> Llama:
    with torch.device(device):
        model = Llama(config).to(dtype)
    add_lora(model, LoRAConfig(**lora))
    model.gradient_checkpointing = checkpointing
    return model.train()


def total(rows) -> int:
    return sum(size for *_, size in rows)


def kept_bytes(model: Llama, batch: int, seq_len: int) -> int:
    """Bytes of the storages, other than parameters, that the first block keeps for its backward pass."""
    config, kept = model.config, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    angles = torch.zeros(seq_len, config.head_dim // 2)
    x = torch.randn(batch, seq_len, config.hidden_size, dtype=model.lm_head.weight.dtype).requires_grad_()
    x = x.to(model.model["layers"][0].mlp.down_proj.weight.dtype)
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
    # What does not grow with the tokens, angles and A and B in the compute dtype, falls out of the
    # difference.
    per_token = (kept_bytes(model, 3, 32) - kept_bytes(model, 1, 32)) / (2 * 32)
    _, found = block_activations(model, 0, "cpu")
    if dropout:
        assert found == per_token
    else:  # what layers share is counted for each of them
        assert per_token <= found <= 1.25 * per_token


def allocated_at_most(config, dtype, checkpointing, accumulates, batch, seq_len) -> int:
    """The peak of PyTorch's allocations over two steps of training."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = planned(config, dtype, checkpointing).to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        trained = list(trainable_parameters(model).values())
        optimizer = torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            for _ in range(2 if accumulates else 1):
                tokens = torch.randint(config.vocab_size, (batch, seq_len))
                model(tokens, targets=tokens).backward()
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
    (10_000, True, 1, "backward of embed_tokens"),
    (10_000, False, 8, "loss"),
    (200, False, 8, "backward of a block"),
])  # fmt: skip
@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize(
    "dtype, checkpointing", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_planned_memory_is_what_training_allocates(
    vocab_size, tied, batch, worst, accumulates, dtype, checkpointing
):
    config = tiny_config(vocab_size=vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                         tie_word_embeddings=tied)  # fmt: skip
    rows = memory_plan(
        planned(config, dtype, checkpointing), 32, batch, accumulates, processes=1, device_type="cpu"
    )
    allocated = allocated_at_most(config, dtype, checkpointing, accumulates, batch, 32)
    assert 0.93 * allocated <= total(rows) <= 1.1 * allocated
    if accumulates:
        assert {part.partition(":")[0] for part, *_ in rows if ":" in part} == {worst}


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = planned(config, device="cpu")
    tokens = torch.randint(config.vocab_size, (2, 16))
    with FlopCounterMode(display=False) as counted:
        model(tokens, targets=tokens).backward()
    # PyTorch does not count the flash attention of a CPU, which is what a block of no tokens leaves out.
    assert flops_per_token(model, 0) * tokens.numel() == counted.get_total_flops()
    attention = flops_per_token(model, 16) - flops_per_token(model, 0)
    assert (
        attention == 3 * 4 * config.num_hidden_layers * 16 * config.hidden_size
    )  # 3: forward and twice that backward


def test_only_what_trains_has_the_gradient_of_a_weight():
    whole = planned(tiny_config(), target_modules=("q_proj",), r=4)
    frozen = planned(tiny_config(), target_modules=("q_proj",), r=4, modules_to_save=())
    assert flops_per_token(whole, 8) - flops_per_token(frozen, 8) == 2 * whole.lm_head.weight.numel()


def test_parameters_take_what_they_take():
    model = planned(tiny_config(), torch.bfloat16, device="cpu")
    rows = {part: size for part, _, size in memory_plan(model, 16, 1, False, processes=1, device_type="cpu")}
    trained = sum(parameter.nbytes for parameter in trainable_parameters(model).values())
    assert rows["trained parameters"] == trained and rows["AdamW's two moments"] == 2 * trained
    assert rows["frozen parameters"] == sum(parameter.nbytes for parameter in model.parameters()) - trained
    sharded = {
        part: size for part, _, size in memory_plan(model, 16, 1, False, processes=4, device_type="cpu")
    }
    assert sharded["trained parameters"] == trained // 4 and sharded["AdamW's two moments"] == trained // 2


LLAMA2_7B = LlamaConfig.named("llama-2-7b", vocab_size=260164)


def test_mala500_fits_one_gpu_of_80_gb_and_less_on_eight(capsys):
    model = planned(LLAMA2_7B, torch.bfloat16, checkpointing=True)
    one = total(memory_plan(model, 4096, 1, accumulates=True, processes=1, device_type="cuda"))
    eight = total(memory_plan(model, 4096, 1, accumulates=True, processes=8, device_type="cuda"))
    assert 45e9 < one < 80e9 and 20e9 < eight < 40e9
    parts = [part for part, _, _ in memory_plan(model, 4096, 1, True, 1, "cuda")]
    assert parts[0] == "frozen parameters" and parts[-1] == "CUDA context, cuBLAS workspace, fragmentation"
    assert "loss: lm_head, cast" in parts  # of a stage only, which is named

    sizes = Sizes(seq_len=4096, batch_size=8, micro_batch_size=1, processes=1, steps=1000)
    print_plan(model, sizes, "cuda")
    printed = capsys.readouterr().out
    assert "training 2,135,457,792 of 8,611,729,408 parameters (24.8%)" in printed
    assert "32,768,000 tokens" in printed and f"{one / 1e9:.2f}\nfits a GPU of 64 GB or more\n" in printed

    print_time(model, sizes, "NVIDIA H100 80GB HBM3")
    hours = 32_768_000 * flops_per_token(model, 4096) / 494.5e12 / 3600
    printed = capsys.readouterr().out
    assert printed == f"at half of the peak of NVIDIA H100 80GB HBM3, 989 TFLOP/s: {hours:.2f} hours\n"
    print_time(model, sizes, "NVIDIA A10G")  # not known
    assert not capsys.readouterr().out

    model.gradient_checkpointing = False
    sizes.micro_batch_size = 8
    print_plan(model, sizes, "cuda")
    assert "fits no GPU of up to 192 GB" in capsys.readouterr().out


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
