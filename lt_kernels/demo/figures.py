"""The four plots of the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .digits import BALPOE, CLASSES, FEW_BELOW, TEST_PER_CLASS

if TYPE_CHECKING:
    from ..bench.records import Record


def draw_accuracy(per_class: Mapping[str, Tensor], counts: Tensor, path: Path) -> None:
    """Draw the accuracy of each class, one line per loss."""
    with _figure(path, figsize=(9, 4.5)) as (_, axis):
        for index, (name, accuracy) in enumerate(per_class.items()):
            style: dict[str, Any] = {"color": f"C{index % 8}", "linestyle": "-" if index < 8 else "--"}
            if name == "logit adjustment":  # equal to balanced softmax: wider, so that both show
                style |= {"linewidth": 5, "alpha": 0.5}
            axis.plot(range(CLASSES), 100 * accuracy, marker="o", markersize=4, label=name, **style)
        axis.set_xticks(range(CLASSES), [str(count) for count in counts.tolist()])
        axis.set(xlabel="training images of the class", ylabel="test accuracy, %")
        axis.set_title("Accuracy per class, sorted by frequency", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_reliability(predictions: Mapping[str, Sequence[tuple[Tensor, Tensor]]], path: Path) -> None:
    """Draw accuracy against confidence; ``predictions``: confidence and whether it was right, a pair for each seed."""
    from ..metrics import reliability_diagram

    shown = ("cross-entropy", "logit adjustment", *BALPOE)
    with _figure(path, 1, len(shown), figsize=(4 * len(shown), 4)) as (_, axes):
        for axis, name in zip(axes, shown, strict=True):
            confidence, correct = (torch.cat(parts) for parts in zip(*predictions[name], strict=True))
            reliability_diagram(confidence, correct, axis)
            axis.set_title(f"{name}\n{axis.get_title()}", fontsize=10)


def draw_embeddings(embeddings: dict[str, Tensor], counts: Tensor, path: Path) -> None:
    """Draw the test images' embeddings on their first two principal components, one panel per loss."""
    from sklearn.decomposition import PCA

    labels = torch.arange(CLASSES).repeat_interleave(TEST_PER_CLASS)
    few = {"marker": "X", "s": 45, "edgecolors": "black", "linewidths": 0.7, "zorder": 3}
    often = {"marker": "o", "s": 12, "alpha": 0.6, "linewidths": 0}
    with _figure(path, 1, len(embeddings), figsize=(4 * len(embeddings), 4.6)) as (figure, axes):
        for axis, (name, values) in zip(axes, embeddings.items(), strict=True):
            pca = PCA(2, random_state=0)
            points = pca.fit_transform(values.numpy())
            for rank, count in enumerate(counts.tolist()):
                style = few if count < FEW_BELOW else often
                axis.scatter(*points[(labels == rank).numpy()].T, color=f"C{rank}", label=f"{count}", **style)
            explained = f"two principal components, {pca.explained_variance_ratio_.sum():.0%} of the variance"
            axis.set_title(f"{name}\n{explained}", fontsize=10)
            axis.set(xticks=[], yticks=[])
            axis.set_aspect("equal", "datalim")
        title = "test images of one seed; numbers of training images of their classes"
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, title=title, loc="outside lower center", ncols=CLASSES, fontsize=8)


def draw_throughput(records: list[Record], path: Path) -> None:
    """Draw bars of useful bandwidth, one group per dtype."""
    dtypes, providers = (list(dict.fromkeys(getattr(r, what) for r in records)) for what in ("dtype", "provider"))
    width = 0.8 / len(providers)
    with _figure(path, figsize=(8, 4)) as (_, axis):
        for index, provider in enumerate(providers):
            heights = [record.gbps for record in records if record.provider == provider]
            at = [place + (index - (len(providers) - 1) / 2) * width for place in range(len(dtypes))]
            axis.bar_label(axis.bar(at, heights, width, label=provider), fmt="%.1f", fontsize=7)
        axis.set_xticks(range(len(dtypes)), dtypes)
        axis.set_ylabel("useful GB/s")
        sizes = f"{records[0].sizes['N']} x {records[0].sizes['C']:,} logits"
        axis.set_title(f"{sizes}, forward + backward, {records[0].device}", fontsize=9)
        axis.legend(fontsize=8)


@contextmanager
def _figure(path: Path, *grid: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, and save it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*grid, layout="constrained", **options)
    yield figure, axes
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(len(figure.axes) > 1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
