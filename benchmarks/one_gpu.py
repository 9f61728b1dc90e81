"""Run train.py with configs/one-gpu.toml on a billion parameters, and print what its log says.

    python benchmarks/one_gpu.py [--shape tinyllama-1.1b] [--tokenizer DIR] [--steps 30] [train.py's flags …]

The checkpoint has random weights, the shape of TinyLlama 1.1B, and a row for each piece of the tokenizer:
2,048 by default, 32,000 with LLaMA 2's. It is trained on the bundled corpus. The table has a line for every
five steps; the time of the first step, which compiles, is in its own column. Without a GPU, add
--shape demo --device cpu --dtype float32 --seq-len 128.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mala.cli import run  # noqa: E402
from mala.model import Llama  # noqa: E402
from mala.storage.tokenizer_files import copy_tokenizer  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402
from tools.known_models import NAMED, named  # noqa: E402
from tools.tables import print_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=NAMED, default="tinyllama-1.1b")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets/tiny-llama")
    parser.add_argument("--steps", type=int, default=30)
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "out"
        rows = len(Tokenizer.from_pretrained(args.tokenizer))
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Llama(named(args.shape, vocab_size=rows)).to(torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.02) if parameter.ndim == 2 else parameter.fill_(1)
        model.save_pretrained(checkpoint)
        del model
        copy_tokenizer(args.tokenizer, checkpoint, rows)
        few = ["--extend-vocab", "0", "--log-every", "5", "--max-held-out", "2", "--save-every", "100000"]
        command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/one-gpu.toml", *few]
        command += ["--model", checkpoint, "--out", out, "--steps", str(args.steps), *more]
        torch.cuda.empty_cache()
        subprocess.run([str(part) for part in command], check=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "tokens_per_second", "mfu", "waiting", "peak_memory_gb", "first_step_seconds")
    formats = ("{}", "{:.4f}", "{:,.0f}", "{:.1%}", "{:.3f}", "{:.2f}", "{:.1f}")
    cells = [
        [form.format(line[name]) if name in line else "" for name, form in zip(names, formats)]
        for line in lines
    ]
    print_table(names, cells)


if __name__ == "__main__":
    run(main)
