"""Plots of records: their content is computed first, as plain data, and drawn by matplotlib afterwards.

A figure file carries the SHA-256 of that data and of the code that draws it. A stale figure is therefore noticed
without drawing it again, whatever matplotlib renders.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lt_kernels.bench.cases import Case
from lt_kernels.bench.op import COPY, DTYPES
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.records import Record, by_direction, first, is_ours, shape_of

_KEY = "Shown-SHA256"
_COLORS = {
    "copy": "black",
    "gemms": "black",
    "eager": "tab:gray",
    "loop": "tab:brown",
    "published": "tab:brown",
    "eager-one-tensor": "tab:purple",
    "compile": "tab:orange",
    "compile-max-autotune": "tab:olive",
    "lt[native]": "tab:blue",
    "lt[triton]": "tab:green",
    "lt[reference]": "tab:cyan",
    "liger": "tab:red",
    "flash-attn": "tab:purple",
    "quack": "tab:pink",
    "torch-linear-ce": "tab:brown",
    "torch-linear-ce-chunked": "tab:olive",
    "cut-cross-entropy": "tab:purple",
    "cut-cross-entropy-exact": "mediumpurple",
    "lt-materialize": "navy",
    "lt-chunked": "tab:cyan",
    "lt-tiled": "darkgreen",
    "lt-loop": "navy",
    "lt-module": "tab:cyan",
}


@dataclass(frozen=True)
class Panel:
    """One axis: lines over the same ticks."""

    title: str
    ticks: Sequence[str]
    lines: Mapping[str, Sequence[tuple[int, float]]]  # provider -> (index of the tick, height)


@dataclass(frozen=True)
class Figure:
    """Panels side by side, one per dtype."""

    name: str  # of the file
    title: str
    x_label: str
    y_label: str
    logarithmic: bool
    panels: Sequence[Panel]

    @property
    def digest(self) -> str:
        shown = json.dumps(asdict(self), sort_keys=True) + json.dumps(_COLORS) + inspect.getsource(draw)
        return hashlib.sha256(shown.encode()).hexdigest()


@dataclass(frozen=True)
class _Plot:
    name: str
    what: str
    y_label: str
    height: Callable[[Record], float | None]
    over_rows: bool = False  # with the classes of iNaturalist 2018; otherwise over the number of classes
    calls: bool = False  # small calls in float32, over rows; a panel for each number of classes instead of each dtype
    copy: bool = False
    logarithmic: bool = False


def _gbps(record: Record) -> float | None:
    return record.gbps


def _memory(record: Record) -> float | None:
    return OPS[record.op].memory(record)


def _share_of_copy(record: Record) -> float | None:
    return None if record.fraction_of_floor is None else 100 * record.fraction_of_floor


def _times_the_floor(record: Record) -> float | None:
    return None if record.fraction_of_floor is None else 1 / record.fraction_of_floor


def _microseconds(record: Record) -> float:
    return 1e3 * record.ms_median


_OF_LOGITS = "multiples of the logits' bytes"
_GBPS: dict[str, Any] = {"y_label": "useful GB/s", "height": _gbps, "copy": True, "logarithmic": True}
_TIMES: dict[str, Any] = {"y_label": "x of gemms", "height": _times_the_floor, "logarithmic": True}
_OVER_PRODUCTS = "time over that of the three matrix products alone"
_CALLS = _Plot(
    "calls",
    "time per call, the host's part included, float32",
    "microseconds",
    _microseconds,
    over_rows=True,
    calls=True,
    logarithmic=True,
)
_ROWS = (
    _Plot("throughput", "useful bandwidth (logits read once, gradient written once)", **_GBPS),
    _Plot("floor", "share of the bandwidth of a copy in the same run", "% of copy bandwidth", _share_of_copy),
    _Plot("memory", "peak memory of a step beyond its inputs", _OF_LOGITS, _memory),
    _Plot("rows", "useful bandwidth with the 8,142 classes of iNaturalist 2018", **_GBPS, over_rows=True),
    _CALLS,
)
_HEADS = (
    _Plot("floor", _OVER_PRODUCTS, **_TIMES),
    _Plot("memory", "peak memory of a step beside the gradients of features and weight", _OF_LOGITS, _memory),
    _Plot("rows", f"{_OVER_PRODUCTS}, 8,142 classes of iNaturalist 2018", **_TIMES, over_rows=True),
)
_AXES = {"E": "experts E", "N": "rows N", "D": "width D"}


def figures(records: Sequence[Record]) -> list[Figure]:
    """Compute for each device and op its ``plots``: speed and peak memory over C, speed and time per call over N."""
    made = []
    for slug, op in dict.fromkeys((record.device_slug, record.op) for record in records):
        spec = OPS[op]
        flat = [
            record
            for record in records
            if (record.device_slug, record.op, record.direction) == (slug, op, spec.directions[-1])
            and record.provider != "lt[reference]"
            and record.sizes.keys() <= set("ENDC")
        ]
        swept = [record for record in flat if record.kind in _case_of(record).sweep and record.clock == "device"]
        calls = [
            record
            for record in flat
            if record.kind in _case_of(record).calls and record.with_host and record.dtype == "float32"
        ]
        inat18 = [record for record in flat if record.sizes["C"] == 8142 and not _case_of(record).calls]
        what = "forward" if spec.directions[-1] == "fwd" else "forward + backward"
        plots = {plot.name: plot for plot in (_ROWS if spec.floor is COPY else _HEADS)}
        for plot in map(plots.__getitem__, spec.plots):
            shown = calls if plot.calls else inat18 if plot.over_rows else swept
            if shown:
                sizes = shown[0].sizes
                beside = " x ".join(_AXES[name] for name in "END" if name in sizes)
                made.append(
                    Figure(
                        name=f"{slug}-{op.replace('_', '-')}-{plot.name}.png",
                        title=f"{op}, {what}: {plot.what}\n{shown[0].device}",
                        x_label="rows N" if plot.over_rows else f"classes C ({beside})",
                        y_label=plot.y_label,
                        logarithmic=plot.logarithmic,
                        panels=_panels(shown, plot),
                    )
                )
    return made


def _case_of(record: Record) -> Case:
    """Return the case of a record; a nameless one that no plot shows, if there is none any more."""
    return OPS[record.op].cases.get(record.case, Case("", 0, 0, devices=()))


def _panels(records: Sequence[Record], plot: _Plot) -> list[Panel]:
    def number(record: Record) -> int:
        return record.sizes["C"] if plot.calls else DTYPES.index(record.dtype)

    panels = []
    for own in sorted(set(map(number, records))):
        groups = by_direction(record for record in records if number(record) == own)
        groups.sort(key=lambda group: [first(group).sizes.get(name, 0) for name in "CNDE"])
        ticks = [_tick(first(group).sizes, plot) for group in groups]
        lines: dict[str, list[tuple[int, float]]] = {}
        for place, group in enumerate(groups):
            for provider, record in group.items():
                value = plot.height(record)
                if value is not None:
                    lines.setdefault(provider, []).append((place, value))
            bandwidth = first(group).copy_gbps
            if plot.copy and bandwidth is not None:
                lines.setdefault("copy", []).append((place, bandwidth))
        panels.append(Panel(f"{own:,} classes" if plot.calls else DTYPES[own], ticks, lines))
    return panels


def _tick(sizes: Mapping[str, int], plot: _Plot) -> str:
    if plot.over_rows:
        return f"{sizes['N']:,}"
    return f"{sizes['C']:,} ({shape_of(sizes[name] for name in 'END' if name in sizes)})"


def draw(figure: Figure, path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            f"{path.name}: figures need matplotlib, which is not installed: pip install 'lt_kernels[bench]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = 1.5 + 4.2 * len(figure.panels)
    drawn, axes = plt.subplots(1, len(figure.panels), figsize=(width, 4.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], figure.panels, strict=True):
        for provider, points in panel.lines.items():
            ours, floor = is_ours(provider), provider in ("copy", "gemms")
            axis.plot(
                *zip(*points, strict=True),
                label=provider,
                color=_COLORS.get(provider),
                linestyle="--" if floor else "-",
                linewidth=3.5 if ours else 1.2,
                zorder=2 if ours else 3,  # thin lines stay visible where they coincide with ours
                marker=None if floor else "o",
                markersize=5 if ours else 3.5,
            )
        axis.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=45, ha="right", fontsize=7)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel(figure.x_label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if figure.logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel(figure.y_label, fontsize=9)
    legend = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawn.legend(legend.values(), legend.keys(), loc="center right", fontsize=8, frameon=False)
    drawn.suptitle(figure.title, fontsize=10)
    drawn.tight_layout(rect=(0, 0, 1 - 1.5 / width, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110, metadata={"Software": "lt-kernels bench", _KEY: figure.digest})
    plt.close(drawn)


def stored_digest(path: Path) -> str | None:
    """Return the digest in a file that ``draw`` wrote (an uncompressed text chunk); None for any other file."""
    if not path.exists():
        return None
    found = re.search(_KEY.encode() + rb"\0([0-9a-f]{64})", path.read_bytes())
    return found.group(1).decode() if found else None
