"""Make the synthetic class counts ``inat18_like`` from what is public about iNaturalist 2018.

    python -m tools.inat18_like           compare with the shipped file
    python -m tools.inat18_like --write   write it

Public are the 8,142 classes with their super-categories (the validation list), the train images of each super-category
(README of visipedia/inat_comp, 2018), the range 2 to 1,000, and the shot groups: 842 classes have more than 100
images and 3,224 fewer than 20, which reproduces the published rows of accuracy per group (``tests/test_metrics.py``).

Within a super-category the logarithms of the counts follow one curve of normal quantiles: straight below the median, a
parabola above it. ``BELOW``, ``ABOVE`` and ``CURVE`` are chosen so that the groups come out nearly right; the median
gives the super-category's total. Single images then move to make every total and group exact. Which class has which
count within its super-category is drawn with a fixed seed. Only Python's own arithmetic takes part.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

FOLDER = Path(__file__).resolve().parents[1] / "lt_kernels" / "data" / "class_counts"
FILE = FOLDER / "inaturalist2018_like_synthetic_train.txt"
TOTALS = {
    "Plantae": 118_800,
    "Insecta": 87_192,
    "Aves": 143_950,
    "Actinopterygii": 7_835,
    "Fungi": 6_864,
    "Reptilia": 22_754,
    "Mollusca": 8_007,
    "Mammalia": 20_104,
    "Animalia": 5_966,
    "Amphibia": 11_156,
    "Arachnida": 4_037,
    "Chromista": 621,
    "Protozoa": 211,
    "Bacteria": 16,
}
LOWEST, HIGHEST = 2, 1000
MANY_ABOVE, FEW_BELOW = 100, 20
MANY, FEW = 842, 3_224
BELOW, ABOVE, CURVE = 0.6, 0.576, 0.311


def clipped(log_count: float) -> float:
    return min(float(HIGHEST), max(float(LOWEST), math.exp(log_count)))


def quantiles(classes: int, total: int) -> list[int]:
    """Return the counts of a super-category in ascending order; their sum is near ``total``."""
    normal = NormalDist()
    z = [normal.inv_cdf((i + 0.5) / classes) for i in range(classes)]
    curve = [BELOW * x if x < 0 else ABOVE * x + CURVE * x * x for x in z]
    low, high = 0.0, math.log(HIGHEST)
    for _ in range(40):
        median = (low + high) / 2
        if sum(clipped(median + x) for x in curve) < total:
            low = median
        else:
            high = median
    return [round(clipped(low + x)) for x in curve]


def group(count: int) -> int:
    return (count >= FEW_BELOW) + (count > MANY_ABOVE)


def move(counts: dict[str, list[int]], inside: Callable[[int], bool], wanted: int, outer: int, inner: int) -> None:
    """Move the classes nearest to a border across it until ``wanted`` classes are ``inside``."""
    order = [(name, i) for name, of_class in counts.items() for i in range(len(of_class))]
    excess = sum(inside(counts[name][i]) for name, i in order) - wanted
    movable = [(name, i) for name, i in order if inside(counts[name][i]) == (excess > 0)]
    for name, i in sorted(movable, key=lambda at: abs(counts[at[0]][at[1]] - inner))[: abs(excess)]:
        counts[name][i] = outer if excess > 0 else inner


def settle(counts: list[int], total: int) -> None:
    """Add or take single images, the largest classes first, until the sum is ``total``; no class leaves its group."""
    while (missing := total - sum(counts)) != 0:
        step, before = (1 if missing > 0 else -1), sum(counts)
        for i in reversed(range(len(counts))):
            changed = counts[i] + step
            if sum(counts) != total and LOWEST <= changed <= HIGHEST and group(changed) == group(counts[i]):
                counts[i] = changed
        if sum(counts) == before:
            raise RuntimeError(f"the groups leave no room for a total of {total}")


def class_counts(supercategories: list[str]) -> list[int]:
    """Return the count of each class, in the order of ``supercategories``."""
    counts = {name: quantiles(supercategories.count(name), total) for name, total in TOTALS.items()}
    move(counts, lambda n: n > MANY_ABOVE, MANY, outer=MANY_ABOVE, inner=MANY_ABOVE + 1)
    move(counts, lambda n: n < FEW_BELOW, FEW, outer=FEW_BELOW, inner=FEW_BELOW - 1)
    for name, total in TOTALS.items():
        settle(counts[name], total)
        random.Random(f"iNat18-like {name}").shuffle(counts[name])
    left = {name: iter(of_class) for name, of_class in counts.items()}
    return [next(left[name]) for name in supercategories]


def text() -> str:
    names = (FOLDER / "inaturalist2018_class_supercategory.txt").read_text("utf-8").split()
    return "".join(f"{n}\n" for n in class_counts(names))


def main() -> int:
    made = text()
    if "--write" in sys.argv[1:]:
        FILE.write_text(made, "utf-8")
    same = FILE.read_text("utf-8") == made
    print(f"{FILE.name}: {'as made here' if same else 'differs; python -m tools.inat18_like --write'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
