"""Say whether our code has become slower: our time over its references', now and before.

    python benchmarks/compare.py                          a few cases now, against the saved results
    python benchmarks/compare.py BEFORE.json AFTER.json   two results files; nothing is measured

References are eager PyTorch (for experts, the published loops) and torch.compile, or eager PyTorch and the matrix
products alone. Ratios within one run, unlike milliseconds, survive another day and, roughly, another machine. A case
counts as a regression when our time has grown by more than the tolerance against *every* reference: noise in one of
them moves only one ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_kernels.bench.op import Op
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.records import PREFERRED, RESULTS, Record, by_direction, device_slug, find_root, load, ours
from lt_kernels.bench.runner import BenchmarkError, Log, check_device, run, unavailable_reason
from lt_kernels.cli import Parser, add_measuring_options, measuring_options, print_now, run_command

TOLERANCE = 0.3
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Comparison:
    """One case, dtype and direction of an op."""

    op: str
    case: str
    dtype: str
    direction: str
    ratios: dict[str, tuple[float, float]]  # reference -> (before, now) of our time over its time
    tolerance: float

    @property
    def verdict(self) -> str:
        changes = [now / before for before, now in self.ratios.values()]
        if min(changes) > 1 + self.tolerance:
            return "regression"
        return "faster" if max(changes) < 1 / (1 + self.tolerance) else "same"


def compare(before: Sequence[Record], now: Sequence[Record], tolerance: float = TOLERANCE) -> list[Comparison]:
    """Compare every case, dtype and direction in which both have our time and a reference's."""
    old, new = _ratios(before), _ratios(now)
    found = []
    for key in old.keys() & new.keys():
        both = {name: (ratio, new[key][name]) for name, ratio in old[key].items() if name in new[key]}
        if both:
            found.append(Comparison(*key, both, tolerance))
    order = list(old)
    return sorted(found, key=lambda one: order.index((one.op, one.case, one.dtype, one.direction)))


def compare_now(results: Path, device: str, tolerance: float, log: Log, **options: Any) -> list[Comparison]:
    """Measure a few cases of every op and compare them with the committed results below ``results``.

    The baseline is measured on this very device, or else on the first one of its kind, which is said. A case that looks
    like a regression is measured once more, and the better of both counts.

    Args:
        options: of ``runner.run``, instead of the few cases, two dtypes and one direction that are measured by default.

    Raises:
        ValueError: there are no committed results to compare with.
    """
    check_device(device)
    found, missing = [], []
    for name, op in OPS.items():
        path = _baseline(results, name, device, log)
        if path is None:
            missing.append(name)
        else:
            found += _compare_op(op, load(path), device, tolerance, log, options)
    if len(missing) == len(OPS):
        raise ValueError(f"no committed results of a {device} device below {results} to compare with")
    for name in missing:
        log(f"without {name}: it has no committed results of a {device} device")
    if not found:
        raise ValueError("the committed results have none of the cases that were measured")
    return found


def _compare_op(
    op: Op, before: Sequence[Record], device: str, tolerance: float, log: Log, options: dict[str, Any]
) -> list[Comparison]:
    mine = next(name for name in PREFERRED[device] if unavailable_reason(op.name, name, device) is None)
    choice = {"cases": op.compare_cases, "dtypes": DTYPES, "directions": op.directions[-1:], **options}

    def measure(**changes: Any) -> list[Comparison]:
        now = run(op.name, device=device, providers=[*op.references, mine], log=log, **{**choice, **changes})
        return compare(before, now, tolerance)

    first = measure()
    suspects = list(dict.fromkeys(one.case for one in first if one.verdict == "regression"))
    if not suspects:
        return first
    log(f"measured once more: {', '.join(suspects)}")
    again = {(one.case, one.dtype, one.direction): one for one in measure(cases=suspects)}
    return [_better(one, again.get((one.case, one.dtype, one.direction))) for one in first]


def table(comparisons: Sequence[Comparison]) -> str:
    """Format a table per op: our time over each reference's, before and now."""
    parts = []
    for op in dict.fromkeys(one.op for one in comparisons):
        some = [one for one in comparisons if one.op == op]
        references = list(dict.fromkeys(name for one in some for name in one.ratios))
        heads = "".join(f"{f'/{name}':>16}" for name in references)
        lines = [op, f"{'case':20}{'dtype':10}{'direction':11}{heads}  verdict"]
        for one in some:
            pairs = [one.ratios.get(name) for name in references]
            cells = "".join(f"{f'{pair[0]:.3f} -> {pair[1]:.3f}' if pair else '':>16}" for pair in pairs)
            lines.append(f"{one.case:20}{one.dtype:10}{one.direction:11}{cells}  {one.verdict}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _ratios(records: Sequence[Record]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """(op, case, dtype, direction) -> reference -> our time over its time."""
    found = {}
    for group in by_direction(records):
        mine = ours(group)
        if mine is not None and mine.op in OPS and mine.clock == "device":
            references = OPS[mine.op].references
            key = (mine.op, mine.case, mine.dtype, mine.direction)
            found[key] = {name: mine.ms_median / group[name].ms_median for name in references if name in group}
    return found


def _better(one: Comparison, other: Comparison | None) -> Comparison:
    if other is None:
        return one
    ratios = {name: (before, min(now, other.ratios[name][1])) for name, (before, now) in one.ratios.items()}
    return replace(one, ratios=ratios)


def _baseline(results: Path, op: str, device: str, log: Log) -> Path | None:
    slug = device_slug(device)
    path = results / slug / f"{op}.json"
    if path.exists():
        return path
    others = [
        other
        for other in sorted(results.glob(f"*/{op}.json"))
        if other.parent.name != "aot" and other.parent.name.startswith("cpu-") == (device == "cpu")
    ]
    if not others:
        return None
    log(f"no committed results of {slug}: comparing with those of {others[0].parent.name}")
    return others[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status: 1 if there is a regression."""
    parser = Parser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="two results files, before and after")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X", help="growth that is a regression (0.3)"
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="checkout with the saved results")
    add_measuring_options(parser)
    return run_command("compare", _main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    tolerance, files = arguments.tolerance, arguments.files
    if not tolerance > 0:
        raise ValueError(f"--tolerance: got {tolerance}, expected a number above 0")
    if len(files) not in (0, 2):
        raise ValueError(f"got {len(files)} file, expected two, or none to measure now")
    if files:
        found = compare(load(files[0]), load(files[1]), tolerance)
        if not found:
            raise ValueError(f"{files[0]} and {files[1]} have no case in common with our time and a reference's")
    else:
        results = find_root(arguments.root) / RESULTS
        try:
            found = compare_now(results, tolerance=tolerance, log=print_now, **measuring_options(arguments))
        except BenchmarkError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 1
    print(f"\nour time / that of the reference, before -> now; a regression grows beyond {1 + tolerance:g}x in each")
    print(table(found))
    regressions = sum(one.verdict == "regression" for one in found)
    print(f"{regressions} of {len(found)} are regressions" if regressions else "no regression")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
