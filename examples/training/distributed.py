"""One process or many: PyTorch's own engine, started by torchrun, with NCCL on GPUs and gloo on CPUs."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all. A run without torchrun is one of one, without a process group."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that talks and writes what is written once."""
        return self.rank == 0

    def agree(self, code: int) -> int:
        """The largest of all ranks' codes, in each of them."""
        if self.world == 1:
            return code
        codes = torch.tensor(code)  # on the CPU, by gloo: it does not wait for the GPU
        dist.all_reduce(codes, dist.ReduceOp.MAX)
        return int(codes)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of all ranks' tensors, which stay as they are."""
        if self.world == 1:
            return x.clone()
        x = x / self.world
        dist.all_reduce(x)
        return x

    def first_does(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first rank, which alone does it, or the UserError that it raises: in all ranks."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        result, error = outcome
        if error is not None:
            raise error
        return result


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Joins the others that torchrun has started, if it has."""
    if "RANK" not in os.environ:
        yield Ranks(0, 1, torch.device(device))
        return
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: local rank {local} has no GPU, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store when it restarts the ranks (seen in PyTorch 2.13): they would find the addresses of
        # those that have died. Several machines do not count restarts alike, so there it is left as it is.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, torch.device(device, local) if device == "cuda" else torch.device(device))
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process, when all that it has to write is written.

    A rank ends without Python's own clean-up. That stops gloo's threads, which outlive their process group, wherever
    they ask for the interpreter, and C++ aborts if that is inside of its own frames: seen after a training that had
    succeeded (exit code -6, "terminate called without an active exception").
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def replicate(network: nn.Module, ranks: Ranks) -> nn.Module:
    """DistributedDataParallel round the network, where there are several ranks.

    Each rank keeps its own BatchNorm statistics while it trains; `average_statistics` brings them together.
    """
    if ranks.world == 1:
        return network
    # Deprecated in PyTorch 2.13, which has no other name yet for what is meant.
    warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(network: nn.Module, ranks: Ranks) -> None:
    """FSDP2: parameters, gradients and the optimiser's state divided among the ranks, in place.

    What is gathered together is a block: each child that has children of its own, those of nn.Sequential one by one.
    A separable convolution is never cut in two, as its parent's kernel reads both of its weights.
    """
    if not dist.is_initialized():
        raise UserError("--distributed fsdp: start it with torchrun, one process will do")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _blocks(child)
        elif next(child.children(), None) is not None and next(child.parameters(), None) is not None:
            yield child


@contextmanager
def gradient_sync(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the ranks add up their gradients in a backward within: only the last of a step's needs it."""
    later: AbstractContextManager = nullcontext()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel) and not wanted:
        later = model.no_sync()
    with later:
        yield


def average_statistics(network: nn.Module, ranks: Ranks) -> None:
    """Sets the running statistics of BatchNorm to their mean over the ranks.

    They are linear in those of the micro-batches, so that it does not matter how often this is done in between.
    """
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if ranks.world == 1 or not buffers:
        return
    means = ranks.mean(torch.cat([buffer.flatten() for buffer in buffers]))
    for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
