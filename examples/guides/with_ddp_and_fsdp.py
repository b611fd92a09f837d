"""DDP and FSDP2: chess endings on two processes, which must learn what one process learns.

    python examples/guides/with_ddp_and_fsdp.py       two processes on this CPU, by gloo

Every run sees the same batches. One process takes them whole, two take half each.
"""

from __future__ import annotations

import argparse
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
        """The call that DDP and FSDP see: the loss, or the logits."""
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
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() != 0:
        state = {}
    shared = [state]
    dist.broadcast_object_list(shared)
    return shared[0]


def worker(rank: int, folder: str, first_state: dict[str, Tensor], alone: dict[str, Tensor], steps: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="DTensor random operators")  # they are not asked for equal numbers
    split, test = chess_endings.load()
    counts = chess_endings.class_counts(split)
    wrappers: dict[str, Callable[[dict[str, Tensor], Tensor], nn.Module]] = {"DDP": with_ddp, "FSDP2": with_fsdp}
    for name, wrap in wrappers.items():
        model = wrap(first_state, counts)
        loss = train(model, split, steps, rank, PROCESSES)
        state = full_state(model)
        furthest = max((state[key] - alone[key]).abs().max().item() for key in alone)
        with torch.no_grad():
            logits = model.eval()(test.features)
        balanced = chess_endings.score(logits, test, counts)["balanced"]
        if rank == 0:
            print(f"{name:12}{loss:12.5f}{balanced:10.1f}{furthest:16.1e}", flush=True)
        if isinstance(model, DistributedDataParallel):
            mine = split.moves[rank::PROCESSES].bincount(minlength=len(counts))
            counted_online(model, mine)
            bias = model.module.head.loss.class_bias
            torch.testing.assert_close(bias, lt_kernels.LogitAdjustmentLoss(counts).class_bias)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    split, test = chess_endings.load()
    counts = chess_endings.class_counts(split)
    torch.manual_seed(0)
    model = Classifier(counts)
    first_state = {key: value.clone() for key, value in model.state_dict().items()}
    loss = train(model, split, args.steps)
    with torch.no_grad():
        balanced = chess_endings.score(model.eval()(test.features), test, counts)["balanced"]
    print(f"{'':12}{'last loss':>12}{'balanced':>10}{'from one, at most':>20}")
    print(f"{'one process':12}{loss:12.5f}{balanced:10.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, first_state, model.state_dict(), args.steps), PROCESSES)


if __name__ == "__main__":
    main()
