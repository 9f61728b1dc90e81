"""How much memory a training run takes on a device, before it is started.

It follows from shapes and dtypes, so the model may lie on `meta`, where it takes no memory: LLaMA 2 7B is
planned on a laptop. The memory is that of the worst stage of an optimizer step, since not all of it is held
at once:

    lookup in embed_tokens -> blocks -> loss -> backward of the blocks -> backward of embed_tokens -> AdamW

Letters in the arithmetic: N tokens of a micro-batch (B · T), D hidden size, F intermediate size, H query
heads and K key/value heads of d dimensions, L layers, V vocabulary. GB are 10^9 bytes.
"""

from collections.abc import Iterator

from mala.cross_entropy import CHUNK_BYTES
from mala.lora import LoRALinear, trainable_parameters
from mala.model import Llama

STAGES = {
    "lookup": "lookup in embed_tokens",
    "loss": "loss",
    "block": "backward of a block",
    "embed_tokens": "backward of embed_tokens",
    "loading": "loading",
}
ALWAYS = "lookup loss block embed_tokens"  # the stages of a step
Part = tuple[str, str, int]  # what it is, how its bytes are counted, bytes
StagedPart = tuple[str, str, int, str]  # and the stages at which it is there


def memory_plan(
    model: Llama, seq_len: int, micro_batch_size: int, accumulates: bool, processes: int, device_type: str
) -> list[Part]:
    """All that a device holds at the worst stage of a step; the sum of the bytes is the peak.

    - model: with LoRA, the frozen parameters in the compute dtype, `gradient_checkpointing` as it will be.
    - micro_batch_size: sequences of `seq_len` tokens on a device. accumulates: has a step several of them?
    - processes: over which FSDP2 divides the model, as `shard` in mala/running/distributed.py does.

    For a CPU it is what PyTorch allocates, without Python itself; tests/test_memory_plan.py compares.
    """
    parts = [
        *_parameters_and_gradients(model, accumulates, processes),
        *_activations_and_loss(model, micro_batch_size * seq_len, device_type),
        *(_gathered_by_fsdp(model, accumulates) if processes > 1 else []),
    ]
    if device_type == "cuda":
        overhead = "CUDA context, cuBLAS workspace, fragmentation"
        parts.append((overhead, "about", 1_500_000_000, f"{ALWAYS} loading"))
    held = {stage: [part for part in parts if stage in part[3].split()] for stage in STAGES}
    worst = max(STAGES, key=lambda stage: sum(size for _, _, size, _ in held[stage]))
    return [
        (name if stages.startswith(ALWAYS) else f"{STAGES[worst]}: {name}", how, size)
        for name, how, size, stages in held[worst]
        if size
    ]


def _parameters_and_gradients(model: Llama, accumulates: bool, P: int) -> Iterator[StagedPart]:
    embed_tokens, lm_head = model.model["embed_tokens"].weight, model.lm_head.weight
    is_tied, VD, e = embed_tokens is lm_head, lm_head.numel(), model.compute_dtype.itemsize
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    shard = f" / {P}" if P > 1 else ""
    yield "frozen parameters", f"{frozen:,} x {e}{shard}", frozen * e // P, ALWAYS
    yield "trained parameters", f"{trained:,} x 4{shard}", trained * 4 // P, ALWAYS
    yield "AdamW's two moments", f"{trained:,} x 2 x 4{shard}", trained * 2 * 4 // P, ALWAYS
    # Of earlier micro-batches, unsharded: FSDP2 shards their average. Else all are there at the end only.
    yield "gradients", f"{trained:,} x 4", trained * 4, ALWAYS if accumulates else "embed_tokens"
    # A micro-batch's own of the two large matrices, until they are added to those. If the two are one matrix,
    # what the loss gives to its gradient waits for what the lookup gives.
    if lm_head.requires_grad:
        stages = "loss" + " block" * (is_tied or not accumulates)
        stages += " embed_tokens" * (is_tied and accumulates)
        yield "gradient of lm_head", "V D x 4", VD * 4, stages
    if embed_tokens.requires_grad and (accumulates or is_tied):
        yield "gradient of embed_tokens", "V D x 4", VD * 4, "embed_tokens"


def _activations_and_loss(model: Llama, N: int, device_type: str) -> Iterator[StagedPart]:
    config, lm_head, e = model.config, model.lm_head.weight, model.compute_dtype.itemsize
    L, D, F, V = config.num_hidden_layers, config.hidden_size, config.intermediate_size, len(lm_head)
    # A block is fullest when its backward pass reaches gate and up: all it kept is still there.
    kept = [block_activations(model, layer, device_type) for layer in range(L)]
    how, largest = max(kept, key=lambda block: block[1])
    if model.gradient_checkpointing:
        yield "inputs of the blocks", f"L N D x {e}", L * N * D * e, "loss block"
        yield "activations of a block, computed again", f"N ({how})", N * largest, "block"
    else:
        yield "activations of the blocks", f"L N ({how})", N * sum(size for _, size in kept), "loss block"
    yield "gradients of activations", f"N (3 F + 2 D) x {e}", N * (3 * F + 2 * D) * e, "block"
    yield "last norm, hidden states, their gradient", f"N D (4 + {e} + 4)", N * D * (8 + e), "loss"
    if lm_head.itemsize != e:
        yield "lm_head, cast", f"V D x {e}", lm_head.numel() * e, "loss"
    chunk = max(CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]), V * e)  # see mala/cross_entropy.py
    yield "logits, a chunk", f"N V x {e}, at most {chunk:,}", min(N * V * e, chunk), "loss"


def _gathered_by_fsdp(model: Llama, accumulates: bool) -> Iterator[StagedPart]:
    """The block that is computed and, meanwhile, the next one; lm_head for all of the step."""
    embed_tokens, lm_head = model.model["embed_tokens"].weight, model.lm_head.weight
    blocks, VD, e = model.model["layers"], lm_head.numel(), model.compute_dtype.itemsize
    block = max(sum(weight.numel() * weight.itemsize for weight in block.parameters()) for block in blocks)
    head, looked_up = VD * lm_head.itemsize, 0 if embed_tokens is lm_head else VD * embed_tokens.itemsize
    yield "two blocks, gathered", f"2 x {block:,}", 2 * block, "loss block"
    yield "lm_head, gathered", f"V D x {lm_head.itemsize}", head, ALWAYS
    yield "embed_tokens, gathered", f"V D x {embed_tokens.itemsize}", looked_up, "lookup embed_tokens"
    yield "buffers that both came in", f"{head:,} + {looked_up:,}", head + looked_up, "lookup"
    if not accumulates and (lm_head.requires_grad or embed_tokens.requires_grad):
        yield "copy of a gradient, to be divided", "V D x 4", VD * 4, "embed_tokens"
    # Every process loads all of the model, and then lets go what is the others'.
    sizes = {weight: weight.numel() for weight in model.parameters()}
    trained = sum(size for weight, size in sizes.items() if weight.requires_grad)
    frozen = sum(sizes.values()) - trained
    yield "frozen parameters, unsharded", f"{frozen:,} x {e}", frozen * e, "loading"
    yield "trained parameters, unsharded", f"{trained:,} x 4", trained * 4, "loading"
    yield "embed_tokens, as it was before it was cast", f"V D x {e}", VD * e, "loading"


def block_activations(model: Llama, layer: int, device_type: str) -> tuple[str, int]:
    """What a block's forward pass keeps for its backward pass: (arithmetic, bytes a token), without
    torch.compile.

    - In float32: what the two norms square (D elements each) and divide by (1), and attention's log-sum-exp
      (H); flash attention keeps no T x T matrix.
    - In the compute dtype: q, k, v, attention's output, gate, silu(gate), up.
    - A frozen matrix does not need its input again. LoRA's A does, after dropout, and dropout its mask; B
      needs the R elements that A gives.
    """
    config, block, e = model.config, model.model["layers"][layer], model.compute_dtype.itemsize
    size = 4 * (2 * config.hidden_size + 2 + config.num_attention_heads)
    size += e * 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    size += e * 3 * config.intermediate_size
    lora = 0
    for module in block.modules():
        if isinstance(module, LoRALinear):
            # The mask is bool on a GPU and of the compute dtype on a CPU. Inputs shared without dropout count
            # twice.
            mask = 0 if module.dropout == 0 else 1 if device_type == "cuda" else e
            lora += (e + mask) * module.in_features + e * len(module.lora_A)
    return f"4 (2 D + 2 + H) + {e} (2 H d + 2 K d + 3 F) + LoRA's {lora:,}", size + lora
