"""What the tests share."""

import contextlib
import os
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER_COUNT" in os.environ
):  # `-n auto`: workers share the cores, and waiting threads must not spin
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores))

# All tests compute on the CPU, where the oracles do, but those of on_gpu.py, in a process of their own.
if "MALA_GPU" not in os.environ:
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["MALA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracles must not look for anything outside
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from mala.model import LlamaConfig  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="the real data lie beside the project, not in it"
)


@contextlib.contextmanager
def one_thread():
    """As torchrun gives each of its processes: the order of the sums in a matrix product depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_config(**changes) -> LlamaConfig:
    sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaConfig(**{**sizes, **heads, **changes})
