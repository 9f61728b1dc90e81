"""A training step of MaLA's recipe, LoRA with whole embeddings and head, beside its peers.

    python benchmarks/train_step.py [--shape small|llama2-7b] [--steps 4] [--rounds 2] [--out train_step.json]

Each trainer loads the same checkpoint and the same adapter and sees the same random tokens (forward,
backward, clipping, fused AdamW; dropout 0, so that the losses must agree). In each round one after the other
has the machine for itself, in a process of its own, for a first step that is not counted and then --steps
more; the time is the median over all rounds. Peak memory is the process's resident memory, on a GPU
PyTorch's. `llama2-7b` is MaLA-500's own step, 260,164 rows and one sequence of 4,096 tokens with activation
checkpointing: it takes a GPU of 80 GB. There the loss of transformers is Liger-Kernel's, if it is
installed. litgpt is measured on a CPU, in float32, if it is installed; it has no way to train embeddings
and head whole, so this is done by hand.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mala.cli import run  # noqa: E402
from mala.cross_entropy import IGNORE_INDEX  # noqa: E402
from mala.lora import LoRAConfig, add_lora, trainable_parameters  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.running.flops import flops_per_token  # noqa: E402
from mala.storage.files import write_json  # noqa: E402
from mala.storage.peft_adapter import load_adapter, save_adapter  # noqa: E402
from tools.gpus import peak_flops  # noqa: E402
from tools.tables import print_table  # noqa: E402

V = 260164
SHAPES = {  # the model, sequences and tokens of a step
    "small": (LlamaConfig(V, 256, 688, num_hidden_layers=4, num_attention_heads=4), 4, 256),
    "llama2-7b": (LlamaConfig.named("llama-2-7b", vocab_size=V), 1, 4096),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint of random weights and an adapter, as all trainers load them."""
    with torch.device(DEVICE):
        model = Llama(config).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder / "base")
    add_lora(model, LoRAConfig(lora_dropout=0.0))
    save_adapter(model, folder / "adapter")


def our_trainer(folder: Path, dtype: torch.dtype, checkpointing: bool):
    model = Llama.from_pretrained(folder / "base", dtype, DEVICE)
    load_adapter(model, folder / "adapter")
    model.gradient_checkpointing = checkpointing
    if DEVICE == "cuda":  # as train.py does
        for block in model.model["layers"]:
            block.compile()

    def loss_of(tokens):
        no_target = torch.full_like(tokens[:, :1], IGNORE_INDEX)
        targets = torch.cat([tokens[:, 1:], no_target], dim=1)  # as transformers shifts labels
        return model(tokens, targets=targets)

    return loss_of, list(trainable_parameters(model).values())


def their_trainer(folder: Path, dtype: torch.dtype, checkpointing: bool):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    if DEVICE == "cuda":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        except ModuleNotFoundError:
            print("liger-kernel is not installed and left out", file=sys.stderr)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda tokens: model(input_ids=tokens, labels=tokens).loss, trained


def litgpt_trainer(folder: Path, dtype: torch.dtype, checkpointing: bool):
    """As `litgpt finetune_lora`: the head in chunks of 128 positions, then `chunked_cross_entropy`."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    ours = Llama.from_pretrained(folder / "base", dtype, DEVICE)
    load_adapter(ours, folder / "adapter")
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

    def loss_of(tokens):
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, tokens[..., 1:])

    return loss_of, [parameter for parameter in model.parameters() if parameter.requires_grad]


TRAINERS = {"transformers + PEFT": their_trainer, "litgpt": litgpt_trainer, "ours": our_trainer}


def peak_memory() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def work(trainer: str, dtype: str, folder: Path, shape: str, steps: int) -> None:
    """A line on stdout for every step: its time, its loss, the peak memory so far."""
    _, B, T = SHAPES[shape]
    loss_of, trained = TRAINERS[trainer](folder, getattr(torch, dtype), checkpointing=shape != "small")
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps + 1):
        tokens = torch.randint(V, (B, T), generator=generator).to(DEVICE)
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()  # waits for a GPU
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
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], args.worker[1], Path(args.worker[2]), args.shape, args.steps)

    config, B, T = SHAPES[args.shape]
    dtypes = ["float32", "bfloat16"] if DEVICE == "cpu" else ["bfloat16"]
    has_litgpt = DEVICE == "cpu" and importlib.util.find_spec("litgpt") is not None
    trainers = [
        (trainer, dtype)
        for dtype in dtypes
        for trainer in TRAINERS
        if trainer != "litgpt" or has_litgpt and dtype == "float32"
    ]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{machine}, PyTorch {torch.__version__}: {args.shape}, D {config.hidden_size:,}, "
        f"{config.num_hidden_layers} layers, V {V:,}, {B} x {T} tokens"
    )
    results = {key: [] for key in trainers}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), config)
        command = [sys.executable, __file__, "--shape", args.shape, "--steps", str(args.steps), "--worker"]
        for _ in range(args.rounds):
            for key, steps in results.items():
                done = subprocess.run([*command, *key, folder], stdout=subprocess.PIPE, text=True, check=True)
                steps.append([json.loads(line) for line in done.stdout.splitlines()])

    with torch.device("meta"):
        shapes = Llama(config)
        add_lora(shapes, LoRAConfig())
    peak = peak_flops(machine)
    rows, report = [], []
    speed = {
        key: B * T / statistics.median(one["seconds"] for steps in rounds for one in steps[1:])
        for key, rounds in results.items()
    }
    for (trainer, dtype), rounds in results.items():
        tokens_per_second = speed[trainer, dtype]
        losses = [one["loss"] for one in rounds[0]]
        memory = max(one["memory"] for steps in rounds for one in steps)
        rows.append(
            (
                f"{trainer}, {dtype}",
                f"{tokens_per_second:,.0f}",
                f"{tokens_per_second / speed[trainers[0]]:.2f}",
                f"{tokens_per_second * flops_per_token(shapes, T) / peak:.1%}" if peak else "unknown",
                f"{memory / 1e9:.2f}",
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
    header = ("", "tokens/s", f"x peer's {dtypes[0]}", "MFU", "peak memory, GB", "first loss", "last")
    print_table(header, rows)
    if args.out:
        of_run = {"machine": machine, "torch": torch.__version__, "shape": args.shape}
        write_json(args.out, {**of_run, "rows": report})


if __name__ == "__main__":
    run(main)
