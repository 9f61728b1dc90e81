"""Loss and gradients of a language model's head, at real shapes: time, peak memory and error of each way.

    python benchmarks/cross_entropy.py [--repeats 5] [--out cross_entropy.json]

With a GPU its rows are measured, else a CPU's. The implementations take turns, so that a busy machine slows
all of them alike.

    time    median of the repeats, loss and gradients of hidden states and weight
    floor   time of the three matrix products alone (h Wᵀ, dLogits W, dLogitsᵀ h), in the same turn
    memory  peak beyond the operands and their gradients
    error   of the two gradients, |found - exact| / |exact| against float64 (half precision rounds its result)

`torch.compile`, Liger-Kernel and Cut Cross-Entropy (without its gradient filtering) are measured if they are
installed and can run; "exact float32" is F.cross_entropy on operands and logits in float32.
"""

import argparse
import ctypes
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from mala.cli import run  # noqa: E402
from mala.cross_entropy import linear_cross_entropy  # noqa: E402
from mala.storage.files import write_json  # noqa: E402
from tools.tables import print_table  # noqa: E402

# (N, D, V): MaLA-500's vocabulary on a small model, SmolLM2's and LLaMA 2's, LLaMA 3's, and MaLA-500 itself.
CPU_SHAPES = [(1024, 256, 260164), (1024, 768, 32000), (1024, 512, 128256)]
GPU_SHAPES = [
    (8192, 4096, 32000),
    (8192, 4096, 128256),
    (8192, 4096, 260164),
    (16384, 2048, 128256),
    (4096, 768, 260164),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def exact_float32(hidden, weight, targets):
    return F.cross_entropy(hidden.float() @ weight.float().T, targets)


def implementations(device: str) -> dict:
    found = {
        "F.cross_entropy": plain,
        "exact float32": exact_float32,
        "torch.compile": torch.compile(plain, dynamic=False),
        "ours, chunked": partial(linear_cross_entropy, implementation="chunked"),
    }
    if device == "cuda":
        found["ours, triton"] = partial(linear_cross_entropy, implementation="triton")
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)  # as ours accumulates
            found["Liger-Kernel"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
        except ModuleNotFoundError:
            print("liger-kernel is not installed and left out")
        try:
            import cut_cross_entropy

            found["Cut Cross-Entropy"] = partial(cut_cross_entropy.linear_cross_entropy, filter_eps=None)
        except ModuleNotFoundError:
            print("cut-cross-entropy is not installed and left out")
    return found


def gradients(loss_function, hidden, weight, targets) -> list[torch.Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_function(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def in_float64(hidden, weight, targets) -> list[torch.Tensor]:
    """The exact gradients, 128 rows at a time: plainly, and slowly."""
    weight = weight.double()
    d_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    d_weight = torch.zeros_like(weight)
    for rows in torch.arange(len(hidden), device=hidden.device).split(128):
        d_logits = torch.softmax(hidden[rows].double() @ weight.T, 1)
        d_logits[range(len(rows)), targets[rows]] -= 1
        d_hidden[rows] = d_logits @ weight / len(hidden)
        d_weight.addmm_(d_logits.T, hidden[rows].double(), alpha=1 / len(hidden))
    return [d_hidden.cpu(), d_weight.cpu()]  # out of the way of what is measured on a GPU


def three_products(hidden, weight) -> None:
    logits = hidden @ weight.T
    _ = logits @ weight, logits.T @ hidden


def seconds(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function, device: str) -> int:
    """Bytes at the highest point of `function()`, beyond those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    page = 4096
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left with the allocator would be taken again unseen
    resident = [int(Path("/proc/self/statm").read_text().split()[1])]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (max(resident) - resident[0]) * page


def measure(shape: tuple[int, int, int], dtype: str, device: str, repeats: int) -> list[dict]:
    N, D, V = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=device).to(DTYPES[dtype])
    weight = torch.randn(V, D, generator=generator, device=device) / D**0.5  # logits like a model's
    weight = weight.to(DTYPES[dtype])
    targets = torch.randint(0, V, (N,), generator=generator, device=device)
    expected = in_float64(hidden, weight, targets)

    rows, candidates = [], {}
    for name, loss_function in implementations(device).items():
        call = partial(gradients, loss_function, hidden, weight, targets)
        try:
            found = call()  # a first time, also to compile
        except Exception as error:  # out of memory, or a peer that cannot do this shape
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append({"implementation": name, "failed": reason})
            continue
        errors = [((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(found[1:], expected)]
        del found
        # The gradients are as large as the operands.
        memory = peak_memory(call, device) - (hidden.nbytes + weight.nbytes)
        candidates[name] = (call, {"implementation": name, "memory": max(memory, 0), "errors": errors})
    del expected
    times: dict[str, list[float]] = {name: [] for name in candidates}
    floor = []
    for _ in range(repeats):
        floor.append(seconds(lambda: three_products(hidden, weight), device))
        for name, (call, _) in candidates.items():
            times[name].append(seconds(call, device))
    for name, (_, row) in candidates.items():
        rows.append({**row, "seconds": statistics.median(times[name]), "floor": statistics.median(floor)})
    return [{"N": N, "D": D, "V": V, "dtype": dtype, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, PyTorch {torch.__version__}")
    rows = []
    for shape in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        for dtype in DTYPES:
            measured = measure(shape, dtype, device, args.repeats)
            rows += measured
            by_name = {row["implementation"]: row for row in measured if "seconds" in row}
            base = by_name.get("F.cross_entropy")
            print(f"\nN {shape[0]:,}, D {shape[1]:,}, V {shape[2]:,}, {dtype}")
            print_table(
                ("", "time, s", "/F.cross_entropy", "/floor", "memory, MB", "error dHidden", "dWeight"),
                [
                    (row["implementation"], row["failed"], "", "", "", "", "")
                    if "failed" in row
                    else (
                        row["implementation"],
                        f"{row['seconds']:.4f}",
                        f"{row['seconds'] / base['seconds']:.2f}" if base else "",
                        f"{row['seconds'] / row['floor']:.2f}",
                        f"{row['memory'] / 1e6:,.0f}",
                        *(f"{e:.1e}" for e in row["errors"]),
                    )
                    for row in measured
                ],
            )
    if args.out:
        write_json(args.out, {"machine": machine, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    run(main)
