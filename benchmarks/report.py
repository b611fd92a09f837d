"""Write the tables and figures of README.md and docs/benchmarks.md from the saved results.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    change nothing, fail if one is not up to date

Text is written between ``<!-- bench:NAME begin -->`` and ``<!-- bench:NAME end -->``. ``figures`` says how a figure
tells what it shows, ``provenance`` how a row tells where it comes from.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import provenance
from figures import Figure, draw, figures, stored_digest

from lt_kernels.bench.op import COPY, Target
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.records import RESULTS, Record, by_direction, find_root, first, is_ours, load, ours
from lt_kernels.cli import Parser, run_command

FIGURES = Path("docs/figures")
NOT_ON_GPU = "Not yet measured on a GPU."
_PYTORCH = ("eager", "eager-one-tensor", "loop", "published", "dense", "masked", "compile", "compile-max-autotune")
_EAGER = tuple(name for name in _PYTORCH if not name.startswith("compile"))
_FLOORS = ("copy", "gemms")
_DIRECTION_NAMES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}
Describe = Callable[[Record], str]  # the origin of a record, see provenance.Origins


class StaleReportError(RuntimeError):
    """A generated table or figure does not show the committed results."""


class _Stale(NamedTuple):
    """The differences between the saved results and what is published."""

    texts: dict[Path, str]  # file -> its text as it should be
    to_draw: list[Figure]
    unused: list[Path]  # figures that nothing shows any more

    def files(self, root: Path) -> list[Path]:
        return [*self.texts, *(root / FIGURES / figure.name for figure in self.to_draw), *self.unused]


def result_files(root: Path) -> list[Path]:
    """Return the result files of known ops, one folder per device (``aot`` holds the table of compiled kernels)."""
    found = sorted((root / RESULTS).glob("*/*.json"))
    return [path for path in found if path.stem in OPS and path.parent.name != "aot"]


def write(root: Path) -> list[Path]:
    """Bring every table and figure up to date; return the files that changed or went.

    Raises:
        ValueError: a document lacks its markers, or a figure must be drawn and matplotlib is not installed.
    """
    records = _load_all(root)
    revisions = provenance.complete(root, records)
    stale = _find_stale(root, records, revisions)
    if revisions != provenance.load(root):
        stale.texts[root / provenance.REVISIONS] = provenance.text_of(revisions)
    for figure in stale.to_draw:
        draw(figure, root / FIGURES / figure.name)
    for path, text in stale.texts.items():
        path.write_text(text)
    for path in stale.unused:
        path.unlink()
    return stale.files(root)


def check(root: Path) -> None:
    """Raise StaleReportError, naming the files, unless every table and figure shows the results; git is not asked."""
    stale = _find_stale(root, _load_all(root), provenance.load(root)).files(root)
    if stale:
        names = ", ".join(path.relative_to(root).as_posix() for path in stale)
        raise StaleReportError(f"{names}: not made from {RESULTS}; run `python benchmarks/report.py`")


def _load_all(root: Path) -> list[Record]:
    return [record for path in result_files(root) for record in load(path)]


def _find_stale(root: Path, records: list[Record], revisions: dict[str, provenance.Revision]) -> _Stale:
    describe = provenance.Origins(root, revisions).describe
    made = figures(records)
    texts = {}
    for path, blocks in _documents(root, describe).items():
        text = path.read_text()
        updated = _with_blocks(text, blocks, records, path)
        if updated != text:
            texts[path] = updated
    to_draw = [figure for figure in made if stored_digest(root / FIGURES / figure.name) != figure.digest]
    names = {figure.name for figure in made}
    ours_there = [path for path in sorted((root / FIGURES).glob("*.png")) if stored_digest(path) is not None]
    return _Stale(texts, to_draw, [path for path in ours_there if path.name not in names])


Block = Callable[[list[Record]], str]


def _documents(root: Path, describe: Describe) -> dict[Path, dict[str, Block]]:
    return {
        root / "README.md": {"summary": lambda records: summary(records, describe, image_folder=FIGURES)},
        root / "docs/benchmarks.md": {
            "summary": lambda records: summary(records, describe),
            "targets": lambda records: targets(records, describe),
            "figures": lambda records: images(records, FIGURES.relative_to("docs")),
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


def summary(records: list[Record], describe: Describe, image_folder: Path | None = None) -> str:
    """Make a table per op of its headline cases, and show the throughput figure of one device, preferably a GPU."""
    if not records:
        return "Not yet measured. " + NOT_ON_GPU
    parts = []
    for op in OPS:
        some = [record for record in records if record.op == op]
        if some:
            parts += [f"`{op}`, {_DIRECTION_NAMES[OPS[op].directions[-1]]}", _summary(some, describe)]
    parts.append(
        "Milliseconds, medians; all providers measured in turns in one run. Eager is the fastest form in eager PyTorch."
    )
    made = sorted(figures(records), key=lambda figure: figure.name.startswith("cpu-"))
    throughput = [figure for figure in made if figure.name.endswith("-throughput.png")]
    if image_folder is not None and throughput:
        parts.insert(0, _image(throughput[0], image_folder))
    if not any(record.kind == "cuda" for record in records):
        parts.append(NOT_ON_GPU)
    return "\n\n".join(parts)


def _summary(records: list[Record], describe: Describe) -> str:
    """Make the table of one op: ours against the fastest form in eager PyTorch, whichever that is in each row."""
    op = OPS[records[0].op]
    groups = [
        group
        for group in by_direction(record for record in records if record.direction == op.directions[-1])
        if _is_headline(first(group)) and ours(group) is not None
    ]
    groups.sort(key=lambda group: first(group).kind == "cpu")
    with_peers = any(_fastest(group, _peers(group)) for group in groups)
    rows = []
    for group in groups:
        mine = ours(group)
        assert mine is not None
        eager = _fastest(group, _EAGER)
        compiled = _fastest(group, ("compile", "compile-max-autotune"))
        peer = _fastest(group, _peers(group))
        rows.append(
            (
                mine.device,
                mine.shape,
                mine.dtype,
                _named(eager, plain="eager"),
                _ms(compiled),
                *([_named(peer)] if with_peers else []),
                f"**{_ms(mine)}** ({mine.backend})",
                _ratio(eager, mine),
                _ratio(compiled, mine),
                op.floor.show(mine.fraction_of_floor),
                describe(mine),
            )
        )
    head = ("device", op.shape, "dtype", "eager", "torch.compile", *(["fastest peer"] if with_peers else []))
    floor = "of copy bandwidth" if op.floor is COPY else op.floor.heading
    return _table((*head, "lt_kernels", "vs eager", "vs compile", floor, "measured"), rows)


def targets(records: list[Record], describe: Describe) -> str:
    """Make a table of each op's targets and their measured values."""
    rows = []
    for name, op in OPS.items():
        for target in op.targets:
            some = [record for record in records if (record.op, record.direction) == (name, op.directions[-1])]
            rows += [(name, *row) for row in _target_rows(target, some, describe)]
    return _table(("op", "device", "case", "dtype", "what", "target", "value", "met", "measured"), rows)


def _target_rows(target: Target, records: list[Record], describe: Describe) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in by_direction(records):
        some = first(group)
        if (some.case, some.dtype, some.kind, some.clock) != (target.case, target.dtype, target.device, "device"):
            continue
        value = _target_value(target, group)
        if value is not None:
            met = "yes" if target.met(value) else "no"
            mine = _judged(target, group)
            origin = describe(mine) if mine is not None else ""
            rows.append((some.device, *_target_cells(target), _target_number(target, value), met, origin))
    kind = "GPU" if target.device == "cuda" else "CPU"
    return rows or [(kind, *_target_cells(target), "not yet measured", "", "")]


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


def _judged(target: Target, group: dict[str, Record]) -> Record | None:
    return ours(group) if target.ours is None else group.get(target.ours)


def _target_value(target: Target, group: dict[str, Record]) -> float | None:
    """Return the number that ``Target`` bounds; None where it was not measured."""
    mine = _judged(target, group)
    if mine is None:
        return None
    if target.against == "copy":
        return mine.fraction_of_floor
    if target.against == "static floor":
        return None if mine.static_floor_ms is None else mine.static_floor_ms / mine.ms_median
    if target.against == "memory":
        return OPS[mine.op].memory(mine)
    other = _fastest(group, _others(group)) if target.against == "fastest other" else group.get(target.against)
    if other is None:
        return None
    return mine.ms_median / other.ms_median if target.at_most is not None else other.ms_median / mine.ms_median


def images(records: list[Record], folder: Path) -> str:
    """Show every figure."""
    made = figures(records)
    return "\n\n".join(_image(figure, folder) for figure in made) or "Not yet measured. " + NOT_ON_GPU


def _is_headline(record: Record) -> bool:
    case = OPS[record.op].cases.get(record.case)
    return case is not None and record.kind in case.headline and record.dtype != "float16"


def _others(group: dict[str, Record]) -> list[str]:
    """Return the names of those that compute the loss and are not ours."""
    return [name for name in group if name not in _FLOORS and not is_ours(name)]


def _peers(group: dict[str, Record]) -> list[str]:
    return [name for name in _others(group) if name not in _PYTORCH]


def _fastest(group: dict[str, Record], names: Sequence[str]) -> Record | None:
    return min((group[name] for name in names if name in group), key=lambda record: record.ms_median, default=None)


def _ms(record: Record | None) -> str:
    if record is None:
        return ""
    return f"{record.ms_median:.3g}" if record.ms_median < 999.5 else f"{record.ms_median:,.0f}"


def _named(record: Record | None, plain: str = "") -> str:
    """Format the time with the provider's name, unless that is ``plain``."""
    if record is None:
        return ""
    return _ms(record) if record.provider == plain else f"{_ms(record)} ({record.provider})"


def _ratio(other: Record | None, mine: Record | None) -> str:
    return "" if other is None or mine is None else f"{other.ms_median / mine.ms_median:.1f}x"


def _image(figure: Figure, folder: Path) -> str:
    return f"![{figure.title.replace(chr(10), ', ')}]({(folder / figure.name).as_posix()})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status: 1 if ``--check`` finds something stale."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is stale")
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="checkout with the saved results")
    return run_command("report", _main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    root = find_root(arguments.root)
    if arguments.check:
        try:
            check(root)
        except StaleReportError as error:
            print(f"report: {error}", file=sys.stderr)
            return 1
        print("tables and figures show the saved results")
        return 0
    changed = [f"{'wrote' if path.exists() else 'removed'} {path}" for path in write(root)]
    print("\n".join(changed) or "everything is up to date")
    if all(path.parent.name.startswith("cpu-") for path in result_files(root)):
        print(NOT_ON_GPU)
    return 0


if __name__ == "__main__":
    sys.exit(main())
