"""Has our code become slower? Its time over that of the op's references, now and before.

References are eager PyTorch (of experts, the published loops) and torch.compile, or eager PyTorch and the matrix
products alone.

Ratios within one run, unlike milliseconds, survive another day and, roughly, another machine. A case counts as a
regression when our time has grown by more than the tolerance against *every* reference: noise in one of them moves
only one ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .records import PREFERRED, Record, by_direction, device_slug, load, ours
from .runner import OPS, Log, check_device, run, unavailable_reason

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
    """Every case, dtype and direction in which both have our time and that of a reference."""
    old, new = _ratios(before), _ratios(now)
    found = []
    for key in old.keys() & new.keys():
        both = {name: (ratio, new[key][name]) for name, ratio in old[key].items() if name in new[key]}
        if both:
            found.append(Comparison(*key, both, tolerance))
    order = list(old)
    return sorted(found, key=lambda one: order.index((one.op, one.case, one.dtype, one.direction)))


def compare_now(results: Path, device: str, tolerance: float, log: Log, **options: object) -> list[Comparison]:
    """Measure a few cases of every op and compare them with the committed results below ``results``.

    The baseline is that of this very device, or else of the first one of its kind, which is said. A case that looks
    like a regression is measured once more, and the better of both counts.

    Args:
        options: of ``runner.run``, instead of the few cases, two dtypes and one direction that are measured by default.

    Raises:
        ValueError: there are no committed results to compare with.
    """
    check_device(device)
    found = []
    missing = []
    for op, module in OPS.items():
        path = _baseline(results, op, device, log)
        if path is None:
            missing.append(op)
            continue
        before = load(path)
        choice = {"cases": module.COMPARE_CASES, "dtypes": DTYPES, "directions": module.DIRECTIONS[-1:], **options}
        mine = next(name for name in PREFERRED[device] if unavailable_reason(op, name, device) is None)
        names = [*module.REFERENCES, mine]

        def measure(choice: dict[str, object], op: str = op, names: list[str] = names) -> list[Record]:
            return run(op, device=device, providers=names, log=log, **choice)  # type: ignore[arg-type]

        first = compare(before, measure(choice), tolerance)
        suspects = list(dict.fromkeys(one.case for one in first if one.verdict == "regression"))
        if suspects:
            log(f"measured once more: {', '.join(suspects)}")
            again = {
                (one.case, one.dtype, one.direction): one
                for one in compare(before, measure({**choice, "cases": suspects}), tolerance)
            }
            first = [_better(one, again.get((one.case, one.dtype, one.direction))) for one in first]
        found += first
    if len(missing) == len(OPS):
        raise ValueError(f"no committed results of a {device} device below {results} to compare with")
    for op in missing:
        log(f"without {op}: it has no committed results of a {device} device")
    if not found:
        raise ValueError("the committed results have none of the cases that were measured")
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """Fixed-width text, a table per op: our time over that of each reference, before and now."""
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
        if mine is not None and mine.op in OPS:
            references = OPS[mine.op].REFERENCES
            key = (*mine.group, mine.direction)
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
