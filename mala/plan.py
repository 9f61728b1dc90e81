"""What a training run takes, before it is started: memory on a device, FLOPs a token, time.

Everything but the time follows from shapes and dtypes, so the model may lie on `meta`, where it takes no memory: LLaMA 2 7B is
planned on a laptop. The memory is that of the worst stage of an optimizer step, since not all of it is held at once:

    lookup in embed_tokens  ->  blocks  ->  loss  ->  backward of the blocks  ->  backward of embed_tokens  ->  AdamW

Letters in the arithmetic: N tokens of a micro-batch (B · T), D hidden size, F intermediate size, H query heads and K key/value
heads of d dimensions, L layers, V vocabulary. GB are 10^9 bytes.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from mala.cli import UserError, choose_device, print_table
from mala.corpus import Corpus
from mala.cross_entropy import CHUNK_BYTES
from mala.lora import LoRALinear, add_lora, parameter_report, trainable_parameters
from mala.model import Llama, LlamaConfig
from mala.tokenizer import Tokenizer

# What `torch.cuda.get_device_name()` has in it -> FLOP/s in bfloat16 with float32 sums, as the maker publishes them, without
# sparsity, which doubles the figures of most data sheets. V100 and T4 have no bfloat16: theirs are float16.
KNOWN_GPUS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835.5e12, "H200": 989e12,
    "H100 NVL": 835.5e12, "H100 PCIe": 756e12, "H100": 989e12, "H800 PCIe": 756e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "V100S": 130e12, "V100-SXM2": 125e12, "V100-PCIE": 112e12, "T4": 65e12,
    "MI325X": 1307e12, "MI300X": 1307e12, "MI210": 181e12,
    "MI250X": 191.5e12, "MI250": 181e12,  # half a card: PyTorch sees each of its two dies as a device
}  # fmt: skip
GPU_SIZES = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU that PyTorch calls `name`; None where it is not known."""
    if re.search(r"\b(MIG|Laptop|Ti|D)\b", name):  # a slice, or another chip under nearly the same name
        return None
    # Whole words, since A10 is found in A100 and A10G, too; the longest first, since H100 is found in H100 PCIe.
    found = [known for known in KNOWN_GPUS if re.search(rf"\b{known}\b", name)]
    return KNOWN_GPUS[max(found, key=len)] if found else None


def flops_per_token(model: Llama, seq_len: int) -> int:
    """Model FLOPs of a training step, forward and backward, per token of blocks of `seq_len`.

    As PaLM counts them (arXiv 2204.02311, appendix B): what gradient checkpointing computes again does not count, and attention
    counts whole, though under the causal mask half would do. Each element of a matrix takes 2 FLOPs forward, 2 for the gradient
    of its input (in the first block that takes embeddings that train) and 2 for its own where it trains. The embeddings are
    looked up, which takes none.
    """
    flops = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # LoRALinear and lm_head are, too
            lora = [module.lora_A, module.lora_B] if isinstance(module, LoRALinear) else []
            flops += sum(matrix.numel() * (6 if matrix.requires_grad else 4) for matrix in [module.weight, *lora])
    config = model.config
    return flops + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len


def block_activations(model: Llama, layer: int, device_type: str) -> tuple[str, int]:
    """What a block's forward pass keeps for its backward pass: (arithmetic, bytes a token), without torch.compile.

    In float32: what the two norms square (D elements each) and divide by (1), and attention's log-sum-exp (H); flash attention
    keeps no T x T matrix. In the compute dtype: q, k, v, attention's output, gate, silu(gate), up. A frozen matrix does not
    need its input again. LoRA's A does, after dropout, and dropout its mask; B needs the R elements that A gives.
    """
    config, block = model.config, model.model["layers"][layer]
    e = block.mlp.down_proj.weight.itemsize
    size = 4 * (2 * config.hidden_size + 2 + config.num_attention_heads)
    size += e * 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    size += e * 3 * config.intermediate_size
    lora = 0
    for module in block.modules():
        if isinstance(module, LoRALinear):
            # The mask is bool on a GPU and of the compute dtype on a CPU. Inputs that layers share without dropout count twice.
            mask = 0 if module.dropout == 0 else 1 if device_type == "cuda" else e
            lora += (e + mask) * module.in_features + e * len(module.lora_A)
    return f"4 (2 D + 2 + H) + {e} (2 H d + 2 K d + 3 F) + LoRA's {lora:,}", size + lora


def memory_plan(model: Llama, seq_len: int, micro_batch_size: int, accumulates: bool, processes: int,
                device_type: str) -> list[tuple[str, str, int]]:  # fmt: skip
    """(part, arithmetic, bytes) of all that a device holds at the worst stage of a step; the sum is the peak.

    model: with LoRA, the frozen parameters in the compute dtype, `gradient_checkpointing` as it will be. micro_batch_size:
    sequences of `seq_len` tokens on a device. accumulates: a step has several micro-batches. processes: over which FSDP2
    divides the model, as `mala.distributed.shard` does. For a CPU it is what PyTorch allocates, without Python itself. An
    estimate, but a close one: tests/test_plan.py holds it against PyTorch's allocations.
    """
    config, layers, P = model.config, model.model["layers"], processes
    embed_tokens, lm_head = model.model["embed_tokens"].weight, model.lm_head.weight
    tied = embed_tokens is lm_head
    N, L, D, F, VD = micro_batch_size * seq_len, len(layers), config.hidden_size, config.intermediate_size, lm_head.numel()
    e = layers[0].mlp.down_proj.weight.itemsize  # of the compute dtype
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    rows: list[tuple[str, str, int, str]] = []

    def add(part: str, arithmetic: str, size: int, alive: str) -> None:
        """Note a part, and the stages at which it is there."""
        if size:
            rows.append((part, arithmetic, size, alive))

    always = "lookup loss block embed_tokens"
    shard = f" / {P}" if P > 1 else ""
    add("frozen parameters", f"{frozen:,} x {e}{shard}", frozen * e // P, always)
    add("trained parameters", f"{trained:,} x 4{shard}", trained * 4 // P, always)
    add("AdamW's two moments", f"{trained:,} x 2 x 4{shard}", trained * 2 * 4 // P, always)
    # Those of earlier micro-batches, whole: FSDP2 shards their average. Without accumulation all are there at the end only.
    add("gradients", f"{trained:,} x 4", trained * 4, always if accumulates else "embed_tokens")

    # A micro-batch's own gradients of the two large matrices, until they are added to those that accumulate. Where the two are
    # one matrix, what the loss gives to its gradient waits for what the lookup gives.
    if lm_head.requires_grad:
        add("gradient of lm_head", "V D x 4", VD * 4, "loss" + " block" * (tied or not accumulates)
            + " embed_tokens" * (tied and accumulates))  # fmt: skip
    if embed_tokens.requires_grad and (accumulates or tied):
        add("gradient of embed_tokens", "V D x 4", VD * 4, "embed_tokens")

    # Activations. A block is at its fullest when its backward pass reaches gate and up: what it kept is all there yet.
    kept = [block_activations(model, layer, device_type) for layer in range(L)]
    arithmetic, largest = max(kept, key=lambda block: block[1])
    if model.gradient_checkpointing:
        add("inputs of the blocks", f"L N D x {e}", L * N * D * e, "loss block")
        add("activations of a block, computed again", f"N ({arithmetic})", N * largest, "block")
    else:
        add("activations of the blocks", f"L N ({arithmetic})", N * sum(size for _, size in kept), "loss block")
    add("gradients of activations", f"N (3 F + 2 D) x {e}", N * (3 * F + 2 * D) * e, "block")
    add("last norm, hidden states, their gradient", f"N D (4 + {e} + 4)", N * D * (8 + e), "loss")

    # The loss: see mala/cross_entropy.py.
    if lm_head.itemsize != e:
        add("lm_head, cast", f"V D x {e}", VD * e, "loss")
    chunk = max(CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]), len(lm_head) * e)
    add("logits, a chunk", f"N V x {e}, at most {chunk:,}", min(N * len(lm_head) * e, chunk), "loss")

    if P > 1:  # what FSDP2 gathers: the block that is computed and, meanwhile, the next one; lm_head for all of the step
        block = max(sum(parameter.numel() * parameter.itemsize for parameter in block.parameters()) for block in layers)
        add("two blocks, gathered", f"2 x {block:,}", 2 * block, "loss block")
        whole, looked_up = VD * lm_head.itemsize, 0 if tied else VD * embed_tokens.itemsize
        add("lm_head, gathered", f"V D x {lm_head.itemsize}", whole, always)
        add("embed_tokens, gathered", f"V D x {embed_tokens.itemsize}", looked_up, "lookup embed_tokens")
        add("buffers that both came in", f"{whole:,} + {looked_up:,}", whole + looked_up, "lookup")
        if not accumulates and (lm_head.requires_grad or embed_tokens.requires_grad):
            add("copy of a gradient, to be divided", "V D x 4", VD * 4, "embed_tokens")
        # Every process loads the model whole, and then lets go what is the others'.
        add("frozen parameters, whole", f"{frozen:,} x {e}", frozen * e, "loading")
        add("trained parameters, whole", f"{trained:,} x 4", trained * 4, "loading")
        add("embed_tokens, as it was before it was cast", f"V D x {e}", VD * e, "loading")
    if device_type == "cuda":
        add("CUDA context, cuBLAS workspace, fragmentation", "about", 1_500_000_000, f"{always} loading")

    names = {"lookup": "lookup in embed_tokens", "loss": "loss", "block": "backward of a block",
             "embed_tokens": "backward of embed_tokens", "loading": "loading"}  # fmt: skip
    worst = max(names, key=lambda stage: sum(size for *_, size, alive in rows if stage in alive.split()))
    return [(part if alive.startswith(always) else f"{names[worst]}: {part}", arithmetic, size)
            for part, arithmetic, size, alive in rows if worst in alive.split()]  # fmt: skip


def dry_run(settings: Any) -> None:
    """What `train.py --dry-run` prints; settings are train.py's. Nothing is written, no weights need be there yet, and neither
    need the GPU be for which --device cuda plans."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size = settings.micro_batch(processes)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    device, dtype = choose_device(settings.device, settings.dtype, is_plan=True)
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_pretrained(settings.model)).to(dtype)
        base_tokenizer = Tokenizer.from_pretrained(settings.model)
        base_tokenizer.check_fits(model.config.vocab_size)
        if settings.extend_vocab:
            size = len(base_tokenizer) + settings.extend_vocab
            matrix = torch.empty(size, model.config.hidden_size, dtype=dtype)
            model.replace_vocabulary(matrix, matrix)
            most = "" if settings.vocab_method == "continue" else ", at most: fewer where the base has some of the new ones"
            print(f"vocabulary: {len(base_tokenizer):,} pieces + {settings.extend_vocab:,} = {size:,}{most}")
        add_lora(model, settings.lora())
    model.gradient_checkpointing = settings.gradient_checkpointing

    documents = Corpus(settings.data, settings.langs, settings.held_out, settings.max_held_out).stream("train")
    tokens = 0
    for texts in documents.values():
        first = list(islice(texts, 100))
        tokens += round(sum(map(len, base_tokenizer.encode_batch(first, bos=True))) / len(first) * len(texts))
    more = ", those of the extended one are fewer" if settings.extend_vocab else ""
    print(f"{settings.data}: {len(documents)} languages, {sum(map(len, documents.values())):,} documents to train on, about "
          f"{tokens:,} tokens of the base tokenizer (from 100 documents a language){more}")  # fmt: skip
    steps = settings.steps or math.ceil(settings.epochs * tokens / (settings.batch_size * settings.seq_len))

    sizes = {"seq_len": settings.seq_len, "batch_size": settings.batch_size, "micro_batch_size": micro_batch_size}
    print_plan(model, **sizes, processes=processes, device_type=device, steps=steps)
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: no time is estimated")
        return
    needed = sum(size for *_, size in memory_plan(model, settings.seq_len, micro_batch_size, False, 1, device))
    available = available_memory(device)
    if available is not None and needed > available:
        print(f"the whole model takes {needed / 1e9:.1f} GB, more than is free here: no time is estimated")
        return
    print("timing three micro-batches ... (Ctrl-C ends it)", flush=True)
    seconds = time_steps(model, micro_batch_size, settings.seq_len, device)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    print_time(model, seconds=seconds, **sizes, processes=processes, steps=steps, gpu=gpu)


def print_plan(model: Llama, *, seq_len: int, batch_size: int, micro_batch_size: int, processes: int, device_type: str,
               steps: int) -> None:  # fmt: skip
    """Print what a run of `steps` steps takes. batch_size: sequences of an optimizer step, of all processes together."""
    accumulates = batch_size > micro_batch_size * processes
    rows = memory_plan(model, seq_len, micro_batch_size, accumulates, processes, device_type)
    needed = sum(size for *_, size in rows)
    print(f"{parameter_report(model)}; {flops_per_token(model, seq_len):,} FLOPs a token")
    devices = f"each of {processes} devices" if processes > 1 else "one device"
    print(f"a step: {batch_size:,} blocks of {seq_len:,} tokens, {micro_batch_size:,} at a time on {devices}; {steps:,} steps: "
          f"{steps * batch_size:,} blocks, {steps * batch_size * seq_len:,} tokens")  # fmt: skip
    table = [(part, arithmetic, f"{size / 1e9:.2f}") for part, arithmetic, size in [*rows, ("total", "", needed)]]
    print_table(("memory of a device at the worst stage", "bytes", "GB"), table)
    if device_type == "cuda":
        sizes = [size for size in GPU_SIZES if needed <= size * 1e9]
        print(f"fits a GPU of {sizes[0]} GB or more" if sizes else f"fits no GPU of up to {GPU_SIZES[-1]} GB: take more "
              "processes, gradient_checkpointing, a smaller micro_batch_size or seq_len")  # fmt: skip


def print_time(model: Llama, *, seconds: float, seq_len: int, batch_size: int, micro_batch_size: int, processes: int,
               steps: int, gpu: str | None) -> None:  # fmt: skip
    """Print how long a run takes whose micro-batches take `seconds` each (see `time_steps`), were communication free.

    gpu: the name that PyTorch gives it, None for a CPU. MFU: model FLOPs utilisation (PaLM, appendix B), of bfloat16's peak.
    """
    speed = micro_batch_size * seq_len / seconds  # tokens a second, of one device
    peak = peak_flops(gpu) if gpu else None
    mfu = f", MFU {speed * flops_per_token(model, seq_len) / peak:.1%} on {gpu}" if peak else ""
    hours = steps * batch_size / (micro_batch_size * processes) * seconds / 3600
    print(f"{seconds:.3f} s a micro-batch: {speed:,.0f} tokens a second and device{mfu}; {steps:,} steps: {hours:,.2f} hours")


def time_steps(model: Llama, batch: int, seq_len: int, device: str, steps: int = 3) -> float:
    """Median seconds of an uncompiled step of (batch, seq_len) random tokens: forward, backward, clipping, fused AdamW.

    The first of `steps`, 2 or more, is not counted. The model comes from `meta`, gets random weights on `device`, whole, and
    goes back to `meta`. For a run that accumulates it is a little too much: there AdamW runs once in several micro-batches.
    Raises UserError where a GPU's memory does not suffice.
    """
    try:
        model.to_empty(device=device).train()
        model.tie_weights()  # which to_empty has made two matrices
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, model.config.initializer_range)
        trained = list(trainable_parameters(model).values())
        optimizer = torch.optim.AdamW(trained, fused=True)
        seconds = []
        for _ in range(steps):
            tokens = torch.randint(model.config.vocab_size, (batch, seq_len), device=device)
            started = time.perf_counter()
            model(tokens, targets=tokens).backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if tokens.is_cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])
    except torch.OutOfMemoryError:
        raise UserError(f"{device}: a micro-batch of {batch} x {seq_len} tokens does not fit; lower micro_batch_size") from None
    finally:
        model.zero_grad()
        model.to("meta")
        model.tie_weights()


def available_memory(device: str) -> int | None:
    """Bytes that are free on a GPU, or in this machine for "cpu"; None where the system does not say (only Linux does)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None
