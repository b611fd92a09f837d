"""Tables and figures from result files, for README.md and docs/benchmarks.md, and the check that they are current.

Text is written between ``<!-- bench:NAME begin -->`` and ``<!-- bench:NAME end -->``. How a figure tells what it
shows is described in ``figures``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .figures import Figure, draw, figures, stored_digest
from .records import COPY, Record, Target, by_direction, is_ours, load, ours
from .runner import DIRECTIONS, DTYPES, OPS

RESULTS = Path("benchmarks/results")
FIGURES = Path("docs/figures")
NOT_ON_GPU = "Not yet measured on a GPU."
_PYTORCH = ("eager", "eager-one-tensor", "loop", "published", "dense", "masked", "compile", "compile-max-autotune")
_FLOORS = ("copy", "gemms")
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
    made = figures(records)
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
    """A table per op of its headline cases, and the throughput figure of one device, a GPU's first."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = []
    for op in OPS:
        some = [record for record in records if record.op == op]
        if some:
            parts += [f"`{op}`, {_DIRECTION_NAMES[OPS[op].DIRECTIONS[-1]]}", _summary(some)]
    parts.append("Milliseconds, medians; all providers measured in turns in one run.")
    made = sorted(figures(records), key=lambda figure: figure.name.startswith("cpu-"))
    throughput = [figure for figure in made if figure.name.endswith("-throughput.png")]
    if image_folder is not None and throughput:
        parts.insert(0, _image(throughput[0], image_folder))
    if not any(record.kind == "cuda" for record in records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def _summary(records: list[Record]) -> str:
    """The table of one op."""
    module = OPS[records[0].op]
    baseline = module.REFERENCES[0]
    groups = [
        group
        for group in by_direction(record for record in records if record.direction == module.DIRECTIONS[-1])
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
                _ms(group.get(baseline)),
                _ms(compiled),
                *([f"{_ms(peer)} ({peer.provider})" if peer else ""] if with_peers else []),
                f"**{_ms(mine)}** ({mine.backend})",
                _ratio(group.get(baseline), mine),
                _ratio(compiled, mine),
                module.FLOOR.show(mine.fraction_of_floor),
            )
        )
    head = ("device", module.SHAPE, "dtype", baseline, "torch.compile", *(["fastest peer"] if with_peers else []))
    floor = "of copy bandwidth" if module.FLOOR is COPY else module.FLOOR.heading
    return _table((*head, "lt_kernels", f"vs {baseline}", "vs compile", floor), rows)


def targets(records: list[Record]) -> str:
    """Each target of each op against what was measured."""
    rows = []
    for op, module in OPS.items():
        for target in module.TARGETS:
            some = [record for record in records if (record.op, record.direction) == (op, module.DIRECTIONS[-1])]
            rows += [(op, *row) for row in _target_rows(target, some)]
    return _table(("op", "device", "case", "dtype", "what", "target", "measured", "met"), rows)


def _target_rows(target: Target, records: list[Record]) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in by_direction(records):
        first = next(iter(group.values()))
        if (first.case, first.dtype, first.kind) != (target.case, target.dtype, target.device):
            continue
        value = _target_value(target, group)
        if value is not None:
            met = "yes" if target.met(value) else "no"
            rows.append((first.device, *_target_cells(target), _target_number(target, value), met))
    kind = "GPU" if target.device == "cuda" else "CPU"
    return rows or [(kind, *_target_cells(target), "not yet measured", "")]


def _target_cells(target: Target) -> tuple[str, ...]:
    if target.at_most is None:
        shares = {"copy": "share of copy bandwidth", "static floor": "static floor / time"}
        what = shares.get(target.against, f"faster than {target.against}")
        bound = f">= {_target_number(target, target.at_least or 0.0)}"
    else:
        what = {"memory": "peak memory / logits"}.get(target.against, f"time / {target.against}")
        bound = f"<= {_target_number(target, target.at_most)}"
    return target.case, target.dtype, f"{target.ours}: {what}" if target.ours else what, bound


def _target_number(target: Target, value: float) -> str:
    if target.against in ("copy", "static floor"):
        return f"{value:.0%}"
    return f"{value:.2f}{'' if target.against == 'memory' else 'x'}"


def _target_value(target: Target, group: dict[str, Record]) -> float | None:
    """What ``Target`` says is compared; None where it was not measured."""
    mine = ours(group) if target.ours is None else group.get(target.ours)
    if mine is None:
        return None
    if target.against == "copy":
        return mine.fraction_of_floor
    if target.against == "static floor":
        return None if mine.static_floor_ms is None else mine.static_floor_ms / mine.ms_median
    if target.against == "memory":
        value: float | None = OPS[mine.op].memory(mine)
        return value
    other = _fastest(group, _others(group)) if target.against == "fastest other" else group.get(target.against)
    if other is None:
        return None
    return mine.ms_median / other.ms_median if target.at_most is not None else other.ms_median / mine.ms_median


def images(records: list[Record], folder: Path) -> str:
    """Every figure."""
    made = figures(records)
    return "\n\n".join(_image(figure, folder) for figure in made) or "Not yet measured. " + NOT_ON_GPU


def tables(records: list[Record]) -> str:
    """Everything that was measured: per device and op times of each direction and dtype, then memory."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = []
    for device in dict.fromkeys(record.device for record in records):
        parts.append(f"### {device}")
        for op in OPS:
            found = [record for record in records if (record.device, record.op) == (device, op)]
            if found:
                parts += [f"#### {op}", *_tables(found)]
    if not any(record.kind == "cuda" for record in records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def _tables(records: list[Record]) -> list[str]:
    """Those of one device and op."""
    parts = []
    for direction in sorted(DIRECTIONS, key="fwd_bwd fwd bwd".split().index):
        for dtype in DTYPES:
            some = [record for record in records if (record.direction, record.dtype) == (direction, dtype)]
            if some:
                parts.append(f"##### {_DIRECTION_NAMES[direction].capitalize()}, {dtype}: milliseconds")
                parts.append(_times(some))
    for dtype in DTYPES:
        module = OPS[records[0].op]
        direction = module.DIRECTIONS[-1]
        some = [record for record in records if (record.direction, record.dtype) == (direction, dtype)]
        if any(record.peak_bytes is not None for record in some):
            what = f"{module.MEMORY}, {_DIRECTION_NAMES[direction]}"
            parts.append(f"##### {what}, {dtype}: multiples of the logits' bytes")
            parts.append(_memory(some))
    made_with = sorted({_provenance(record) for record in records})
    return [*parts, "Measured with " + "; ".join(made_with) + "."]


def _times(records: list[Record]) -> str:
    """Cases by providers. A backward pass alone has no ratios: some providers make the gradient in the forward pass."""
    module, providers = OPS[records[0].op], _providers(records)
    baseline = module.REFERENCES[0]
    ratios = records[0].direction != "bwd"
    static = any(record.static_floor_ms is not None for record in records)
    rows = []
    for group in _by_size(records):
        first, mine = next(iter(group.values())), ours(group)
        others = _fastest(group, _others(group))
        rows.append(
            (
                first.case,
                _shape(first),
                *(f"**{_ms(group[name])}**" if group.get(name) is mine else _ms(group.get(name)) for name in providers),
                *([_ratio(group.get(baseline), mine), _ratio(others, mine)] if ratios else []),
                *([module.FLOOR.show(mine.fraction_of_floor) if mine else ""] if ratios else []),
                *([f"{first.static_floor_ms:.3g}" if first.static_floor_ms is not None else ""] if static else []),
            )
        )
    head = ["case", module.SHAPE, *providers]
    head += [f"vs {baseline}", "vs fastest other", module.FLOOR.heading] if ratios else []
    return _table((*head, *(["static floor"] if static else [])), rows)


def _memory(records: list[Record]) -> str:
    module = OPS[records[0].op]
    providers = [name for name in _providers(records) if name not in _FLOORS]
    rows = []
    for group in _by_size(records):
        first = next(iter(group.values()))
        values = [module.memory(group[name]) if name in group else None for name in providers]
        rows.append((first.case, _shape(first), *("" if value is None else f"{value:.2f}" for value in values)))
    return _table(("case", module.SHAPE, *providers), rows)


def _is_headline(record: Record) -> bool:
    case = OPS[record.op].CASES.get(record.case)
    return case is not None and record.kind in case.headline and record.dtype != "float16"


def _by_size(records: list[Record]) -> list[dict[str, Record]]:
    def size(group: dict[str, Record]) -> tuple[bool, list[int]]:
        sizes = next(iter(group.values())).sizes
        return not sizes.keys() <= set("ENDC"), [sizes.get(name, 0) for name in "CNDE"]

    return sorted(by_direction(records), key=size)


def _providers(records: list[Record]) -> list[str]:
    """Ours last."""
    names = dict.fromkeys(record.provider for record in records)
    return sorted(names, key=is_ours)


def _others(group: dict[str, Record]) -> list[str]:
    """What computes the loss and is not ours."""
    return [name for name in group if name not in _FLOORS and not is_ours(name)]


def _peers(group: dict[str, Record]) -> list[str]:
    return [name for name in _others(group) if name not in _PYTORCH]


def _fastest(group: dict[str, Record], names: Sequence[str]) -> Record | None:
    return min((group[name] for name in names if name in group), key=lambda record: record.ms_median, default=None)


def _shape(record: Record) -> str:
    return " x ".join(f"{size:,}" for size in record.sizes.values())


def _ms(record: Record | None) -> str:
    if record is None:
        return ""
    return f"{record.ms_median:.3g}" if record.ms_median < 999.5 else f"{record.ms_median:,.0f}"


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
