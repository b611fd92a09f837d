"""What the fused loss costs on a head with very many classes, beside eager PyTorch and torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench import runner
from ..bench.ops.margin_cross_entropy import OP as op
from .figures import draw_throughput


def measure_throughput(path: Path) -> None:
    """Measure the fused loss, eager and torch.compile on the iNat18-like head, on the CPU: a table and a bar plot."""
    case = op.cases["inat18-n512"]
    ours = "lt[native]" if runner.unavailable_reason(op.name, "lt[native]", "cpu") is None else "lt[reference]"
    print(f"\nThroughput on an iNat18-like head, logits [{case.rows}, {case.classes}], forward + backward ...")
    if ours == "lt[reference]":
        print("The compiled extension is not available: this is the reference backend, which is not meant to be fast.")
    options: dict[str, Any] = {"cases": [case.name], "dtypes": ["float32", "bfloat16"], "directions": ["fwd_bwd"]}
    try:
        records = runner.run(op.name, providers=["eager", "compile", ours], seconds=4.0, **options)
    except Exception as error:  # torch.compile needs a C++ compiler at run time; the comparison stands without it
        print(f"without torch.compile: {str(error).splitlines()[0]}")
        records = runner.run(op.name, providers=["eager", ours], seconds=4.0, **options)
    print(f"\n{'provider':16}{'dtype':10}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'vs eager':>10}")
    eager = {record.dtype: record.ms_median for record in records if record.provider == "eager"}
    for record in records:
        print(
            f"{record.provider:16}{record.dtype:10}{record.ms_median:9.2f}{record.gbps:9.1f}"
            f"{record.fraction_of_floor:9.0%}{eager[record.dtype] / record.ms_median:9.1f}x"
        )
    draw_throughput(records, path)
