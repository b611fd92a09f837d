"""DDP and FSDP2: chess endings on two processes, which must learn what one process learns.

    python examples/guides/with_ddp_and_fsdp.py       two processes on this CPU, by gloo

Every run sees the same batches. One process takes them whole, two take half each.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable

import chess_endings
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lt_kernels

PROCESSES, BATCH = 2, 512


class Classifier(nn.Module):
    def __init__(self, class_counts: Tensor) -> None:
        super().__init__()
        self.body = chess_endings.body()
        self.head = lt_kernels.LinearHead(256, len(class_counts), lt_kernels.LogitAdjustmentLoss(class_counts))

    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss, or without a target the logits; DDP and FSDP see this call."""
        return self.head(self.body(features), target)


def train(model: nn.Module, split: chess_endings.Split, steps: int, rank: int = 0, processes: int = 1) -> float:
    """Train on this process's share of each batch; return the mean of all processes' last losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(split.moves), (BATCH,), generator=generator).chunk(processes)[rank]
        loss = model(split.features[rows], split.moves[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = loss.detach().clone()
    if processes > 1:
        dist.all_reduce(last)
    return last.item() / processes


# --8<-- [start:ddp]
def with_ddp(first_state: dict[str, Tensor], counts: Tensor) -> nn.Module:
    model = Classifier(counts)
    model.load_state_dict(first_state)
    return DistributedDataParallel(model)


def counted_online(model: DistributedDataParallel, seen: Tensor) -> None:
    """Give every process the counts of all: ``update_counts`` with this process's alone would be lost.

    DDP copies rank 0's buffers to the others before each forward.
    """
    dist.all_reduce(seen)
    model.module.head.update_counts(seen)


# --8<-- [end:ddp]


# --8<-- [start:fsdp]
def with_fsdp(first_state: dict[str, Tensor], counts: Tensor) -> nn.Module:
    with torch.device("meta"):  # no memory yet
        model = Classifier(counts)
    fully_shard(model.head)
    fully_shard(model)
    model.to_empty(device="cpu")
    for module in model.modules():  # the layers' weights; the loss has its class tensors already
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    # rank 0's state, so that the runs can be compared; leave it out to start from random weights
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, first_state if dist.get_rank() == 0 else {}, options=options)
    return model


# --8<-- [end:fsdp]


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole tensors, on every process."""
    found = [get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))]  # complete on rank 0
    dist.broadcast_object_list(found)
    return found[0]


def balanced_accuracy(model: nn.Module, test: chess_endings.Split, counts: Tensor) -> float:
    with torch.no_grad():
        return chess_endings.score(model.eval()(test.features), test, counts)["balanced"]


def compare(rank: int, steps: int) -> None:
    """Train alone, which every process does by itself, and with the others; print what differs."""
    split, test = chess_endings.load()
    counts = chess_endings.class_counts(split)
    torch.manual_seed(0)
    alone = Classifier(counts)
    first_state = copy.deepcopy(alone.state_dict())
    loss = train(alone, split, steps)
    show = print if rank == 0 else lambda line: None
    show(f"{'':12}{'last loss':>12}{'balanced':>10}{'from one, at most':>20}")
    show(f"{'one process':12}{loss:12.5f}{balanced_accuracy(alone, test, counts):10.1f}")
    wrappers: dict[str, Callable[[dict[str, Tensor], Tensor], nn.Module]] = {"DDP": with_ddp, "FSDP2": with_fsdp}
    for name, wrap in wrappers.items():
        model = wrap(first_state, counts)
        loss = train(model, split, steps, rank, PROCESSES)
        balanced = balanced_accuracy(model, test, counts)
        state = full_state(model)
        furthest = max((state[key] - tensor).abs().max().item() for key, tensor in alone.state_dict().items())
        show(f"{name:12}{loss:12.5f}{balanced:10.1f}{furthest:20.1e}")
        if isinstance(model, DistributedDataParallel):
            counted_online(model, split.moves[rank::PROCESSES].bincount(minlength=len(counts)))
            torch.testing.assert_close(model.module.head.loss.class_bias, alone.head.loss.class_bias)


def worker(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="DTensor random operators")  # equal numbers are not asked of them
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    compare(rank, steps)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # fork, before any thread is started: modules are imported once
        mp.start_processes(worker, (folder, args.steps), PROCESSES, start_method="fork")


if __name__ == "__main__":
    main()
