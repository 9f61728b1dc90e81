"""Train one model in several processes: torchrun starts them, and PyTorch's FSDP2 shards the model.

    torchrun --nproc-per-node 8 train.py --config configs/mala500.toml ...

The model's code knows nothing of this. `shard` wraps the model from outside. From then on every parameter is
a DTensor: each process holds one shard, and FSDP2 gathers the whole just before it is used. Two processes on
a laptop (gloo) run the same code as 64 GPUs (NCCL). Without torchrun there are only plain tensors.
"""

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from mala.cli import UserError

Result = TypeVar("Result")


@dataclass
class World:
    """The processes of a run, and the rank of this one. The default is a single process."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # of this process: "cpu", "cuda", "cuda:3"
    mesh: DeviceMesh | None = None
    patient: dist.ProcessGroup | None = None  # for waits of hours; the default group gives up

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def no_bar(self) -> bool | None:
        """Return tqdm's `disable`: in the main process None (a bar if there is a terminal), else True."""
        return None if self.is_main else True

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Call `work` in the main process only, and return its result in every process."""
        result = [work() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        return result[0]

    def wait(self) -> None:
        """Wait until all processes have called this, however long it takes."""
        if self.size > 1:
            dist.barrier(self.patient)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def start(device: str, shards: bool = True) -> Iterator[World]:
    """Join the processes that torchrun started, if any, on "cpu" or "cuda". shards: whether a model may be
    sharded. Raises UserError if there are more processes than GPUs, or when another process has ended."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield World(device=device)
        return
    # Before PyTorch 2.8, FSDP2 rejected frozen bfloat16 and trained float32 parameters in one block.
    if shards and TorchVersion(torch.__version__) < "2.8":
        raise UserError(f"PyTorch {torch.__version__} cannot shard two dtypes; install 2.8 or newer")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            started = f"torchrun started process {local_rank + 1} on this machine"
            raise UserError(f"{started}, which has {gpus} GPUs; lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        dist.init_process_group("gloo")
    mesh = init_device_mesh(torch.device(device).type, (size,))
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    try:
        yield World(rank, size, device, mesh, patient)
    except RuntimeError as error:  # gloo and NCCL have no error class for a lost process
        if "gloo" not in str(error).lower() and "nccl" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0][:300]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now; report this first
        lost = "lost the other processes: one of them has ended, see its error for the cause"
        raise UserError(f"{lost}; the same command continues from what was saved ({reason})") from None
    # Skipped after an error: the others may be waiting in a collective, and torchrun ends them.
    del mesh, patient
    gc.collect()  # an object that still holds a process group can crash the interpreter at exit
    dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """Shard a Llama with FSDP2: a process keeps 1/size of every parameter and of its optimizer state.

    It also keeps 1/size of every gradient after the last micro-batch of a step (see `sync_gradients`). Each
    block is one FSDP unit, frozen and trained parameters together. embed_tokens is a unit too, gathered only
    for the lookup. lm_head belongs to the root, because `Llama.forward` reads its weight; so do tied
    embeddings. A model on `meta` then gets memory for this process's shard only, without values: `fill` it.
    """
    if world.size > 1:
        for block in model.model["layers"]:
            fully_shard(block, mesh=world.mesh)
        if not model.config.tie_word_embeddings:
            fully_shard(model.model["embed_tokens"], mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
    if model.lm_head.weight.is_meta:
        model.to_empty(device=world.device)
        model.tie_weights()


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Set whether the next backward pass averages the gradients over processes: a step's last one does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def reshard(model: nn.Module) -> None:
    """Shard the root's weights again before saving: a forward pass without gradients leaves them gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def unsharded(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's rows: all at once or, if it is sharded, shard by shard, so that no process holds the
    whole tensor. All processes must iterate to the end, and each of them gets every shard."""
    if not isinstance(tensor, DTensor):
        yield tensor.detach()
        return
    local, mesh = tensor.detach().to_local(), tensor.device_mesh
    for rank, rows in enumerate(torch.empty(tensor.shape, device="meta").chunk(mesh.size())):
        part = local if rank == mesh.get_local_rank() else local.new_empty(rows.shape)
        dist.broadcast(part, rank)
        if part.is_cuda:  # NCCL only queues the broadcast, which times out if it waits for a slow disk
            torch.cuda.synchronize(part.device)
        yield part


def fill(tensor: Tensor, values: Tensor, rounded_to: torch.dtype | None = None) -> None:
    """Copy `values` into a tensor. If it is sharded, copy only this process's rows, and read no more of a
    memory map. rounded_to: a dtype that the values are cast to first."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        rank = tensor.device_mesh.get_local_rank()
        cut = values.chunk(tensor.device_mesh.size())  # cuts rows as FSDP2 does; may give fewer chunks
        values, tensor = cut[rank] if rank < len(cut) else values[:0], tensor.to_local()
    tensor.copy_(values.to(dtype=rounded_to))


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Record SIGTERM and the first SIGINT in the yielded list while the block runs, instead of stopping."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
