"""A training step of MaLA's recipe, LoRA with whole embeddings and head, beside transformers + PEFT: tokens/s, memory, MFU.

    python benchmarks/train_step.py [--shape small|llama2-7b] [--steps 4] [--rounds 2] [--out train_step.json]

Each trainer loads the same checkpoint and the same adapter and sees the same random tokens (forward, backward, clipping, fused
AdamW; dropout 0, so that the losses must agree). In each round one after the other has the machine for itself, in a process of
its own, for a first step that is not counted and then --steps more; the time is the median over all rounds. Peak memory is the
process's resident memory, on a GPU PyTorch's. `llama2-7b` is MaLA-500's own step, 260,164 rows and one sequence of 4,096 tokens
with activation checkpointing: it takes a GPU of 80 GB. There the peer's loss is Liger-Kernel's where that is installed.
"""

import argparse
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

from mala.checkpoint import write_json  # noqa: E402
from mala.cli import print_table, run  # noqa: E402
from mala.cross_entropy import IGNORE_INDEX  # noqa: E402
from mala.lora import LoRAConfig, add_lora, load_adapter, save_adapter, trainable_parameters  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.plan import flops_per_token, peak_flops  # noqa: E402

V = 260164
SHAPES = {  # the model, sequences and tokens of a step
    "small": (LlamaConfig(vocab_size=V, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
                          max_position_embeddings=2048), 4, 256),
    "llama2-7b": (LlamaConfig(vocab_size=V, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32, max_position_embeddings=4096), 1, 4096),
}  # fmt: skip
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
        targets = torch.cat(
            [tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE_INDEX)], dim=1
        )  # as transformers shifts labels
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


def peak_memory() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def work(trainer: str, dtype: str, folder: Path, shape: str, steps: int) -> None:
    """A line on stdout for every step: its time, its loss, the peak memory so far."""
    _, B, T = SHAPES[shape]
    make = {"ours": our_trainer, "transformers + PEFT": their_trainer}[trainer]
    loss_of, trained = make(folder, getattr(torch, dtype), checkpointing=shape != "small")
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
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss, "memory": peak_memory()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    trainers = [(trainer, dtype) for dtype in dtypes for trainer in ("transformers + PEFT", "ours")]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, PyTorch {torch.__version__}: {args.shape}, D {config.hidden_size:,}, {config.num_hidden_layers} layers, "
          f"V {V:,}, {B} x {T} tokens")  # fmt: skip
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
    speed = {key: B * T / statistics.median(one["seconds"] for steps in rounds for one in steps[1:])
             for key, rounds in results.items()}  # fmt: skip
    for (trainer, dtype), rounds in results.items():
        tokens_per_second = speed[trainer, dtype]
        losses, memory = [one["loss"] for one in rounds[0]], max(one["memory"] for steps in rounds for one in steps)
        rows.append((f"{trainer}, {dtype}", f"{tokens_per_second:,.0f}", f"{tokens_per_second / speed[trainers[0]]:.2f}",
                     f"{tokens_per_second * flops_per_token(shapes, T) / peak:.1%}" if peak else "unknown",
                     f"{memory / 1e9:.2f}", f"{losses[0]:.5f}", f"{losses[-1]:.5f}"))  # fmt: skip
        report.append({"trainer": trainer, "dtype": dtype, "tokens_per_second": tokens_per_second, "memory": memory,
                       "seconds": [[one["seconds"] for one in steps] for steps in rounds], "losses": losses})  # fmt: skip
    print_table(("", "tokens/s", f"x peer's {dtypes[0]}", "MFU", "peak memory, GB", "first loss", "last"), rows)
    if args.out:
        write_json(args.out, {"machine": machine, "torch": torch.__version__, "shape": args.shape, "rows": report})


if __name__ == "__main__":
    run(main)
