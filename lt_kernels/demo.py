"""``lt-kernels demo``: what the losses do for the tail of a long-tailed data set, and what the fused kernel costs.

Training: scikit-learn's handwritten digits (1,797 real images of 8 x 8 pixels). For each seed the ten digits are put in
a random order and given 150 ... 3 training images (imbalance 50, exponential profile); 24 other images of each digit
are the balanced test split. Network, optimiser, schedule, batches and seeds are the same for every loss; only the last
layer differs for LDAM and GML, which take cosines, and the last two layers for BalPoE, which has three of each. Every
loss keeps its defaults, mixup BalPoE's published alpha, GML its temperature published for CIFAR; GML's queue and
momentum are smaller than published, as the data set is. Nothing was tuned on the test split.

SupCon compares two views of each image, which are shifted by up to a pixel and a little noisy; it trains for half the
epochs, so that its network sees as many images as the others. Afterwards the embeddings are frozen, and a linear layer
is trained on those of the training images, with cross-entropy and with logit adjustment. "views" is logit adjustment of
one such view, which tells apart what the views do and what the loss does.

Spread is ``within_class_spread`` of the embeddings that the last layer reads, of the test images, and relative to the
spread of all of them about their mean, since losses differ in how much of the sphere they use.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import expert_fusion
from .losses import (
    BalancedSoftmaxLoss,
    BalPoELoss,
    ELMLoss,
    ExpertHead,
    GMLLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    SupConLoss,
    VSLoss,
)
from .mixing import mixup
from .queues import ClassQueue, momentum_update
from .schedules import DeferredReweighting

CLASSES = 10
LARGEST, IMBALANCE, TEST_PER_CLASS = 150, 50, 24
MANY_ABOVE, FEW_BELOW = 50, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 1e-3
#: Networks, and the rows of the table that each gives.
NETWORKS: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        *("cross-entropy", "logit adjustment", "balanced softmax", "LDAM + DRW", "VS"),
        *("BalPoE (3 experts)", "BalPoE + mixup", "logit adj. + views"),
    )
}
NETWORKS |= {"SupCon": ("SupCon + probe", "SupCon + adj. probe"), "GML": ("GML",), "ELM": ("ELM",)}
LOSSES = tuple(row for rows in NETWORKS.values() for row in rows)
EXPERTS = 3
WIDTH, PROJECTION = 64, 32
NOISE = 0.1
QUEUE, MOMENTUM = 256, 0.99
PROBE_STEPS = 300
MIXUP_ALPHA = BalPoELoss.PRESETS["cifar100-lt"].mixup_alpha
GROUPS = ("overall", "many", "medium", "few", "balanced")
ERRORS = ("ece", "mce")
SPREADS = ("many", "medium", "few")
COSINE = ("LDAM + DRW", "GML")
#: Rows whose embeddings are drawn, and what they are called there: both probes of SupCon read the same.
DRAWN = {"cross-entropy": "cross-entropy", "SupCon + probe": "SupCon", "GML": "GML", "ELM": "ELM"}
_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "torchmetrics": "torchmetrics"}


def missing_packages() -> list[str]:
    """Names of the packages that the demo needs and that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def run(out: Path, seeds: int = 3, epochs: int = 80, throughput: bool = True) -> list[Path]:
    """Train, print the table, measure, draw; returns the files written."""
    from tqdm import tqdm

    from .metrics import CalibrationError, ShotGroupAccuracy, within_class_spread

    out.mkdir(parents=True, exist_ok=True)
    counts = class_counts()
    print(
        f"Handwritten digits made long-tailed: training images per class {counts.tolist()} (imbalance {IMBALANCE}),\n"
        f"{TEST_PER_CLASS} test images per class, {seeds} seeds. Many: more than {MANY_ABOVE} training images, "
        f"few: fewer than {FEW_BELOW}, medium: the rest.\n"
    )
    # accumulated over the seeds, which all number the classes by frequency
    bounds: dict[str, Any] = {"many_above": MANY_ABOVE, "few_below": FEW_BELOW}
    metrics = {name: ShotGroupAccuracy(counts, **bounds) for name in LOSSES}
    spreads: dict[str, list[dict[str, Tensor]]] = {name: [] for name in LOSSES}
    calibration = {name: CalibrationError() for name in LOSSES}
    predictions: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in LOSSES}  # confidence, correct
    pictures: dict[str, Tensor] = {}
    interval = 0.2 if sys.stderr.isatty() else 15.0
    total = seeds * sum(epochs_of(network, epochs) for network in NETWORKS)
    with _threads(1), tqdm(total=total, desc="training", unit="epoch", mininterval=interval) as progress:
        for seed in range(seeds):
            split = Split.make(seed)
            for network in NETWORKS:
                progress.set_postfix_str(f"seed {seed}, {network}", refresh=False)
                for name, model in train(network, split, seed, epochs, progress.update).items():
                    probabilities = predict(name, model, split.test_images)
                    metrics[name].update(probabilities, split.test_labels)
                    calibration[name].update(probabilities, split.test_labels)
                    confidence, predicted = probabilities.max(1)
                    predictions[name].append((confidence, predicted == split.test_labels))
                    if name.startswith("BalPoE"):
                        continue  # an embedding for each expert
                    embeddings = embed(model, split.test_images)
                    of_all = (embeddings - embeddings.mean(0)).square().sum(1).mean()
                    spread = within_class_spread(embeddings, split.test_labels, counts, **bounds)
                    spreads[name].append({group: value / of_all for group, value in spread.items()})
                    if seed == 0 and name in DRAWN:
                        pictures[DRAWN[name]] = embeddings
            if seed == 0:
                labels = split.test_labels
    print_table({name: metrics[name].compute() | calibration[name].compute() for name in LOSSES}, spreads)
    written = [out / name for name in ("accuracy_per_class.png", "reliability.png", "embeddings.png")]
    draw_accuracy({name: metric.per_class() for name, metric in metrics.items()}, counts, written[0])
    draw_reliability(predictions, written[1])
    draw_embeddings(pictures, labels, counts, written[2])

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


class UnitVectors(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input)


class Experts(nn.Module):
    """Two layers of its own for each expert; logits [E, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(32 * 16, WIDTH) for _ in range(EXPERTS))
        self.head = ExpertHead(WIDTH, CLASSES, EXPERTS)

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = self.head([hidden(input).relu() for hidden in self.hidden])
        return logits


def make_model(name: str) -> nn.Sequential:
    """Two convolutions and two linear layers, 40 thousand parameters (three experts: 105 thousand)."""
    if name.startswith("BalPoE"):
        last: list[nn.Module] = [Experts()]
    else:
        head = CosineLinear(WIDTH, CLASSES, bias=False) if name in COSINE else nn.Linear(WIDTH, CLASSES)
        last = [nn.Linear(32 * 16, WIDTH), nn.ReLU(), head]
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
    return ((30.0 * output) if name in COSINE else output).softmax(1)


@torch.no_grad()
def embed(model: nn.Sequential, images: Tensor) -> Tensor:
    """What the last layer reads, as unit vectors [N, 64]."""
    return F.normalize(model[:-1](images))


class Batch(NamedTuple):
    """Some training images; ``which`` says which ones."""

    images: Tensor
    labels: Tensor
    which: Tensor


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to a pixel each way, with a little noise."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1))
    shift = torch.randint(3, (2, len(images), 1), generator=generator)
    down, across = shift + torch.arange(size)
    shifted = padded[torch.arange(len(images))[:, None, None], 0, down[:, :, None], across[:, None, :]][:, None]
    return shifted + NOISE * torch.randn(images.shape, generator=generator)


class Objective(nn.Module):
    """What a network is trained for: a loss of its logits. Subclasses need more of the network."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        loss: Tensor = self.loss(model(batch.images), batch.labels)
        return loss


class OfMixup(Objective):
    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        mixed = mixup(batch.images, batch.labels, MIXUP_ALPHA, generator=generator)
        loss: Tensor = self.loss(model(mixed.input), *mixed[1:])
        return loss


class OfView(Objective):
    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        return super().forward(model, batch._replace(images=view(batch.images, generator)), generator)


def projector() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTION))


class OfTwoViews(Objective):
    """SupCon: projections of two views of each image. The last layer has no part in it."""

    def __init__(self) -> None:
        super().__init__(SupConLoss())
        self.project = projector()

    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        views = view(batch.images.repeat(2, 1, 1, 1), generator)
        features = F.normalize(self.project(model[:-1](views)))
        loss: Tensor = self.loss(features.unflatten(0, (2, -1)).transpose(0, 1), batch.labels)
        return loss


class OfQueue(Objective):
    """GML: a cosine classifier, and projections against those of a queue of a momentum encoder's embeddings."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(GMLLoss(class_counts(), temperature=0.1))
        self.query, self.key = projector(), projector()
        self.teacher = copy.deepcopy(model[:-1]).requires_grad_(False)
        self.queue = ClassQueue(class_counts(), QUEUE, WIDTH)

    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        momentum_update(self.teacher, model[:-1], MOMENTUM)
        slots = self.queue.enqueue(self.teacher(batch.images), batch.labels, batch.which)
        features = model[:-1](batch.images)
        query, key = F.normalize(self.query(features)), F.normalize(self.key(self.queue.features))
        cosines = model[-1](features)
        loss: Tensor = self.loss(query, batch.labels, key, self.queue.labels, cosines, own_key=slots)
        return loss


class OfEmbeddings(Objective):
    """ELM: the logits, and the embeddings that the last layer reads."""

    def __init__(self) -> None:
        super().__init__(ELMLoss(class_counts()))

    def forward(self, model: nn.Sequential, batch: Batch, generator: torch.Generator) -> Tensor:
        features = model[:-1](batch.images)
        loss: Tensor = self.loss(model[-1](features), F.normalize(features), batch.labels)
        return loss


def make_objective(name: str, model: nn.Sequential) -> Objective:
    counts = class_counts()
    makers: dict[str, Callable[[], Objective]] = {
        "cross-entropy": lambda: Objective(nn.CrossEntropyLoss()),
        "logit adjustment": lambda: Objective(LogitAdjustmentLoss(counts)),
        "balanced softmax": lambda: Objective(BalancedSoftmaxLoss(counts)),
        "LDAM + DRW": lambda: Objective(LDAMLoss(counts)),
        "VS": lambda: Objective(VSLoss(counts)),
        "BalPoE (3 experts)": lambda: Objective(BalPoELoss(counts)),
        "BalPoE + mixup": lambda: OfMixup(BalPoELoss(counts)),
        "logit adj. + views": lambda: OfView(LogitAdjustmentLoss(counts)),
        "SupCon": OfTwoViews,
        "GML": lambda: OfQueue(model),
        "ELM": OfEmbeddings,
    }
    return makers[name]()


def epochs_of(network: str, epochs: int) -> int:
    """SupCon's have two views of each image."""
    return max(epochs // 2, 1) if network == "SupCon" else epochs


def train(
    network: str, split: Split, seed: int, epochs: int, after_epoch: Callable[[], object]
) -> dict[str, nn.Sequential]:
    """One trained network; a model for each row of the table."""
    torch.manual_seed(seed)
    model = make_model(network)
    objective = make_objective(network, model)
    epochs = epochs_of(network, epochs)
    schedule = None
    if network.endswith("DRW"):
        schedule = DeferredReweighting(objective.loss, class_counts(), switch_epoch=epochs * 4 // 5)
    parameters = [each for each in (*model.parameters(), *objective.parameters()) if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if schedule is not None:
            schedule.step(epoch)
        for which in torch.randperm(len(split.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            objective(model, Batch(split.images[which], split.labels[which], which), generator).backward()
            optimizer.step()
        decay.step()
        after_epoch()
    if network != "SupCon":
        return {network: model}
    losses = (nn.CrossEntropyLoss(), LogitAdjustmentLoss(class_counts()))
    return {name: probe(model, split, loss) for name, loss in zip(NETWORKS[network], losses, strict=True)}


def probe(model: nn.Sequential, split: Split, loss: nn.Module) -> nn.Sequential:
    """The frozen network with a linear layer trained on its embeddings of the training images."""
    embeddings = embed(model, split.images)
    linear = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=10 * LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        loss(linear(embeddings), split.labels).backward()
        optimizer.step()
    return nn.Sequential(*list(model)[:-1], UnitVectors(), linear)


def print_table(results: dict[str, dict[str, Tensor]], spreads: dict[str, list[dict[str, Tensor]]]) -> None:
    """Accuracies and calibration over all seeds; the seeds' mean spread."""
    columns = (*GROUPS, *ERRORS)
    print(f"\n{'':20}{'accuracy, %':>47}{'calibration, %':>18}{'spread, %':>27}")
    heads = [*(c.upper() if c in ERRORS else c for c in columns), *SPREADS]
    print(f"{'':20}" + "".join(f"{head:>9}" for head in heads))
    for name, values in results.items():
        row = [f"{100 * float(values[column]):9.1f}" for column in columns]
        for group in SPREADS:
            found = [float(values[group]) for values in spreads[name]]
            row.append(f"{100 * sum(found) / len(found):9.1f}" if found else f"{'-':>9}")
        print(f"{name:20}" + "".join(row))
    print(
        "ECE and MCE: expected and maximum calibration error, 15 bins; a bin with few samples makes MCE noisy.\n"
        "Spread: mean squared distance of a class's test embeddings to their mean, % of that of all test embeddings.\n"
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
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for index, (name, values) in enumerate(per_class.items()):
        style = "-" if index < 8 else "--"
        below = {"linewidth": 5, "alpha": 0.5} if name == "logit adjustment" else {}  # equal to balanced softmax
        axis.plot(
            range(CLASSES),
            100 * values.numpy(),
            color=f"C{index % 8}",
            linestyle=style,
            marker="o",
            markersize=4,
            label=name,
            **below,
        )
    axis.set_xticks(range(CLASSES), [str(int(count)) for count in counts])
    axis.set_xlabel("training images of the class")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("Accuracy per class, sorted by frequency", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_embeddings(embeddings: dict[str, Tensor], labels: Tensor, counts: Tensor, path: Path) -> None:
    """The test images' embeddings on their first two principal components; one panel per loss."""
    from sklearn.decomposition import PCA

    plt = _pyplot()
    figure, axes = plt.subplots(1, len(embeddings), figsize=(4 * len(embeddings), 4.6), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for axis, (name, values) in zip(axes, embeddings.items(), strict=True):
        pca = PCA(2, random_state=0)
        points = pca.fit_transform(values.numpy())
        for rank, count in enumerate(counts.tolist()):
            x, y = points[(labels == rank).numpy()].T
            few = {"marker": "X", "s": 45, "edgecolors": "black", "linewidths": 0.7, "zorder": 3}
            often = {"marker": "o", "s": 12, "alpha": 0.6, "linewidths": 0}
            style = few if count < FEW_BELOW else often
            axis.scatter(x, y, color=colors[rank], label=f"{count}", **style)
        axis.set_title(
            f"{name}\ntwo principal components, {pca.explained_variance_ratio_.sum():.0%} of the variance", fontsize=10
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_aspect("equal", "datalim")
    handles, names = axes[0].get_legend_handles_labels()
    title = "test images of one seed; numbers of training images of their classes"
    figure.legend(handles, names, title=title, loc="outside lower center", ncols=CLASSES, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure_throughput(path: Path) -> None:
    """Fused loss, eager and torch.compile on the iNat18-like head, on the CPU: a table and a bar plot."""
    from .bench import runner
    from .bench.ops.margin_cross_entropy import OP as op

    case = op.cases["inat18-n512"]
    ours = "lt[native]" if runner.unavailable_reason(op.name, "lt[native]", "cpu") is None else "lt[reference]"
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
    from .bench import runner
    from .bench.ops.margin_cross_entropy import OP as op

    return runner.run(
        op.name,
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
