"""Tables and figures from result files, for README.md and docs/benchmarks.md, and the check that they are current.

Text is written between ``<!-- bench:NAME begin -->`` and ``<!-- bench:NAME end -->``; the figure carries the SHA-256 of
the results it was drawn from in its metadata.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from .records import Record, Target, load
from .runner import OPS

RESULTS = Path("benchmarks/results")
FIGURE = Path("docs/figures/throughput.png")
NOT_ON_GPU = "Not yet measured on a GPU."
_HASH_KEY = "Results-SHA256"


class StaleReportError(RuntimeError):
    """A generated table or figure does not show the committed results."""


def find_root(start: Path) -> Path:
    """The nearest folder at or above ``start`` that holds benchmarks/results.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / RESULTS).is_dir():
            return folder
    raise FileNotFoundError(f"no {RESULTS} at or above {start.resolve()}: run this in a checkout, or give --root")


def result_files(root: Path) -> list[Path]:
    """The result files of the ops we know, one folder per device (``aot`` holds the table of compiled kernels)."""
    found = sorted((root / RESULTS).glob("*/*.json"))
    return [path for path in found if path.stem in OPS and path.parent.name != "aot"]


def write(root: Path) -> list[Path]:
    """Bring every table and figure up to date; return the files that changed."""
    records = [record for path in result_files(root) for record in load(path)]
    changed = []
    for path, blocks in _documents(root).items():
        text = path.read_text()
        updated = _with_blocks(text, blocks, records, path)
        if updated != text:
            path.write_text(updated)
            changed.append(path)
    if records and _figure_hash(root / FIGURE) != _results_hash(root):
        draw(records, root / FIGURE, _results_hash(root))
        changed.append(root / FIGURE)
    return changed


def check(root: Path) -> None:
    """Raise StaleReportError, naming the files, unless every table and figure shows the results."""
    records = [record for path in result_files(root) for record in load(path)]
    stale = [
        str(path.relative_to(root))
        for path, blocks in _documents(root).items()
        if _with_blocks(path.read_text(), blocks, records, path) != path.read_text()
    ]
    if records and _figure_hash(root / FIGURE) != _results_hash(root):
        stale.append(str(FIGURE))
    if stale:
        raise StaleReportError(f"{', '.join(stale)}: not made from {RESULTS}; run `lt-kernels bench report`")


Block = Callable[[list[Record]], str]


def _documents(root: Path) -> dict[Path, dict[str, Block]]:
    return {
        root / "README.md": {"summary": lambda records: summary(records, image=FIGURE.as_posix())},
        root / "docs/benchmarks.md": {
            "summary": lambda records: summary(records, image=FIGURE.relative_to("docs").as_posix()),
            "targets": targets,
            "tables": tables,
        },
    }


def _with_blocks(text: str, blocks: dict[str, Block], records: list[Record], path: Path) -> str:
    for name, block in blocks.items():
        begin, end = f"<!-- bench:{name} begin -->", f"<!-- bench:{name} end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{path}: expected one block {begin} ... {end}")
        body = f"{begin}\n\n{block(records)}\n\n{end}"
        text = pattern.sub(body.replace("\\", r"\\"), text)
    return text


def summary(records: list[Record], image: str) -> str:
    """The figure and one table: forward and backward on the headline cases, ours against eager and torch.compile."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = [f"![Useful bandwidth by provider, forward and backward]({image})"]
    rows = []
    for group in _groups(record for record in records if record.direction == "fwd_bwd"):
        first = next(iter(group.values()))
        ours = _ours(group)
        if ours is None or first.case not in OPS[first.op].HEADLINE_CASES:
            continue
        rows.append(
            (
                first.device,
                f"{first.sizes['N']:,} x {first.sizes['C']:,}",
                first.dtype,
                *(_ms(group.get(name)) for name in ("eager", "compile")),
                f"**{_ms(ours)}** ({ours.backend})",
                *(f"{_ratio(group, ours, name)}" for name in ("eager", "compile")),
                f"{ours.fraction_of_floor:.0%}",
            )
        )
    head = ("device", "logits", "dtype", "eager", "torch.compile", "lt_kernels")
    parts.append(_table((*head, "vs eager", "vs compile", "of copy bandwidth"), rows))
    parts.append("Milliseconds for forward and backward, medians; all providers measured in turns in one run.")
    if not _has_gpu(records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def targets(records: list[Record]) -> str:
    """Each target of each op against what was measured."""
    rows = []
    for op, module in OPS.items():
        for target in module.TARGETS:
            rows += [(op, *row) for row in _target_rows(target, [record for record in records if record.op == op])]
    return _table(("op", "device", "case", "dtype", "ours against", "target", "measured", "met"), rows)


def _target_rows(target: Target, records: list[Record]) -> Sequence[tuple[str, ...]]:
    floor = target.against == "floor"
    against = "copy bandwidth" if floor else target.against
    goal = f"{target.at_least:.0%}" if floor else f"{target.at_least:g}x"
    rows: list[tuple[str, ...]] = []
    for group in _groups(record for record in records if record.direction == "fwd_bwd"):
        first, ours = next(iter(group.values())), _ours(group)
        same = (first.case, first.dtype) == (target.case, target.dtype)
        if not same or _is_gpu(first) != (target.device == "cuda") or ours is None:
            continue
        if not floor and target.against not in group:
            continue
        value = ours.fraction_of_floor if floor else group[target.against].ms_median / ours.ms_median
        shown = f"{value:.0%}" if floor else f"{value:.2f}x"
        met = "yes" if value >= target.at_least else "no"
        rows.append((first.device, target.case, target.dtype, against, goal, shown, met))
    kind = "GPU" if target.device == "cuda" else "CPU"
    return rows or [(kind, target.case, target.dtype, against, goal, "not yet measured", "")]


def tables(records: list[Record]) -> str:
    """Everything that was measured, one table per device and op."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = []
    for (device, op), some in groupby(records, key=lambda record: (record.device, record.op)):
        found = list(some)
        parts.append(f"### {op} on {device}")
        rows = []
        for group in _groups(found):
            for record in group.values():
                speedup = group["eager"].ms_median / record.ms_median if "eager" in group else None
                rows.append(
                    (
                        record.case,
                        record.dtype,
                        record.direction,
                        record.provider,
                        f"{_ms(record)} ({record.ms_p20:.3g} - {record.ms_p80:.3g})",
                        f"{record.gbps:.1f}",
                        f"{record.fraction_of_floor:.0%}",
                        "" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:.1f}",
                        "" if speedup is None else f"{speedup:.2f}x",
                    )
                )
        head = (
            "case",
            "dtype",
            "direction",
            "provider",
            "ms, median (p20 - p80)",
            "GB/s",
            "of copy",
            "peak MB",
            "vs eager",
        )
        parts.append(_table(head, rows))
        made_with = sorted({_provenance(record) for record in found})
        parts.append("Measured with " + "; ".join(made_with) + ".")
    if not _has_gpu(records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def draw(records: list[Record], path: Path, results_hash: str | None = None) -> None:
    """Bars of useful bandwidth by provider on the headline cases, one panel per device; a line marks a plain copy.

    A dotted line stands for a copy beyond the scale: of logits that stay in the cache.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in records if r.direction == "fwd_bwd" and r.case in OPS[r.op].HEADLINE_CASES]
    devices = sorted({record.device for record in shown})
    figure, axes = plt.subplots(len(devices) or 1, 1, figsize=(8, 3.6 * (len(devices) or 1)), squeeze=False)
    providers = [name for name in _provider_order(shown) if name != "lt[reference]"]
    for axis, device in zip(axes[:, 0], devices, strict=False):
        groups = _groups(record for record in shown if record.device == device)
        width = 0.8 / len(providers)
        for index, provider in enumerate(providers):
            at = [place for place, group in enumerate(groups) if provider in group]
            heights = [groups[place][provider].gbps for place in at]
            offset = (index - (len(providers) - 1) / 2) * width
            bars = axis.bar([place + offset for place in at], heights, width, label=provider)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        limit = 1.7 * max(record.gbps for group in groups for record in group.values())
        axis.set_ylim(0, limit)
        for place, group in enumerate(groups):
            copy = next(iter(group.values())).copy_gbps
            height, style = (copy, "--") if copy < limit else (0.97 * limit, ":")  # in the cache, far above
            axis.plot([place - 0.42, place + 0.42], [height, height], color="black", linestyle=style, linewidth=1)
            axis.text(place - 0.42, height, f"copy {copy:.0f}", fontsize=7, ha="left", va="top")
        firsts = [next(iter(group.values())) for group in groups]
        axis.set_xticks(range(len(groups)), [f"{r.sizes['N']:,} x {r.sizes['C']:,}\n{r.dtype}" for r in firsts])
        axis.set_ylabel("useful GB/s")
        axis.set_title(f"forward + backward on {device}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": "lt-kernels bench"} | ({_HASH_KEY: results_hash} if results_hash else {})
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)


def _groups(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Provider -> record, for each device, op, case, dtype and direction, in order of appearance."""
    groups: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        key = (record.device_slug, *record.group, record.direction)
        groups.setdefault(key, {})[record.provider] = record
    return list(groups.values())


def _ours(group: dict[str, Record]) -> Record | None:
    """The record of the backend that the library picks by itself."""
    first = next(iter(group.values()))
    preferred = ("lt[triton]", "lt[native]", "lt[reference]") if _is_gpu(first) else ("lt[native]", "lt[reference]")
    return next((group[name] for name in preferred if name in group), None)


def _is_gpu(record: Record) -> bool:
    return not record.device_slug.startswith("cpu-")


def _has_gpu(records: list[Record]) -> bool:
    return any(map(_is_gpu, records))


def _provider_order(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(record.provider for record in records))


def _ms(record: Record | None) -> str:
    return "" if record is None else f"{record.ms_median:.3g}"


def _ratio(group: dict[str, Record], ours: Record, name: str) -> str:
    return f"{group[name].ms_median / ours.ms_median:.1f}x" if name in group else ""


def _provenance(record: Record) -> str:
    named = ", ".join(f"{name} {value}" for name, value in record.versions.items() if value)
    return f"{named} (revision {record.git or 'unknown'})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _results_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in result_files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _figure_hash(path: Path) -> str | None:
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_HASH_KEY)
