"""Measure the loss and gradients of a language model's head at real shapes: time, peak memory and error.

    python benchmarks/cross_entropy.py [--repeats 5] [--shapes 1024,256,260164 …] [--out cross_entropy.json]

It runs on a GPU if there is one, otherwise on the CPU. The implementations take turns, so a busy machine
slows all of them alike.

    time    median of the repeats, for the loss and the gradients of hidden states and weight
    floor   time of the three matrix products alone (h Wᵀ, dLogits W, dLogitsᵀ h), in the same turn
    memory  peak beyond the operands and their gradients
    error   of the two gradients, |found - exact| / |exact| against float64 (half precision rounds its result)

"mixed" is what training uses: hidden states in bfloat16, and a float32 weight, which is cast. "ours, in
place" adds to an existing gradient, as every micro-batch except the first does. "exact float32" is
F.cross_entropy with operands and logits in float32.

On a GPU, these peers are measured if they are installed and work: PyTorch's own linear_cross_entropy (from
2.13 on), Liger-Kernel (its CuTe kernels with LIGER_KERNEL_IMPL=cutedsl), QuACK, and Cut Cross-Entropy with
and without its gradient filtering.
"""

import argparse
import ctypes
import os
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

# (N, D, V). V is that of MaLA-500 (260,164), LLaMA 2 (32,000) or LLaMA 3 (128,256); D 4,096 is MaLA-500's.
CPU_SHAPES = [(1024, 256, 260164), (1024, 768, 32000), (1024, 512, 128256)]
GPU_SHAPES = [(8192, 4096, 260164), (8192, 4096, 128256), (8192, 4096, 32000)]
DTYPES = {  # (of the hidden states, of the weight)
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets)


def exact_float32(hidden, weight, targets):
    return F.cross_entropy(hidden.float() @ weight.float().T, targets)


def implementations(device: str) -> dict:
    found = {
        "F.cross_entropy": plain,
        "exact float32": exact_float32,
        "torch.compile": torch.compile(plain, dynamic=False),
        "ours": linear_cross_entropy,
        "ours, in place": partial(linear_cross_entropy, share=1.0),
    }
    if device == "cuda":
        if hasattr(F, "linear_cross_entropy"):  # on a CPU a call takes tens of seconds
            options = torch.nn.LinearCrossEntropyOptions()
            found["F.linear_cross_entropy"] = with_cast(partial(F.linear_cross_entropy, options=options))
        for name, load in PEERS.items():
            try:
                found |= load()
            except Exception as error:  # also from a wrong version
                print(f"{name} is left out: {error}")
    return found


def with_cast(loss_function):
    """Cast the weight to the dtype of the hidden states, for a peer that needs operands of one dtype."""
    return lambda hidden, weight, targets: loss_function(hidden, weight.to(hidden.dtype), targets)


def load_liger() -> dict:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)  # as ours accumulates
    name = " ".join(["Liger-Kernel", os.environ.get("LIGER_KERNEL_IMPL", "")]).strip()
    return {name: with_cast(lambda hidden, weight, targets: liger(weight, hidden, targets))}


def load_quack() -> dict:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return {"QuACK": with_cast(chunked_linear_cross_entropy)}


def load_cce() -> dict:
    from cut_cross_entropy import linear_cross_entropy as cce

    exact = partial(cce, filter_eps=None)
    return {"Cut Cross-Entropy": with_cast(exact), "Cut Cross-Entropy, filtered": with_cast(cce)}


PEERS = {"liger-kernel": load_liger, "quack-kernels": load_quack, "cut-cross-entropy": load_cce}


def gradients(loss_function, hidden, weight, targets) -> list[torch.Tensor]:
    """Return the loss and the gradients of hidden states and weight."""
    if weight.grad is not None:  # in place: add to it
        hidden = hidden.detach().requires_grad_()
        loss = loss_function(hidden, weight, targets)
        loss.backward()
        return [loss.detach(), hidden.grad, weight.grad]
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_function(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def in_float64(hidden, weight, targets) -> list[torch.Tensor]:
    """Return the exact gradients. The method is plain and slow: 128 rows at a time."""
    weight = weight.double()
    d_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    d_weight = torch.zeros_like(weight)
    for rows in torch.arange(len(hidden), device=hidden.device).split(128):
        d_logits = torch.softmax(hidden[rows].double() @ weight.T, 1)
        d_logits[range(len(rows)), targets[rows]] -= 1
        d_hidden[rows] = d_logits @ weight / len(hidden)
        d_weight.addmm_(d_logits.T, hidden[rows].double(), alpha=1 / len(hidden))
    return [d_hidden, d_weight]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |found - exact| / |exact|. Convert some rows at a time: all (V, D) in float64 take 8.5 GB."""
    pairs = zip(found.split(4096), exact.split(4096))
    return sum(((a - b).double().norm() ** 2).item() for a, b in pairs) ** 0.5 / exact.norm().item()


def three_products(hidden, weight) -> None:
    weight = weight.to(hidden.dtype)
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
    """Return the peak memory of `function()` in bytes, beyond what was in use before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    page = 4096
    ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier calls freed is reused and not counted
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
    torch._dynamo.reset()  # torch.compile compiles a function at most 8 times
    N, D, V = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=device).to(DTYPES[dtype][0])
    weight = torch.randn(V, D, generator=generator, device=device) / D**0.5  # logits as large as a model's
    weight = weight.to(DTYPES[dtype][1])
    targets = torch.randint(0, V, (N,), generator=generator, device=device)
    expected = in_float64(hidden, weight, targets)

    rows, candidates = [], {}
    for name, loss_function in implementations(device).items():
        operand = weight.detach()
        if name == "ours, in place":
            if dtype != "mixed":
                continue
            operand = operand.requires_grad_()
            operand.grad = torch.zeros_like(weight)
        call = partial(gradients, loss_function, hidden, operand, targets)
        try:
            found = call()  # a warm-up, which also compiles
        except Exception as error:  # out of memory, or a peer that lacks this shape
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append({"implementation": name, "failed": reason})
            continue
        errors = [relative_error(a, b) for a, b in zip(found[1:], expected)]
        del found
        # The gradients are as large as the operands. One that existed before is not in the peak.
        memory = peak_memory(call, device) - hidden.nbytes - (weight.nbytes if operand.grad is None else 0)
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
    parser.add_argument("--shapes", nargs="+", metavar="N,D,V", help="shapes instead of the usual ones")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, PyTorch {torch.__version__}")
    rows = []
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes or ()]
    for shape in shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
        for dtype in args.dtypes:
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
