"""Train a classifier of a million classes on a CPU, and measure what that needs beside the weight and its gradient.

    python examples/large_head.py                                             # 1,000,000 classes x 128 features
    python examples/large_head.py --classes 100000 --rows 512 --skip-dense

The same steps of SGD with logit adjustment run twice on one batch, each time in a process of its own so that peaks are
honest:

    dense    F.cross_entropy(F.linear(features, weight, log_prior), target): all logits, their softmax, its gradient
    head     lt_kernels.LinearHead with a memory budget of a sixteenth of the logits

Extra memory is the process's largest resident set during the steps, less what was resident before them, less the
weight's gradient. Features are synthetic; how often each class occurs is not uniform but long-tailed: the counts
of ``lt_kernels.datasets.class_counts("inat18_like")``, repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lt_kernels

Step = Callable[[Tensor, Tensor], Tensor]  # (features, target) -> loss, differentiated


def dense_step(linear: torch.nn.Linear, class_counts: Tensor) -> Step:
    log_prior = lt_kernels.priors.log_prior(class_counts)
    return lambda features, target: F.cross_entropy(F.linear(features, linear.weight, log_prior), target)


def head_step(linear: torch.nn.Linear, class_counts: Tensor, rows: int) -> Step:
    lt_kernels.set_memory_budget(rows * linear.out_features * 4 // 16)  # bytes; 256 MB at the default sizes
    return lt_kernels.LinearHead.from_linear(linear, lt_kernels.LogitAdjustmentLoss(class_counts))


def long_tailed_counts(classes: int) -> Tensor:
    counts = lt_kernels.datasets.class_counts("inat18_like")
    return counts.repeat(-(-classes // len(counts)))[:classes]


def batch(rows: int, width: int, class_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as frequent as their counts say; features are the class's centre and noise."""
    total = class_counts.cumsum(0)
    drawn = torch.randint(int(total[-1]), (rows,))
    target = torch.searchsorted(total, drawn, right=True)
    frequency = torch.linspace(0.5, 3.0, width, dtype=torch.float64)
    centre = (target[:, None] * frequency).sin().float()
    return centre + 0.3 * torch.randn(rows, width), target


def resident(peak: bool = False) -> int:
    """Bytes resident now, or at most so far."""
    status = Path("/proc/self/status")
    if status.exists():
        name = "VmHWM:" if peak else "VmRSS:"
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def train(kind: str, classes: int, width: int, rows: int, steps: int) -> dict[str, float]:
    """Runs in a process of its own."""
    for warm_up in (True, False):  # the libraries' own memory is not the step's
        c, n = (1000, 64) if warm_up else (classes, rows)
        class_counts = long_tailed_counts(c)
        torch.manual_seed(0)
        linear = torch.nn.Linear(width, c, bias=False)
        step = dense_step(linear, class_counts) if kind == "dense" else head_step(linear, class_counts, n)
        optimizer = torch.optim.SGD(linear.parameters(), lr=10.0)
        features, target = batch(n, width, class_counts)
        before, times, losses = resident(), [], []
        for _ in range(steps):
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = step(features, target)
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - begin)
            losses.append(loss.item())
    extra = resident(peak=True) - before - linear.weight.nbytes
    return {"extra_bytes": extra, "seconds": statistics.median(times), "first_loss": losses[0], "last_loss": losses[-1]}


def available_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def in_a_process(kind: str, args: argparse.Namespace) -> dict[str, float]:
    sizes = [f"--{name}={getattr(args, name)}" for name in ("classes", "width", "rows", "steps")]
    command = [sys.executable, os.path.abspath(__file__), *sizes, f"--worker={kind}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128, help="features per sample")
    parser.add_argument("--rows", type=int, default=1024, help="samples per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip-dense", action="store_true", help="measure LinearHead alone")
    parser.add_argument("--worker", choices=("dense", "head"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train(args.worker, args.classes, args.width, args.rows, args.steps)))
        return

    logits, weight = args.rows * args.classes * 4, args.classes * args.width * 4
    print(f"{args.classes:,} classes x {args.width} features, {args.rows:,} rows a step, float32, logit adjustment")
    print(f"weight {weight / 1e9:.3f} GB, its gradient as much; all logits {logits / 1e9:.3f} GB\n")
    needed, available = 3 * logits + 3 * weight, available_memory()
    kinds = {"dense": "F.linear + F.cross_entropy", "head": "LinearHead"}
    if args.skip_dense:
        del kinds["dense"]
    elif available is not None and needed > available:
        print(f"dense skipped: it needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available\n")
        del kinds["dense"]
    print(f"{'':28}{'extra memory':>14}{'a step':>10}{'first loss':>12}{'last loss':>12}")
    results = {}
    for kind, name in kinds.items():
        results[kind] = r = in_a_process(kind, args)
        memory = f"{r['extra_bytes'] / 1e9:.3f} GB"
        print(f"{name:28}{memory:>14}{r['seconds']:>8.2f} s{r['first_loss']:>12.4f}{r['last_loss']:>12.4f}", flush=True)
    if len(results) == 2:
        ratio = results["dense"]["extra_bytes"] / max(1.0, results["head"]["extra_bytes"])
        print(f"\nextra memory of the dense way / of LinearHead: {ratio:.1f}")


if __name__ == "__main__":
    main()
