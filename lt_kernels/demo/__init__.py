"""``lt-kernels demo``: what the losses do for the tail of a long-tailed data set, and what the fused kernel costs.

``digits`` has the data, the networks and the training; ``figures`` draws; ``throughput`` measures.

Spread is ``within_class_spread`` of the test images' embeddings, which the last layer reads, relative to the spread of
all of them about their mean, since losses differ in how much of the sphere they use.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .digits import (
    BALPOE,
    FEW_BELOW,
    IMBALANCE,
    LOSSES,
    MANY_ABOVE,
    NETWORKS,
    TEST_PER_CLASS,
    Split,
    class_counts,
    epochs_of,
    train,
)

if TYPE_CHECKING:
    from ..metrics import CalibrationError, ShotGroupAccuracy

GROUPS, ERRORS = ("overall", "many", "medium", "few", "balanced"), ("ece", "mce")
SPREADS = ("many", "medium", "few")
#: Rows whose embeddings are drawn, and what they are called there: both probes of SupCon read the same.
DRAWN = {"cross-entropy": "cross-entropy", "SupCon + probe": "SupCon", "GML": "GML", "ELM": "ELM"}
_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "torchmetrics": "torchmetrics"}


def missing_packages() -> list[str]:
    """Return the names of the packages that the demo needs and that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


class Row(NamedTuple):
    """What is measured of one loss, over all seeds; every seed numbers the classes by frequency."""

    accuracy: ShotGroupAccuracy
    calibration: CalibrationError
    spreads: list[dict[str, Tensor]]
    predictions: list[tuple[Tensor, Tensor]]  # confidence, whether it was right


def run(out: Path, seeds: int = 3, epochs: int = 80, throughput: bool = True) -> list[Path]:
    """Train, print the table, measure, draw; return the files written."""
    from tqdm import tqdm

    from ..metrics import CalibrationError, ShotGroupAccuracy, within_class_spread
    from .figures import draw_accuracy, draw_embeddings, draw_reliability

    out.mkdir(parents=True, exist_ok=True)
    counts = class_counts()
    print(
        f"Handwritten digits made long-tailed: training images per class {counts.tolist()} (imbalance {IMBALANCE}),\n"
        f"{TEST_PER_CLASS} test images per class, {seeds} seeds. Many: more than {MANY_ABOVE} training images, "
        f"few: fewer than {FEW_BELOW}, medium: the rest.\n"
    )
    bounds: dict[str, Any] = {"many_above": MANY_ABOVE, "few_below": FEW_BELOW}
    rows = {name: Row(ShotGroupAccuracy(counts, **bounds), CalibrationError(), [], []) for name in LOSSES}
    pictures: dict[str, Tensor] = {}
    interval = 0.2 if sys.stderr.isatty() else 15.0
    total = seeds * sum(epochs_of(network, epochs) for network in NETWORKS)
    with _threads(1), tqdm(total=total, desc="training", unit="epoch", mininterval=interval) as progress:
        for seed in range(seeds):
            split = Split.make(seed)
            labels = split.test_labels
            for network in NETWORKS:
                progress.set_postfix_str(f"seed {seed}, {network}", refresh=False)
                for name, model in train(network, split, seed, epochs, progress.update).items():
                    probabilities = model.predict(split.test_images)
                    rows[name].accuracy.update(probabilities, labels)
                    rows[name].calibration.update(probabilities, labels)
                    confidence, predicted = probabilities.max(1)
                    rows[name].predictions.append((confidence, predicted == labels))
                    if name in BALPOE:
                        continue  # an embedding for each expert
                    embeddings = model.embed(split.test_images)
                    of_all = (embeddings - embeddings.mean(0)).square().sum(1).mean()
                    spread = within_class_spread(embeddings, labels, counts, **bounds)
                    rows[name].spreads.append({group: value / of_all for group, value in spread.items()})
                    if seed == 0 and name in DRAWN:
                        pictures[DRAWN[name]] = embeddings
    print_table(rows)
    written = [out / name for name in ("accuracy_per_class.png", "reliability.png", "embeddings.png")]
    draw_accuracy({name: row.accuracy.per_class() for name, row in rows.items()}, counts, written[0])
    draw_reliability({name: row.predictions for name, row in rows.items()}, written[1])
    draw_embeddings(pictures, counts, written[2])
    if throughput:
        from .throughput import measure_throughput

        written.append(out / "throughput.png")
        measure_throughput(written[-1])
    print("\n" + "\n".join(f"saved {path.resolve()}" for path in written))
    return written


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The network is so small that a second thread only costs synchronisation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_table(rows: dict[str, Row]) -> None:
    """Print accuracies and calibration over all seeds, and the seeds' mean spread."""
    columns = (*GROUPS, *ERRORS)
    print(f"\n{'':20}{'accuracy, %':>47}{'calibration, %':>18}{'spread, %':>27}")
    heads = [*(c.upper() if c in ERRORS else c for c in columns), *SPREADS]
    print(f"{'':20}" + "".join(f"{head:>9}" for head in heads))
    for name, row in rows.items():
        values = row.accuracy.compute() | row.calibration.compute()
        shown = [f"{100 * float(values[column]):9.1f}" for column in columns]
        for group in SPREADS:
            found = [float(spread[group]) for spread in row.spreads]
            shown.append(f"{100 * sum(found) / len(found):9.1f}" if found else f"{'-':>9}")
        print(f"{name:20}" + "".join(shown))
    print(
        "ECE and MCE: expected and maximum calibration error, 15 bins; a bin with few samples makes MCE noisy.\n"
        "Spread: mean squared distance of a class's test embeddings to their mean, % of that of all test embeddings.\n"
        "Logit adjustment with tau = 1 and balanced softmax are the same function: their rows agree up to rounding."
    )
