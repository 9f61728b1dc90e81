"""Calculate how much memory a training run takes on a device, before it is started.

This only needs shapes and dtypes, so the model may lie on `meta`, where it takes no memory: a laptop can plan
for LLaMA 2 7B. A step does not hold everything at once, so the plan is for its worst stage:

    lookup in embed_tokens -> blocks -> loss -> backward of the blocks -> backward of embed_tokens -> AdamW

Letters in the arithmetic: N tokens of a micro-batch (B · T), D hidden size, F intermediate size, H query
heads and K key/value heads of d dimensions, L layers, V vocabulary. A GB is 10^9 bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mala.cross_entropy import CHUNK_BYTES
from mala.lora import LoRALinear, trainable_parameters
from mala.loss.triton_kernel import row_width
from mala.model import Llama
from mala.running.distributed import World
from mala.running.settings import Settings
from tools.adamw8bit import BLOCK, CHUNK

STAGES = {
    "lookup": "lookup in embed_tokens",
    "loss": "loss",
    "block": "backward of a block",
    "embed_tokens": "backward of embed_tokens",
    "adamw": "AdamW",
}
ALWAYS = "lookup loss block embed_tokens adamw"  # all stages of a step
Part = tuple[str, str, int]  # name, arithmetic, bytes
StagedPart = tuple[str, str, int, str]  # the same, and the stages that hold it


@dataclass
class Step:
    """The work of one device in an optimizer step.

    - micro_batch_size: number of sequences, each of `seq_len` tokens.
    - accumulates: whether a step has several micro-batches (gradient accumulation).
    - processes: number of processes among which FSDP2 divides the model (see mala/running/distributed.py).
    - device: "cpu" or "cuda".
    - moment_bytes: bytes per element in each of AdamW's two moments.
    - attends_document: whether attention takes a mask.
    """

    seq_len: int
    micro_batch_size: int
    accumulates: bool
    processes: int = 1
    device: str = "cpu"
    is_compiled: bool = False
    moment_bytes: int = 4
    attends_document: bool = False


def step_of(settings: Settings, processes: int, device: str) -> Step:
    """Return the work of a device in a step of train.py. device: a PyTorch name, such as cuda or cuda:1."""
    micro, kind = settings.micro_batch(processes), torch.device(device).type
    accumulates, is_compiled = settings.batch_size > micro * processes, settings.is_compiled(kind)
    moment_bytes = 1 if settings.moments == "8bit" else 4
    is_masked = settings.attend == "document"
    return Step(settings.seq_len, micro, accumulates, processes, kind, is_compiled, moment_bytes, is_masked)


def room(device: str) -> float:
    """Return how many bytes this process can use on a device, including those that it uses already. 5% of a
    GPU is left for fragmentation. A CPU's memory counts as unlimited."""
    if torch.device(device).type == "cpu":
        return math.inf
    return 0.95 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def memory_plan(model: Llama, step: Step) -> list[Part]:
    """Return what a device holds at the worst stage of a step. The sum of the bytes is the peak.

    The model must be as it will train: with LoRA, frozen parameters in the compute dtype, and the final
    `recomputed_blocks`. On a CPU the plan counts what PyTorch allocates, without Python itself;
    tests/test_memory_plan.py compares the two.
    """
    parts = [
        *_parameters_and_gradients(model, step),
        *_activations_and_loss(model, step),
        *(_gathered_by_fsdp(model) if step.processes > 1 else []),
    ]
    if step.device == "cuda":
        overhead = "CUDA context, cuBLAS workspace, fragmentation"
        parts.append((overhead, "about", 1_500_000_000, ALWAYS))
    held = {stage: [part for part in parts if stage in part[3].split()] for stage in STAGES}
    worst = max(STAGES, key=lambda stage: sum(size for _, _, size, _ in held[stage]))
    return [
        (name if stages.startswith(ALWAYS) else f"{STAGES[worst]}: {name}", how, size)
        for name, how, size, stages in held[worst]
        if size
    ]


def recomputed_blocks(model: Llama, settings: Settings, world: World, free: float | None = None) -> int:
    """Return how many blocks, from the first on, are recomputed in the backward pass.

    With `auto` that is the fewest with which a step fits into `free` bytes (default: the device's), or all
    blocks if no number is enough. The search changes `model.recomputed_blocks`.
    """
    blocks = model.config.num_hidden_layers
    if settings.gradient_checkpointing != "auto":
        return blocks if settings.gradient_checkpointing == "on" else 0
    step, free = step_of(settings, world.size, world.device), free or room(world.device)
    for model.recomputed_blocks in range(blocks):
        if sum(size for *_, size in memory_plan(model, step)) <= free:
            return model.recomputed_blocks
    return blocks


def _parameters_and_gradients(model: Llama, step: Step) -> Iterator[StagedPart]:
    e, P, elements = model.compute_dtype.itemsize, step.processes, largest_trained(model)
    trained = trained_elements(model)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    shard = f" / {P}" if P > 1 else ""
    yield "frozen parameters", f"{frozen:,} x {e}{shard}", frozen * e // P, ALWAYS
    yield "trained parameters", f"{trained:,} x 4{shard}", trained * 4 // P, ALWAYS
    moments, how = trained * 2 * step.moment_bytes // P, f"{trained:,} x 2 x {step.moment_bytes}{shard}"
    if step.moment_bytes == 1:
        # Add the scales. A chunk has both moments in float32, and on a CPU 5 copies while it is encoded.
        moments, how = moments + trained * 2 * 4 // BLOCK // P, f"{how}, x (1 + 4 / {BLOCK})"
        chunk = min(CHUNK[step.device], elements) * (2 if step.device == "cuda" else 5) * 4
        yield "moments in float32, a chunk", f"{chunk:,}", chunk, "adamw"
    yield "AdamW's two moments", how, moments, ALWAYS
    # With accumulation the gradients of earlier micro-batches are always there. They are unsharded, because
    # FSDP2 shards only their average. The gradients of lm_head and embed_tokens are added to them in place.
    # Without accumulation all gradients exist together only at the end.
    yield "gradients", f"{trained:,} x 4", trained * 4, ALWAYS if step.accumulates else "embed_tokens adamw"
    of_head = trained_elements(model.lm_head)
    if not step.accumulates:
        yield "gradient of lm_head", f"{of_head:,} x 4", of_head * 4, "loss block"
    if rows := model.model["embed_tokens"].token_adapter:
        size = rows.trainable_tokens_delta.numel() * 4
        yield "gradient of the new rows, before it is added", f"{size // 4:,} x 4", size, "embed_tokens"
    if trains_blocks(model):
        block = max(trained_elements(block) for block in model.model["layers"])
        if e < 4:
            kept = model.config.num_hidden_layers - model.recomputed_blocks or 1
            size, how = kept * block * e, f"{kept} x {block:,} x {e}"
            yield f"weights of {kept} blocks, cast", how, size, "loss block"
        if not step.accumulates:
            yield "gradient of a block", f"{block:,} x 4", block * 4, "block"


def _activations_and_loss(model: Llama, step: Step) -> Iterator[StagedPart]:
    config, lm_head, e = model.config, model.lm_head.weight, model.compute_dtype.itemsize
    N, L, again = step.micro_batch_size * step.seq_len, config.num_hidden_layers, model.recomputed_blocks
    D, F, V = config.hidden_size, config.intermediate_size, len(lm_head)
    # A block takes most memory when its backward pass reaches gate and up: nothing has been freed yet.
    blocks = [block_activations(model, layer, step) for layer in range(L)]
    how, largest = max(blocks, key=lambda block: block[1])
    yield f"inputs of {again} blocks", f"{again} N D x {e}", again * N * D * e, "loss block"
    if again < L:
        kept = N * sum(size for _, size in blocks[again:])
        yield f"activations of {L - again} blocks", f"{L - again} N ({how})", kept, "loss block"
    else:
        yield "activations of a recomputed block", f"N ({how})", N * largest, "block"
    yield "gradients of activations", f"N (3 F + 2 D) x {e}", N * (3 * F + 2 * D) * e, "block"
    yield "last norm, hidden states, their gradient", f"N D (4 + {e} + 4)", N * D * (8 + e), "loss"
    if lm_head.itemsize != e:
        yield "lm_head, cast", f"V D x {e}", lm_head.numel() * e, "loss"
    width = row_width(V) if step.device == "cuda" else V  # elements of a row of logits
    chunk = max(CHUNK_BYTES[step.device], width * e)  # see mala/cross_entropy.py
    if step.attends_document:
        yield "mask of attention", f"N T x ({e} + 2)", N * step.seq_len * (e + 2), "lookup loss block"
    yield "logits, a chunk", f"N V x {e}, at most {chunk:,}", min(N * width * e, chunk), "loss"


def _gathered_by_fsdp(model: Llama) -> Iterator[StagedPart]:
    """Yield what FSDP2 gathers: the current block and the next one, and lm_head during the whole step."""
    embed_tokens, lm_head = model.model["embed_tokens"].weight, model.lm_head.weight
    blocks, VD = model.model["layers"], lm_head.numel()
    block = max(sum(weight.numel() * weight.itemsize for weight in block.parameters()) for block in blocks)
    head, looked_up = VD * lm_head.itemsize, 0 if embed_tokens is lm_head else VD * embed_tokens.itemsize
    yield "two blocks, gathered", f"2 x {block:,}", 2 * block, "loss block"
    yield "lm_head, gathered", f"V D x {lm_head.itemsize}", head, "lookup loss block embed_tokens"
    yield "embed_tokens, gathered", f"V D x {embed_tokens.itemsize}", looked_up, "lookup embed_tokens"
    yield "all-gather buffers of both", f"{head:,} + {looked_up:,}", head + looked_up, "lookup"
    if copied := max(trained_elements(model.model["embed_tokens"]), trained_elements(model.lm_head)):
        yield "copy of a gradient, for averaging", f"{copied:,} x 4", copied * 4, "embed_tokens"


def trained_elements(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def largest_trained(model: Llama) -> int:
    return max(weight.numel() for weight in trainable_parameters(model).values())


def trains_blocks(model: Llama) -> bool:
    """Return whether the blocks' own weights train (--train all)."""
    return model.model["layers"][0].mlp.down_proj.weight.requires_grad


def block_activations(model: Llama, layer: int, step: Step) -> tuple[str, int]:
    """Return what a block's forward pass keeps for its backward pass: (arithmetic, bytes per token).

    - In float32: the inputs that the two norms square (D elements each) and their divisors (1 each), and
      attention's log-sum-exp (H). Flash attention keeps no T x T matrix.
    - In the compute dtype: q, k, v, attention's output, gate, silu(gate), up.
    - A frozen matrix does not keep its input. LoRA's A keeps its input after dropout, dropout keeps its mask,
      and B keeps A's output (R elements).
    - If all weights train, each norm also keeps its normalised input, and each matrix its input.

    torch.compile recomputes silu(gate) and the float32 copies from the block's input and o_proj's output.
    """
    config, block, e = model.config, model.model["layers"][layer], model.compute_dtype.itemsize
    D, H, F = config.hidden_size, config.num_attention_heads, config.intermediate_size
    heads = e * 2 * (H + config.num_key_value_heads) * config.head_dim
    if step.is_compiled:
        size, how = 4 * (2 + H) + heads + e * (2 * D + 2 * F), f"4 (2 + H) + {e} (2 H d + 2 K d + 2 D + 2 F)"
    else:
        size, how = 4 * (2 * D + 2 + H) + heads + e * 3 * F, f"4 (2 D + 2 + H) + {e} (2 H d + 2 K d + 3 F)"
    if trains_blocks(model):
        size, how = size + e * (2 * D + H * config.head_dim + F), f"{how} + {e} (2 D + H d + F)"
        if not step.is_compiled:
            size, how = size + 8 * D, f"{how} + 8 D"
    lora = 0
    for module in block.modules():
        if isinstance(module, LoRALinear):
            # The mask is bool on a GPU and has the compute dtype on a CPU. Without dropout, layers with the
            # same input share it, but it is counted for each of them.
            mask = 0 if module.dropout == 0 else 1 if step.device == "cuda" or step.is_compiled else e
            lora += (e + mask) * module.in_features + e * len(module.lora_A)
    return f"{how} + LoRA's {lora:,}" if lora else how, size + lora
