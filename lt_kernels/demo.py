"""``lt-kernels demo``: what the losses do for the tail of a long-tailed data set, and what the fused kernel costs.

Training: scikit-learn's handwritten digits (1,797 real images of 8 x 8 pixels). For each seed the ten digits are put in
a random order and given 150 ... 3 training images (imbalance 50, exponential profile); 24 other images of each digit
are the balanced test split. Network, optimiser, schedule, batches and seeds are the same for every loss; only the last
layer differs for LDAM, which takes cosines, and the last two layers for BalPoE, which has three of each. Every loss
keeps its defaults, mixup BalPoE's published alpha: nothing was tuned on the test split.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import expert_fusion
from .losses import BalancedSoftmaxLoss, BalPoELoss, ExpertHead, LDAMLoss, LogitAdjustmentLoss, VSLoss
from .mixing import mixup
from .schedules import DeferredReweighting

CLASSES = 10
LARGEST, IMBALANCE, TEST_PER_CLASS = 150, 50, 24
MANY_ABOVE, FEW_BELOW = 50, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 1e-3
LOSSES = (
    *("cross-entropy", "logit adjustment", "balanced softmax", "LDAM + DRW", "VS"),
    *("BalPoE (3 experts)", "BalPoE + mixup"),
)
EXPERTS = 3
MIXUP_ALPHA = BalPoELoss.PRESETS["cifar100-lt"].mixup_alpha
GROUPS = ("overall", "many", "medium", "few", "balanced")
ERRORS = ("ece", "mce")
_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "torchmetrics": "torchmetrics"}


def missing_packages() -> list[str]:
    """Names of the packages that the demo needs and that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def run(out: Path, seeds: int = 3, epochs: int = 80, throughput: bool = True) -> list[Path]:
    """Train, print the table, measure, draw; returns the files written."""
    from tqdm import tqdm

    from .metrics import CalibrationError, ShotGroupAccuracy

    out.mkdir(parents=True, exist_ok=True)
    counts = class_counts()
    print(
        f"Handwritten digits made long-tailed: training images per class {counts.tolist()} (imbalance {IMBALANCE}),\n"
        f"{TEST_PER_CLASS} test images per class, {seeds} seeds. Many: more than {MANY_ABOVE} training images, "
        f"few: fewer than {FEW_BELOW}, medium: the rest.\n"
    )
    # accumulated over the seeds, which all number the classes by frequency
    metrics = {name: ShotGroupAccuracy(counts, many_above=MANY_ABOVE, few_below=FEW_BELOW) for name in LOSSES}
    calibration = {name: CalibrationError() for name in LOSSES}
    predictions: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in LOSSES}  # confidence, correct
    interval = 0.2 if sys.stderr.isatty() else 15.0
    total = seeds * len(LOSSES) * epochs
    with _threads(1), tqdm(total=total, desc="training", unit="epoch", mininterval=interval) as progress:
        for seed in range(seeds):
            split = Split.make(seed)
            for name, metric in metrics.items():
                progress.set_postfix_str(f"seed {seed}, {name}", refresh=False)
                model = train(name, split, seed, epochs, progress.update)
                probabilities = predict(name, model, split.test_images)
                metric.update(probabilities, split.test_labels)
                calibration[name].update(probabilities, split.test_labels)
                confidence, predicted = probabilities.max(1)
                predictions[name].append((confidence, predicted == split.test_labels))
    print_accuracy({name: metrics[name].compute() | calibration[name].compute() for name in LOSSES})
    written = [out / "accuracy_per_class.png", out / "reliability.png"]
    draw_accuracy({name: metric.per_class() for name, metric in metrics.items()}, counts, written[0])
    draw_reliability(predictions, written[1])

    if throughput:
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


def class_counts() -> Tensor:
    """Training images per class, most frequent first, int64 [10]."""
    position = torch.arange(CLASSES) / (CLASSES - 1)
    return (LARGEST * float(IMBALANCE) ** -position).round().long()


@dataclass
class Split:
    """One long-tailed train split and its balanced test split; class c is the c-th most frequent."""

    images: Tensor  # [423, 1, 8, 8]
    labels: Tensor  # [423]
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def make(cls, seed: int) -> Split:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.as_tensor(digits.target)
        generator = torch.Generator().manual_seed(seed)
        train, test = [], []
        for digit, count in zip(torch.randperm(CLASSES, generator=generator), class_counts(), strict=True):
            found = (labels == digit).nonzero()[:, 0]
            found = found[torch.randperm(len(found), generator=generator)]
            test.append(found[:TEST_PER_CLASS])
            train.append(found[TEST_PER_CLASS : TEST_PER_CLASS + int(count)])

        def gather(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
            ranks = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor([len(part) for part in parts]))
            return images[torch.cat(parts)], ranks

        return cls(*gather(train), *gather(test))


class CosineLinear(nn.Linear):
    """Cosines between features and class vectors, in [-1, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


class Experts(nn.Module):
    """Two layers of its own for each expert; logits [E, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(32 * 16, 64) for _ in range(EXPERTS))
        self.head = ExpertHead(64, CLASSES, EXPERTS)

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = self.head([hidden(input).relu() for hidden in self.hidden])
        return logits


def make_model(name: str) -> nn.Module:
    """Two convolutions and two linear layers, 40 thousand parameters (three experts: 105 thousand)."""
    if name.startswith("BalPoE"):
        last: list[nn.Module] = [Experts()]
    else:
        head = CosineLinear(64, CLASSES, bias=False) if name.startswith("LDAM") else nn.Linear(64, CLASSES)
        last = [nn.Linear(32 * 16, 64), nn.ReLU(), head]
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *last,
    )


@torch.no_grad()
def predict(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities [N, C], without any prior: the test split is balanced."""
    output = model(images)
    if name.startswith("BalPoE"):
        log_probs = expert_fusion(output, return_log_probs=True).log_probs
        assert log_probs is not None
        return log_probs.exp()
    return ((30.0 * output) if name.startswith("LDAM") else output).softmax(1)


def make_loss(name: str) -> nn.Module:
    counts = class_counts()
    makers: dict[str, Callable[[], nn.Module]] = {
        "cross-entropy": nn.CrossEntropyLoss,
        "logit adjustment": lambda: LogitAdjustmentLoss(counts),
        "balanced softmax": lambda: BalancedSoftmaxLoss(counts),
        "LDAM + DRW": lambda: LDAMLoss(counts),
        "VS": lambda: VSLoss(counts),
    }
    return BalPoELoss(counts) if name.startswith("BalPoE") else makers[name]()


def train(name: str, split: Split, seed: int, epochs: int, after_epoch: Callable[[], object]) -> nn.Module:
    """One trained network."""
    torch.manual_seed(seed)
    model, loss = make_model(name), make_loss(name)
    schedule = None
    if name.endswith("DRW"):
        schedule = DeferredReweighting(loss, class_counts(), switch_epoch=epochs * 4 // 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if schedule is not None:
            schedule.step(epoch)
        for batch in torch.randperm(len(split.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            if name.endswith("mixup"):
                mixed = mixup(split.images[batch], split.labels[batch], MIXUP_ALPHA, generator=generator)
                loss(model(mixed.input), *mixed[1:]).backward()
            else:
                loss(model(split.images[batch]), split.labels[batch]).backward()
            optimizer.step()
        decay.step()
        after_epoch()
    return model


def print_accuracy(results: dict[str, dict[str, Tensor]]) -> None:
    columns = (*GROUPS, *ERRORS)
    print("\n" + f"{'accuracy, %':20}" + "".join(f"{c.upper() if c in ERRORS else c:>10}" for c in columns))
    for name, values in results.items():
        print(f"{name:20}" + "".join(f"{100 * float(values[column]):10.1f}" for column in columns))
    print(
        "ECE and MCE: expected and maximum calibration error, 15 bins, %; a bin with few samples makes MCE noisy.\n"
        "Logit adjustment with tau = 1 and balanced softmax are the same function: their rows agree up to rounding."
    )


def draw_reliability(predictions: dict[str, list[tuple[Tensor, Tensor]]], path: Path) -> None:
    from .metrics import reliability_diagram

    plt = _pyplot()
    shown = ("cross-entropy", "logit adjustment", *(name for name in predictions if name.startswith("BalPoE")))
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), layout="constrained")
    for axis, name in zip(axes, shown, strict=True):
        confidence, correct = (torch.cat(parts) for parts in zip(*predictions[name], strict=True))
        reliability_diagram(confidence, correct, axis)
        axis.set_title(f"{name}\n{axis.get_title()}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_accuracy(per_class: dict[str, Tensor], counts: Tensor, path: Path) -> None:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4))
    for name, values in per_class.items():
        below = {"linewidth": 5, "alpha": 0.5} if name == "logit adjustment" else {}  # equal to balanced softmax
        axis.plot(range(CLASSES), 100 * values.numpy(), marker="o", markersize=4, label=name, **below)
    axis.set_xticks(range(CLASSES), [str(int(count)) for count in counts])
    axis.set_xlabel("training images of the class")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("Accuracy per class, sorted by frequency", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure_throughput(path: Path) -> None:
    """Fused loss, eager and torch.compile on the iNat18-like head, on the CPU: a table and a bar plot."""
    from .bench import margin_cross_entropy as op
    from .bench import runner

    case = op.CASES["inat18-n512"]
    ours = "lt[native]" if runner.unavailable_reason(op.OP, "lt[native]", "cpu") is None else "lt[reference]"
    print(f"\nThroughput on an iNat18-like head, logits [{case.rows}, {case.classes}], forward + backward ...")
    if ours == "lt[reference]":
        print("The compiled extension is not available: this is the reference backend, which is not meant to be fast.")
    try:
        records = _measure(["eager", "compile", ours])
    except Exception as error:  # torch.compile needs a C++ compiler at run time; the comparison stands without it
        print(f"without torch.compile: {str(error).splitlines()[0]}")
        records = _measure(["eager", ours])
    print(f"\n{'provider':16}{'dtype':10}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'vs eager':>10}")
    eager = {record.dtype: record.ms_median for record in records if record.provider == "eager"}
    for record in records:
        print(
            f"{record.provider:16}{record.dtype:10}{record.ms_median:9.2f}{record.gbps:9.1f}"
            f"{record.fraction_of_floor:9.0%}{eager[record.dtype] / record.ms_median:9.1f}x"
        )
    draw_throughput(records, path)


def _measure(providers: list[str]) -> list[Any]:
    from .bench import margin_cross_entropy as op
    from .bench import runner

    return runner.run(
        op.OP,
        cases=["inat18-n512"],
        providers=providers,
        dtypes=["float32", "bfloat16"],
        directions=["fwd_bwd"],
        seconds=4.0,
    )


def draw_throughput(records: list[Any], path: Path) -> None:
    """Bars of useful bandwidth, one group per dtype."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4))
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    providers = list(dict.fromkeys(record.provider for record in records))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        heights = [record.gbps for record in records if record.provider == provider]
        at = [place + (index - (len(providers) - 1) / 2) * width for place in range(len(dtypes))]
        axis.bar_label(axis.bar(at, heights, width, label=provider), fmt="%.1f", fontsize=7)
    axis.set_xticks(range(len(dtypes)), dtypes)
    axis.set_ylabel("useful GB/s")
    sizes = records[0].sizes
    axis.set_title(f"{sizes['N']} x {sizes['C']:,} logits, forward + backward, {records[0].device}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
