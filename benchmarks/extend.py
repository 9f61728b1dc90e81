"""Measure time and peak memory of extending a checkpoint of LLaMA 2 7B's shape on disk, against copying it.

    python benchmarks/extend.py --base FILE --tokenizer FILE --folder DIR [--layers 32] [--peer]

The script makes a checkpoint of random bfloat16 weights in DIR (13.5 GB with all 32 layers; 35 GB must be
free). Then it copies the checkpoint, extends it (`subtokens`), and with --peer extends it with transformers
(`resize_token_embeddings`, which loads all of it). Each of these runs in its own process. Its output is
flushed to the disk, then removed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mala.cli import run  # noqa: E402
from mala.model import Llama  # noqa: E402
from mala.storage.config_json import to_config_json  # noqa: E402
from mala.storage.files import write_json  # noqa: E402
from mala.storage.weights import INDEX, write_tensors  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402
from tools.known_models import named  # noqa: E402
from tools.tables import print_table  # noqa: E402

SHARD_BYTES = 5 * 10**9
CODE = {
    "copy": """
import os, shutil
shutil.copytree(source, out)
""",
    "extend": """
from pathlib import Path
from mala.words.new_rows import extend_checkpoint
from mala.words.tokenizer import Tokenizer
extend_checkpoint(Path(source), Tokenizer.from_pretrained(tokenizer), Path(out), "subtokens", 0)
""",
    "transformers": """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.resize_token_embeddings(pieces, mean_resizing=False)
model.save_pretrained(out)
""",
}
MEASURE = """
import os, re, sys, time
source, out, tokenizer, pieces = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
import mala.words.new_rows, transformers  # imports are not counted
def memory(key):  # in kB; ru_maxrss would not do, because a process inherits it from its parent
    return int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
before = memory("VmRSS")
start = time.perf_counter()
{code}
for name in os.listdir(out):
    descriptor = os.open(os.path.join(out, name), os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
print(time.perf_counter() - start, (memory("VmHWM") - before) * 1024)
"""


def make_checkpoint(folder: Path, base: Tokenizer, layers: int) -> None:
    """Write a checkpoint with random weights, in shards of at most SHARD_BYTES."""
    config = named("llama-2-7b", vocab_size=len(base), num_hidden_layers=layers)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        if 2 * shape.numel() > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= 2 * shape.numel()
    folder.mkdir(parents=True)
    noise = (0.02 * torch.randn(max(shape.numel() for shape in shapes.values()))).bfloat16()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: noise[: shapes[name].numel()].view(shapes[name]).clone() for name in names}
        write_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(names, file)
    size = sum(2 * shape.numel() for shape in shapes.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", {**to_config_json(config), "torch_dtype": "bfloat16"})
    (folder / "tokenizer.model").write_bytes(base.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()

    source, out = args.folder / "source", args.folder / "out"
    if not source.exists():
        make_checkpoint(source, Tokenizer.from_pretrained(args.base), args.layers)
    pieces = len(Tokenizer.from_pretrained(args.tokenizer))
    results: dict[str, list[tuple[float, float, int]]] = {}
    for _ in range(args.repeat):
        for name in ("copy", "extend", *(["transformers"] if args.peer else [])):
            arguments = [str(source), str(out), args.tokenizer, str(pieces)]
            command = [sys.executable, "-c", MEASURE.format(code=CODE[name]), *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            else:
                seconds, memory = map(float, done.stdout.split()[-2:])
                size = sum(file.stat().st_size for file in out.iterdir())
                results.setdefault(name, []).append((seconds, memory, size))
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            time.sleep(1)

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    size = sum(file.stat().st_size for file in source.iterdir())
    print(f"{args.layers} layers, {size / 1e9:.1f} GB, -> {pieces:,} pieces")
    print_table(
        ("", "seconds", "GB written", "GB/s", "peak memory, GB"),
        [
            (
                name,
                f"{median([r[0] for r in runs]):.1f}",
                f"{runs[0][2] / 1e9:.1f}",
                f"{median([r[2] / r[0] for r in runs]) / 1e9:.2f}",
                f"{median([r[1] for r in runs]) / 1e9:.2f}",
            )
            for name, runs in results.items()
        ],
    )
    hidden_size = named("llama-2-7b").hidden_size
    print(f"the two matrices: {2 * pieces * hidden_size * 2 / 1e9:.2f} GB")


if __name__ == "__main__":
    run(main)
