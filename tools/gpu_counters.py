"""Bytes, time, registers, occupancy and instructions of the main kernels, read from the hardware counters by ncu.

    python3 tools/gpu_counters.py --backend triton,native --json ncu.json

Runs itself under ncu with --launch, reads what ncu wrote, and sets the DRAM bytes of each case beside the floor: every
logit read once, and every gradient written once. Writes still in the last-level cache when a kernel ends are not in its
DRAM bytes, so a ratio may be a little below 1. Exit status 77 where ncu cannot read the counters; the last line says
why.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

NOT_POSSIBLE = 77
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded", "Profiling is not supported")
METRICS = {
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "nanoseconds",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved_occupancy_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "smsp__thread_inst_executed_per_inst_executed.ratio": "threads_per_instruction",
}
#: Launched at the start of every case, so that ncu's list of kernels can be cut into cases.
MARKER = "spin_kernel"


@dataclass(frozen=True)
class Case:
    direction: str  # fwd | fwd+grad (one pass) | bwd (recomputing)
    shape: tuple[int, ...]
    dtype: str
    op: str = "margin_cross_entropy"

    @property
    def floor_bytes(self) -> int:
        passes = 1 if self.direction == "fwd" else 2
        return math.prod(self.shape) * {"bfloat16": 2, "float32": 4}[self.dtype] * passes


def _case(op: str, config: Any) -> Case:
    """Return a configuration of an operator as a case."""
    positions = (math.isqrt(config.positions),) * 2 if getattr(config, "positions", 1) > 1 else ()
    shape = (*((config.experts,) if op.startswith("expert") else ()), config.rows, config.classes, *positions)
    backward = getattr(config, "needs", ()) or getattr(config, "backward", False)
    with_grad = getattr(config, "with_grad", op == "expert_cross_entropy")
    return Case("bwd" if backward else "fwd+grad" if with_grad else "fwd", shape, config.dtype, op)


def _cases() -> tuple[Case, ...]:
    """Return what the operators' configurations ask for; the most telling ones of the classifiers first."""
    by_op = {}
    for op in ("margin_cross_entropy", "expert_cross_entropy", "expert_fusion", "expert_divergence"):
        configs = importlib.import_module(f"lt_kernels.ops.{op}.configs").COUNTED
        by_op[op] = [_case(op, config) for config in configs]
    rows = by_op.pop("margin_cross_entropy")
    return (*rows[:6], *(case for cases in by_op.values() for case in cases), *rows[6:])


CASES = _cases()


def call(case: Case, device: str = "cuda") -> tuple[torch.Tensor, Callable[[], Any]]:
    """The logits of a case, and its operator on them."""
    import torch

    from lt_kernels import functional as F

    logits = torch.randn(case.shape, device=device, dtype=getattr(torch, case.dtype)).requires_grad_()
    if case.op == "expert_fusion":
        return logits, lambda: F.expert_fusion(logits)
    if case.op == "expert_divergence":
        return logits, lambda: F.expert_divergence(logits, "to_mean")
    experts = case.op == "expert_cross_entropy"
    classes = case.shape[2 if experts else 1]
    target = torch.randint(classes, case.shape[1:2] if experts else case.shape[:1] + case.shape[2:], device=device)
    bias = torch.linspace(-5, 0, classes, device=device)
    if experts:
        return logits, lambda: F.expert_cross_entropy(logits, target, log_prior=bias, taus=(0.0, 1.0, 2.0))
    return logits, lambda: F.margin_cross_entropy(logits, target, class_bias=bias)


def launch(backends: list[str], plan: Path, seconds: float) -> None:
    """Run every case once inside ncu's window, as many as there is time for; list them in ``plan``."""
    import torch

    import lt_kernels

    started, done = time.monotonic(), []
    for case in CASES:
        for backend in backends:
            if time.monotonic() - started > seconds:
                break
            torch.manual_seed(0)
            logits, forward = call(case)
            recompute = case.direction == "bwd"
            lt_kernels.set_gradient_policy("recompute" if recompute else "one_pass")
            with lt_kernels.use_backend(backend), torch.set_grad_enabled(case.direction != "fwd"):
                loss = forward()  # compiles
                if recompute:
                    torch.autograd.grad(loss, logits, retain_graph=True)
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
                if recompute:
                    torch.autograd.grad(loss, logits)
                else:
                    forward()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            done.append({"backend": backend, **asdict(case), "floor_bytes": case.floor_bytes})
            del logits, forward, loss
            plan.write_text(json.dumps({"device": torch.cuda.get_device_name(), "cases": done}))


def read(listing: str) -> list[dict[str, Any]]:
    """The kernels of ncu's CSV in order: name, grid, block, metrics."""
    lines = listing.splitlines()
    header = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        kernel = kernels.setdefault(
            row["ID"], {"kernel": row["Kernel Name"], "grid": row.get("Grid Size"), "block": row.get("Block Size")}
        )
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            try:
                kernel[name] = float(row["Metric Value"].replace(",", ""))
            except ValueError:  # "n/a"
                kernel[name] = None
    return list(kernels.values())


def tabulate(cases: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with their kernels, their DRAM bytes and the ratio of these to the floor."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if MARKER in kernel["kernel"]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    if len(groups) < len(cases):
        raise RuntimeError(f"ncu lists {len(groups)} cases of {len(cases)}")
    rows = []
    for case, group in zip(cases, groups, strict=False):
        moved = sum((k.get("dram_bytes_read") or 0) + (k.get("dram_bytes_written") or 0) for k in group)
        nanoseconds = sum(k.get("nanoseconds") or 0 for k in group)
        rows.append(
            {
                **case,
                "dram_bytes": moved,
                "ratio_to_floor": round(moved / case["floor_bytes"], 4),
                "microseconds": round(nanoseconds / 1e3, 2),
                "floor_gbps": round(case["floor_bytes"] / nanoseconds, 1) if nanoseconds else None,
                "kernels": group,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton,native", metavar="NAME[,NAME]")
    parser.add_argument("--ncu", default="ncu", metavar="FILE", help="the profiler (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="start no case after this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--launch", type=Path, metavar="PLAN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch:
        launch(options.backend.split(","), options.launch, options.seconds)
        return 0

    with tempfile.TemporaryDirectory() as folder:
        log, plan = Path(folder, "ncu.csv"), Path(folder, "plan.json")
        # the caches are flushed before every kernel (ncu's default); the clocks are left as they are
        command = [options.ncu, "--csv", "--log-file", log, "--print-units", "base", "--metrics", ",".join(METRICS)]
        command += ["--profile-from-start", "off", "--clock-control", "none", "--target-processes", "application-only"]
        command += [sys.executable, __file__, "--launch", plan]
        command += ["--backend", options.backend, "--seconds", str(options.seconds)]
        done = subprocess.run([str(word) for word in command], check=False)
        listing = log.read_text(errors="replace") if log.exists() else ""
        planned = json.loads(plan.read_text()) if plan.exists() else {"device": None, "cases": []}
    refusal = next((line for line in listing.splitlines() if any(word in line for word in REFUSALS)), None)
    if refusal is not None:
        print(f"ncu cannot read the counters here: {refusal.strip('= ')}")
        return NOT_POSSIBLE
    kernels = read(listing)
    if done.returncode != 0 or not kernels:
        print(listing[-2000:])
        print(f"ncu ended with status {done.returncode} and {len(kernels)} kernels")
        return 1
    rows = tabulate(planned["cases"], kernels)
    for row in rows:
        main_kernel: dict[str, Any] = max(row["kernels"], key=lambda kernel: kernel.get("nanoseconds") or 0, default={})
        print(
            f"{row['backend']:7} {row['op']:20} {row['direction']:8} {'x'.join(map(str, row['shape'])):16} "
            f"{row['dtype']:8} "
            f"{row['microseconds']:9.1f} us  DRAM {row['ratio_to_floor']:6.3f} x floor  "
            f"{main_kernel.get('registers') or 0:3.0f} registers  "
            f"{main_kernel.get('achieved_occupancy_percent') or 0:5.1f}% occupancy  {len(row['kernels'])} kernels"
        )
    left_out = len(CASES) * len(options.backend.split(",")) - len(rows)
    if left_out:
        print(f"{left_out} cases were not reached in {options.seconds:.0f} s")
    if options.json:
        facts = {"device": planned["device"], "metrics": METRICS, "not_reached": left_out, "cases": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
