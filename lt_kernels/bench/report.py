"""Tables and figures from result files, for README.md and docs/benchmarks.md, and the check that they are current.

Text is written between ``<!-- bench:NAME begin -->`` and ``<!-- bench:NAME end -->``. How a figure tells what it
shows is described in ``figures``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .cases import Case
from .figures import Figure, draw, figures, stored_digest
from .records import Record, Target, by_direction, load, ours
from .runner import DIRECTIONS, DTYPES, OPS

RESULTS = Path("benchmarks/results")
FIGURES = Path("docs/figures")
NOT_ON_GPU = "Not yet measured on a GPU."
_PYTORCH = ("eager", "loop", "compile", "compile-max-autotune")
_DIRECTION_NAMES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}


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
    """Bring every table and figure up to date; return the files that changed or went.

    Raises:
        ValueError: a document lacks its markers, or a figure must be drawn and matplotlib is not installed.
    """
    texts, to_draw, unused = _stale(root)
    for figure in to_draw:
        draw(figure, root / FIGURES / figure.name)
    for path, text in texts.items():
        path.write_text(text)
    for path in unused:
        path.unlink()
    return [*texts, *(root / FIGURES / figure.name for figure in to_draw), *unused]


def check(root: Path) -> None:
    """Raise StaleReportError, naming the files, unless every table and figure shows the results."""
    texts, to_draw, unused = _stale(root)
    stale = [*texts, *(root / FIGURES / figure.name for figure in to_draw), *unused]
    if stale:
        names = ", ".join(path.relative_to(root).as_posix() for path in stale)
        raise StaleReportError(f"{names}: not made from {RESULTS}; run `lt-kernels bench report`")


def _stale(root: Path) -> tuple[dict[Path, str], list[Figure], list[Path]]:
    """(document -> its text as it should be, figures to draw, figures that nothing shows any more)."""
    records = [record for path in result_files(root) for record in load(path)]
    made = figures(records, _cases())
    texts = {}
    for path, blocks in _documents(root).items():
        text = path.read_text()
        updated = _with_blocks(text, blocks, records, path)
        if updated != text:
            texts[path] = updated
    to_draw = [figure for figure in made if stored_digest(root / FIGURES / figure.name) != figure.digest]
    names = {figure.name for figure in made}
    ours_there = [path for path in sorted((root / FIGURES).glob("*.png")) if stored_digest(path) is not None]
    return texts, to_draw, [path for path in ours_there if path.name not in names]


Block = Callable[[list[Record]], str]


def _documents(root: Path) -> dict[Path, dict[str, Block]]:
    return {
        root / "README.md": {"summary": lambda records: summary(records, image_folder=FIGURES)},
        root / "docs/benchmarks.md": {
            "summary": summary,
            "targets": targets,
            "figures": lambda records: images(records, FIGURES.relative_to("docs")),
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


def summary(records: list[Record], image_folder: Path | None = None) -> str:
    """One table, forward and backward on the headline cases, and the throughput figure of one device, a GPU's first."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    groups = [
        group
        for group in by_direction(record for record in records if record.direction == "fwd_bwd")
        if _is_headline(next(iter(group.values()))) and ours(group) is not None
    ]
    groups.sort(key=lambda group: next(iter(group.values())).kind == "cpu")
    with_peers = any(_fastest(group, _peers(group)) for group in groups)
    rows = []
    for group in groups:
        first, mine = next(iter(group.values())), ours(group)
        assert mine is not None
        compiled = _fastest(group, ("compile", "compile-max-autotune"))
        peer = _fastest(group, _peers(group))
        rows.append(
            (
                first.device,
                _shape(first),
                first.dtype,
                _ms(group.get("eager")),
                _ms(compiled),
                *([f"{_ms(peer)} ({peer.provider})" if peer else ""] if with_peers else []),
                f"**{_ms(mine)}** ({mine.backend})",
                _ratio(group.get("eager"), mine),
                _ratio(compiled, mine),
                f"{mine.fraction_of_floor:.0%}",
            )
        )
    head = ("device", "logits", "dtype", "eager", "torch.compile", *(["fastest peer"] if with_peers else []))
    parts = [_table((*head, "lt_kernels", "vs eager", "vs compile", "of copy bandwidth"), rows)]
    parts.append("Milliseconds for forward and backward, medians; all providers measured in turns in one run.")
    made = sorted(figures(records, _cases()), key=lambda figure: figure.name.startswith("cpu-"))
    throughput = [figure for figure in made if figure.name.endswith("-throughput.png")]
    if image_folder is not None and throughput:
        parts.insert(0, _image(throughput[0], image_folder))
    if not any(record.kind == "cuda" for record in records):
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
    for group in by_direction(record for record in records if record.direction == "fwd_bwd"):
        first, mine = next(iter(group.values())), ours(group)
        same = (first.case, first.dtype) == (target.case, target.dtype)
        if not same or first.kind != target.device or mine is None:
            continue
        if not floor and target.against not in group:
            continue
        value = mine.fraction_of_floor if floor else group[target.against].ms_median / mine.ms_median
        shown = f"{value:.0%}" if floor else f"{value:.2f}x"
        met = "yes" if value >= target.at_least else "no"
        rows.append((first.device, target.case, target.dtype, against, goal, shown, met))
    kind = "GPU" if target.device == "cuda" else "CPU"
    return rows or [(kind, target.case, target.dtype, against, goal, "not yet measured", "")]


def images(records: list[Record], folder: Path) -> str:
    """Every figure."""
    made = figures(records, _cases())
    return "\n\n".join(_image(figure, folder) for figure in made) or "Not yet measured. " + NOT_ON_GPU


def tables(records: list[Record]) -> str:
    """Everything that was measured: per device times of each direction and dtype, then memory."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = []
    for device in dict.fromkeys(record.device for record in records):
        found = [record for record in records if record.device == device]
        parts.append(f"### {device}")
        for direction in sorted(DIRECTIONS, key="fwd_bwd fwd bwd".split().index):
            for dtype in DTYPES:
                some = [record for record in found if (record.direction, record.dtype) == (direction, dtype)]
                if some:
                    parts.append(f"#### {_DIRECTION_NAMES[direction].capitalize()}, {dtype}: milliseconds")
                    parts.append(_times(some))
        for dtype in DTYPES:
            some = [record for record in found if (record.direction, record.dtype) == ("fwd_bwd", dtype)]
            if any(record.peak_bytes is not None for record in some):
                parts.append(f"#### Peak memory, forward and backward, {dtype}: multiples of the logits' bytes")
                parts.append(_memory(some))
        made_with = sorted({_provenance(record) for record in found})
        parts.append("Measured with " + "; ".join(made_with) + ".")
    if not any(record.kind == "cuda" for record in records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def _times(records: list[Record]) -> str:
    """Cases by providers. A backward pass alone has no ratios: some providers make the gradient in the forward pass."""
    providers = _providers(records)
    ratios = records[0].direction != "bwd"
    static = any(record.static_floor_ms is not None for record in records)
    rows = []
    for group in _by_size(records):
        first, mine = next(iter(group.values())), ours(group)
        others = _fastest(group, [name for name in group if not name.startswith("lt[")])
        rows.append(
            (
                first.case,
                _shape(first),
                *(f"**{_ms(group[name])}**" if group.get(name) is mine else _ms(group.get(name)) for name in providers),
                *([_ratio(group.get("eager"), mine), _ratio(others, mine)] if ratios else []),
                *([f"{mine.fraction_of_floor:.0%}" if mine else ""] if ratios else []),
                *([f"{first.static_floor_ms:.3g}" if first.static_floor_ms is not None else ""] if static else []),
            )
        )
    head = ["case", "logits", *providers, *(["vs eager", "vs fastest other", "of copy"] if ratios else [])]
    return _table((*head, *(["static floor"] if static else [])), rows)


def _memory(records: list[Record]) -> str:
    providers = _providers(records)
    rows = []
    for group in _by_size(records):
        first = next(iter(group.values()))
        logits = first.bytes_moved / 2  # of fwd_bwd: the logits and their gradient
        peaks = [group[name].peak_bytes if name in group else None for name in providers]
        rows.append((first.case, _shape(first), *("" if peak is None else f"{peak / logits:.2f}" for peak in peaks)))
    return _table(("case", "logits", *providers), rows)


def _cases() -> dict[str, Case]:
    return {name: case for module in OPS.values() for name, case in module.CASES.items()}


def _is_headline(record: Record) -> bool:
    case = OPS[record.op].CASES.get(record.case)
    return case is not None and record.kind in case.headline and record.dtype != "float16"


def _by_size(records: list[Record]) -> list[dict[str, Record]]:
    def size(group: dict[str, Record]) -> tuple[bool, int, int]:
        sizes = next(iter(group.values())).sizes
        return len(sizes) > 2, sizes["C"], sizes["N"]

    return sorted(by_direction(records), key=size)


def _providers(records: list[Record]) -> list[str]:
    """Ours last."""
    names = dict.fromkeys(record.provider for record in records)
    return sorted(names, key=lambda name: name.startswith("lt["))


def _peers(group: dict[str, Record]) -> list[str]:
    return [name for name in group if name not in _PYTORCH and not name.startswith("lt[")]


def _fastest(group: dict[str, Record], names: Sequence[str]) -> Record | None:
    return min((group[name] for name in names if name in group), key=lambda record: record.ms_median, default=None)


def _shape(record: Record) -> str:
    return " x ".join(f"{size:,}" for size in record.sizes.values())


def _ms(record: Record | None) -> str:
    return "" if record is None else f"{record.ms_median:.3g}"


def _ratio(other: Record | None, mine: Record | None) -> str:
    return "" if other is None or mine is None else f"{other.ms_median / mine.ms_median:.1f}x"


def _image(figure: Figure, folder: Path) -> str:
    return f"![{figure.title.replace(chr(10), ', ')}]({(folder / figure.name).as_posix()})"


def _provenance(record: Record) -> str:
    named = ", ".join(f"{name} {value}" for name, value in record.versions.items() if value)
    return f"{named} (revision {record.git or 'unknown'})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
