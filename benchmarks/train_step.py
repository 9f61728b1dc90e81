"""Measure a training step of MaLA's recipe, LoRA with whole embeddings and head, against other trainers.

    python benchmarks/train_step.py [--shape small|llama2-7b] [--steps 4] [--rounds 2] [--out train_step.json]

Each trainer has the same random weights and gets the same random tokens. A step is forward, backward,
clipping and fused AdamW; dropout is 0, so the losses must agree. In each round the trainers run one after the
other, each in its own process: a first step that is not counted, then --steps more. The time is the median
over all rounds. Peak memory is the process's resident memory, and on a GPU PyTorch's.

`llama2-7b` is MaLA-500's own step: 260,164 rows, and 8 micro-batches of one sequence of 4,096 tokens. It
needs a GPU of 80 GB.

On a GPU, transformers runs with Liger-Kernel if it is installed. On a CPU, litgpt is measured in float32 if
it is installed. It cannot train embeddings and head whole, so the script makes them trainable.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mala.cli import run  # noqa: E402
from mala.cross_entropy import IGNORE_INDEX  # noqa: E402
from mala.lora import LoRAConfig, add_lora  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.running.distributed import World  # noqa: E402
from mala.running.settings import Settings  # noqa: E402
from mala.storage.config_json import to_config_json  # noqa: E402
from mala.storage.files import write_json  # noqa: E402
from tools.adamw8bit import AdamW8bit  # noqa: E402
from tools.gpus import flops_per_token, peak_flops  # noqa: E402
from tools.known_models import named  # noqa: E402
from tools.memory_plan import recomputed_blocks, room  # noqa: E402
from tools.tables import print_table  # noqa: E402

V = 260164
SHAPES = {  # model, sequences of a micro-batch, tokens of a sequence, micro-batches of a step
    "small": (LlamaConfig(V, 256, 688, num_hidden_layers=4, num_attention_heads=4), 4, 256, 1),
    "llama2-7b": (named("llama-2-7b", vocab_size=V), 1, 4096, 8),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAMW = {"lr": 3e-4, "weight_decay": 0.1, "fused": True}


def fill(model) -> None:
    """Fill in random weights. All trainers get the same, because their parameters have the same order."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim == 2 else parameter.fill_(1)


def start_lora(named_parameters) -> list[torch.Tensor]:
    """Give LoRA's A the same random values in all trainers; B stays 0. Return the trained parameters."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_A" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return list(trained.values())


def our_model(shape: str, dtype: torch.dtype) -> Llama:
    with torch.device("meta"):
        model = Llama(SHAPES[shape][0]).to(dtype)
    model.to_empty(device=DEVICE)
    fill(model)
    add_lora(model, LoRAConfig(lora_dropout=0.0))
    return model.train()


def our_trainer(shape: str, dtype: torch.dtype, checkpointing: str = "auto", moments: str = "float32"):
    """Make our trainer as train.py does. "auto" recomputes as many blocks as the memory demands."""
    config, B, T, micro_batches = SHAPES[shape]
    model = our_model(shape, dtype)
    trained = start_lora(model.named_parameters())
    settings = Settings(seq_len=T, batch_size=B * micro_batches, micro_batch_size=B, moments=moments)
    settings.gradient_checkpointing = checkpointing
    model.recomputed_blocks = recomputed_blocks(model, settings, World(device=DEVICE), room(DEVICE))
    if settings.is_compiled(DEVICE):
        for block in model.model["layers"]:
            block.compile()
    print(f"{model.recomputed_blocks} of {config.num_hidden_layers} blocks recomputed", file=sys.stderr)

    def loss_of(tokens, share):
        no_target = torch.full_like(tokens[:, :1], IGNORE_INDEX)
        targets = torch.cat([tokens[:, 1:], no_target], dim=1)  # as transformers shifts labels
        return model(tokens, targets=targets, share=share)

    if moments == "8bit":
        return loss_of, AdamW8bit(trained, **ADAMW)
    return loss_of, torch.optim.AdamW(trained, **ADAMW)


def their_trainer(shape: str, dtype: torch.dtype):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    if DEVICE == "cuda":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        except ModuleNotFoundError:
            print("liger-kernel is not installed; transformers runs without it", file=sys.stderr)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_config_json(SHAPES[shape][0])))
    torch.set_default_dtype(torch.float32)
    fill(model)
    if shape != "small":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ours = LoRAConfig()
    names = ("r", "lora_alpha", "target_modules", "modules_to_save")
    lora = peft.LoraConfig(**{name: getattr(ours, name) for name in names})
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=dtype == torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(start_lora(model.named_parameters()), **ADAMW)
    return lambda tokens, share: model(input_ids=tokens, labels=tokens).loss * share, optimizer


def litgpt_trainer(shape: str, dtype: torch.dtype):
    """Make litgpt's trainer as `litgpt finetune_lora` does: head and loss in chunks of 128 positions."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    ours = our_model(shape, dtype)
    start_lora(ours.named_parameters())
    config = ours.config
    sizes = dict(
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        intermediate_size=config.intermediate_size,
        padded_vocab_size=V,
        block_size=config.max_position_embeddings,
    )
    llama = dict(
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    lora = dict(lora_r=8, lora_alpha=32, lora_dropout=0.0, lora_query=True, lora_value=True)
    model = GPT(Config(name="llama", vocab_size=V, **sizes, **llama, **lora))
    weights = {
        "lm_head.linear.weight": ours.lm_head.weight,
        "transformer.wte.weight": ours.model["embed_tokens"].weight,
        "transformer.ln_f.weight": ours.model["norm"].weight,
    }
    for i, block in enumerate(ours.model["layers"]):
        q, k, v = block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj
        of_block = {
            "norm_1": block.input_layernorm,
            "norm_2": block.post_attention_layernorm,
            "attn.proj.linear": block.self_attn.o_proj,
            "mlp.fc_1.linear": block.mlp.gate_proj,
            "mlp.fc_2.linear": block.mlp.up_proj,
            "mlp.proj.linear": block.mlp.down_proj,
        }
        weights |= {f"transformer.h.{i}.{name}.weight": module.weight for name, module in of_block.items()}
        qkv = f"transformer.h.{i}.attn.qkv"
        weights[f"{qkv}.linear.weight"] = torch.cat([q.weight, k.weight, v.weight])
        weights[f"{qkv}.lora_A"] = torch.cat([q.lora_A, v.lora_A])
        weights[f"{qkv}.lora_B"] = torch.cat([q.lora_B, v.lora_B])
    model.load_state_dict(weights)
    del ours, weights
    mark_only_lora_as_trainable(model)
    for module in (model.transformer.wte, model.lm_head.linear):
        module.weight.requires_grad_(True)

    def loss_of(tokens, share):
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, tokens[..., 1:]) * share

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss_of, torch.optim.AdamW(trained, **ADAMW)


TRAINERS = {
    "transformers + PEFT": their_trainer,
    "litgpt": litgpt_trainer,
    "ours": our_trainer,
    "ours, all blocks recomputed": partial(our_trainer, checkpointing="on"),
    "ours, all recomputed, moments of 8 bits": partial(our_trainer, checkpointing="on", moments="8bit"),
}


def peak_memory() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def work(trainer: str, dtype: str, shape: str, steps: int) -> None:
    """Print a line of JSON for every step: its seconds, its loss, and the peak memory so far in bytes."""
    _, B, T, micro_batches = SHAPES[shape]
    loss_of, optimizer = TRAINERS[trainer](shape, getattr(torch, dtype))
    trained = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps + 1):
        step = torch.randint(V, (micro_batches, B, T), generator=generator).to(DEVICE)
        start = time.perf_counter()
        total = torch.zeros((), device=DEVICE)
        for tokens in step:
            loss = loss_of(tokens, 1 / micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = total.item()  # .item() waits for the GPU
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": peak_memory()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker, args.shape, args.steps)

    config, B, T, micro_batches = SHAPES[args.shape]
    is_small = args.shape == "small"
    dtypes = ["float32", "bfloat16"] if DEVICE == "cpu" else ["bfloat16"]
    has_litgpt = DEVICE == "cpu" and importlib.util.find_spec("litgpt") is not None
    left_out = {trainer for trainer in TRAINERS if is_small and trainer.startswith("ours, ")}
    trainers = [
        (trainer, dtype)
        for dtype in dtypes
        for trainer in TRAINERS
        if trainer not in left_out and (trainer != "litgpt" or has_litgpt and dtype == "float32")
    ]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{machine}, PyTorch {torch.__version__}: {args.shape}, D {config.hidden_size:,}, "
        f"{config.num_hidden_layers} layers, V {V:,}, {micro_batches} x {B} x {T} tokens"
    )
    results = {key: [] for key in trainers}
    command = [sys.executable, __file__, "--shape", args.shape, "--steps", str(args.steps), "--worker"]
    for _ in range(args.rounds):
        for key, rounds in results.items():
            done = subprocess.run([*command, *key], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{', '.join(key)}: ended with status {done.returncode}")
                continue
            rounds.append([json.loads(line) for line in done.stdout.splitlines()])
    results = {key: rounds for key, rounds in results.items() if rounds}

    with torch.device("meta"):
        shapes = Llama(config)
        add_lora(shapes, LoRAConfig())
    peak = peak_flops(machine)
    rows, report = [], []
    step_tokens = micro_batches * B * T
    speed = {
        key: step_tokens / statistics.median(one["seconds"] for steps in rounds for one in steps[1:])
        for key, rounds in results.items()
    }
    first = next(iter(speed))
    for (trainer, dtype), rounds in results.items():
        tokens_per_second = speed[trainer, dtype]
        losses = [one["loss"] for one in rounds[0]]
        memory = max(one["memory"] for steps in rounds for one in steps)
        slow = statistics.median(steps[0]["seconds"] for steps in rounds)
        rows.append(
            (
                f"{trainer}, {dtype}",
                f"{tokens_per_second:,.0f}",
                f"{tokens_per_second / speed[first]:.2f}",
                f"{tokens_per_second * flops_per_token(shapes, T) / peak:.1%}" if peak else "unknown",
                f"{memory / 1e9:.2f}",
                f"{slow:.1f}",
                f"{losses[0]:.5f}",
                f"{losses[-1]:.5f}",
            )
        )
        report.append(
            {
                "trainer": trainer,
                "dtype": dtype,
                "tokens_per_second": tokens_per_second,
                "memory": memory,
                "seconds": [[one["seconds"] for one in steps] for steps in rounds],
                "losses": losses,
            }
        )
    header = (
        "",
        "tokens/s",
        f"÷ {', '.join(first)}",
        "MFU",
        "peak memory, GB",
        "first step, s",
        "first loss",
        "last",
    )
    print_table(header, rows)
    if args.out:
        of_run = {"machine": machine, "torch": torch.__version__, "shape": args.shape}
        write_json(args.out, {**of_run, "rows": report})


if __name__ == "__main__":
    run(main)
