"""Several processes that train one model: torchrun starts them, PyTorch's FSDP2 shards the model over them.

    torchrun --nproc-per-node 8 train.py --config configs/mala500.toml ...

The model knows nothing of it: `shard` wraps it from outside, and from then on every parameter is a DTensor,
of which each process holds a part, gathered just before it is used. Two processes on a laptop (gloo) take the
same path as 64 GPUs (NCCL). One process, without torchrun, has plain tensors and no process group.
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
    """The processes of a run, and which of them this is. The default is a single one."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # of this process: "cpu", "cuda", "cuda:3"
    mesh: DeviceMesh | None = None
    patient: dist.ProcessGroup | None = None  # for waits of hours, while the main process prepares

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def no_bar(self) -> bool | None:
        """tqdm's `disable`: the main process shows a bar if there is a terminal (None), the others do not."""
        return None if self.is_main else True

    def from_main(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns at the main process, at every process; the others wait for it."""
        result = [work() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        return result[0]

    def wait(self) -> None:
        """Until all processes are here, however long it takes."""
        if self.size > 1:
            dist.barrier(self.patient)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def start(device: str, shards: bool = True) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, on "cpu" or "cuda". shards: may a model be
    sharded? Raises UserError if there are more processes than GPUs, and when another process has ended."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield World(device=device)
        return
    # Before 2.8 FSDP2 took frozen bfloat16 beside trained float32 for a mistake.
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
    except RuntimeError as error:  # gloo and NCCL have no class of their own for a peer that is gone
        if "gloo" not in str(error).lower() and "nccl" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0][:300]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now: first this sentence
        lost = "lost the other processes: one of them has ended, its own error is the cause"
        raise UserError(f"{lost}; the same command goes on from what was saved ({reason})") from None
    # Not after an error: the others may be waiting in a collective, and torchrun ends them.
    del mesh, patient
    gc.collect()  # what still holds a process group when the interpreter ends can abort it
    dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """Shard a Llama with FSDP2: a process keeps 1/size of every parameter and of its optimizer's state.

    It keeps 1/size of every gradient, too, after the last micro-batch of a step (see `sync_gradients`). A
    unit is a block, frozen and trained parameters together. embed_tokens is gathered for the lookup and let
    go; the head belongs to the root, since `Llama.forward` reads its weight, and so do embeddings that are
    one matrix with it. A model on `meta` then gets memory, for this process's part alone: `fill` it.
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
    """Say if the next backward pass averages the gradients over the processes: the last of a step does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def reshard(model: nn.Module) -> None:
    """Let go what a pass without gradients leaves gathered, the root's weights: none may save them so."""
    if isinstance(model, FSDPModule):
        model.reshard()


def unsharded(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor: all at once or, of a sharded one, a process's part after the other's, so that
    nobody holds the whole. All processes must ask for all of them, and all get them."""
    if not isinstance(tensor, DTensor):
        yield tensor.detach()
        return
    local, mesh = tensor.detach().to_local(), tensor.device_mesh
    for rank, rows in enumerate(torch.empty(tensor.shape, device="meta").chunk(mesh.size())):
        part = local if rank == mesh.get_local_rank() else local.new_empty(rows.shape)
        dist.broadcast(part, rank)
        if part.is_cuda:  # NCCL only notes the wish, and gives up on one that waits long for a disk
            torch.cuda.synchronize(part.device)
        yield part


def fill(tensor: Tensor, values: Tensor, rounded_to: torch.dtype | None = None) -> None:
    """Copy `values` into a tensor, or this process's part of them into its part of a sharded one. Of values
    in a memory map no more than that is read. rounded_to: a dtype on the way to the tensor's own."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        rank = tensor.device_mesh.get_local_rank()
        cut = values.chunk(tensor.device_mesh.size())  # as FSDP cuts: along the rows, the last maybe empty
        values, tensor = cut[rank] if rank < len(cut) else values[:0], tensor.to_local()
    tensor.copy_(values.to(dtype=rounded_to))


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """While the block runs SIGTERM and a first SIGINT are only noted, in the list that it yields."""
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
