"""Settings and helpers that the tests share."""

import contextlib
import os
from pathlib import Path

import pytest

# With `-n auto` the workers share the cores, and threads that wait must not spin.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores))

# All tests compute on the CPU, like the oracles, except those of on_gpu.py, which have their own process.
if "MALA_GPU" not in os.environ:
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["MALA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracles must not download anything
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from mala.model import LlamaConfig  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the real data in ../shared/data is absent")


@contextlib.contextmanager
def one_thread():
    """Compute with one thread, like a process of torchrun. The order of sums in a product depends on it."""
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
