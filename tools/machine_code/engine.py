"""Compile the Triton kernels at every shipped configuration, without a GPU, and hold the machine code to its limits.

    python -m tools.machine_code --check        compile what is due, assert, and compare with the committed tables
    python -m tools.machine_code --check --all  compile every row
    python -m tools.machine_code --write        compile new and changed rows; rewrite the tables and docs/kernels.md
    python -m tools.machine_code --no-table     compile and assert only: for another Triton than the tables' own

The configurations are data, in ``lt_kernels/ops/<op>/configs.py``. Each is turned into launches by the operator's own
launchers: they are called with tensors on the meta device while a recorder replaces every kernel. Triton's own binder
specialises the recorded arguments. Targets: sm_80, sm_90, sm_100, gfx942.

``--check`` compiles the rows whose seal does not fit and a rotating twentieth of the others (see ``ledger.py``). Every
row is held to its limits, whether it was compiled or taken from the table. A row whose inputs changed and whose numbers
did not passes; ``--write`` then renews its seal.

"instructions per logit" is (SASS instructions on the longest path through the sm_90 kernel, predicated ones included,
NOPs excluded, a loop as often as it runs) * threads / logits. It is an upper bound of a program's cost, which includes
the rows' scalar arithmetic.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from . import calls, ledger, reading
from .recording import Launch, compile_launch, record

VIEW = ledger.ROOT / "docs/kernels.md"
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS_PER_BLOCK = 65536
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: What a row records of a launch, and of the machine code: once, or for every GPU if launches depend on it.
_CONSTANTS = ("BODY", "GROUP", "LANES", "REPEAT", "BLOCK", "BLOCK_C", "BLOCK_K")
_SIZES = ("BLOCK_N", "BLOCK_C", "BLOCK", "ROWS", "GROUP", "LANES")
_SHORT = ("registers", "stack", "spills")
_FULL = (*_SHORT, "instructions", "loads", "stores", "shared")
#: Outputs as long as the logits: a kernel that is given one writes 16 bytes at a time.
_LONG_OUTPUTS = ("grad_ptr", "u_ptr", "log_probs_ptr", "grad_ptrs")
#: The kernel that passes a row's sums through the memory of its results, and the pointers through which it does.
_SHARING_KERNEL, _SHARING_POINTERS = "margin_cross_entropy_tiles_forward_kernel", ("loss_ptr", "lse_ptr")

Row = dict[str, Any]


class Key(NamedTuple):
    """What identifies a row."""

    op: str
    case: str
    kernel: str
    repeat: int  # a call may launch a kernel several times


@dataclass(frozen=True)
class Task:
    """One row to be: a kernel launch of a configuration, for every target."""

    key: Key
    config: Any
    launches: dict[str, Launch]

    @property
    def by_target(self) -> bool:
        return calls.OPS[self.key.op].by_target

    @property
    def arguments(self) -> dict[str, Any]:
        return self.launches["sm_90"].arguments

    @functools.cached_property
    def work(self) -> calls.Work | None:
        return calls.OPS[self.key.op].work(self.key.kernel, self.arguments)

    @functools.cached_property
    def inputs(self) -> str:
        """Everything that the row's numbers depend on."""
        launches = [launch.inputs(TARGETS[target]) for target, launch in self.launches.items()]
        held = ("shares memory",) if self.shares_memory else ()
        return repr((triton.__version__, _reader(), self.key, self.work, launches, *held))

    def seal(self, row: Row) -> str:
        return ledger.seal(self.inputs, {key: row[key] for key in row if key not in ("seal", "budget")})

    def compile(self, directory: Path) -> tuple[Row, list[str]]:
        """Return the row and its problems."""
        codes = {target: self._machine_code(target, directory) for target in self.launches}
        first = self.launches["sm_90"]
        row: Row = {"case": self.key.case, "kernel": self.key.kernel}
        if self.by_target:
            recorded = (*_SHORT, "shared", *(("products",) if calls.makes_products(self.arguments) else ()))
            for target, launch in self.launches.items():
                sizes = _picked(launch.arguments, _SIZES)
                row[target] = {**sizes, **launch.options, **_picked(codes[target], recorded)}
        else:
            row |= {**first.options, **_picked(self.arguments, _CONSTANTS)}
            row |= {target: _picked(code, _FULL) for target, code in codes.items()}
        if self.work is not None:
            code, work = codes["sm_90"], self.work
            instructions = code["in_loop" if work.one_trip else "instructions"]
            row["per_logit"] = round(instructions * 32 * first.options["num_warps"] / work.logits, 1)
            if self.by_target:
                row |= _picked(code, ("loads", "stores"))
        problems = self.problems(row)
        if not self.by_target:
            row |= {target: _picked(row[target], _SHORT) for target in row if target in TARGETS and target != "sm_90"}
        problems += [
            f"{self._name}: {target}: no barrier between loads and a store through {pointer}"
            for target, code in codes.items()
            for pointer in code.get("unguarded", ())
        ]
        return self.finished(row) | ({"seal": ""} if problems else {}), problems

    def finished(self, row: Row) -> Row:
        """Return the row with its limit and its seal."""
        row = {key: row[key] for key in row if key not in ("seal", "budget")}
        if (limit := self.config.limit(self.key.kernel)) is not None and "per_logit" in row:
            row["budget"] = limit
        return {**row, "seal": self.seal(row)}

    def _machine_code(self, target: str, directory: Path) -> dict[str, Any]:
        launch, gpu = self.launches[target], TARGETS[target]
        compiled = compile_launch(launch, gpu)
        if gpu.backend == "hip":
            return reading.read_amd(compiled)
        trips, one_trip = (self.work.trips, self.work.one_trip) if self.work else (1, False)
        code = reading.read_nvidia(compiled, target, directory, trips, one_trip and target == "sm_90")
        if self.shares_memory:
            pointers = {launch.pointer(name): name for name in _SHARING_POINTERS}
            code["unguarded"] = reading.find_unguarded_stores(compiled.asm["ptx"], pointers)
        return code

    @property
    def shares_memory(self) -> bool:
        return getattr(self.config, "shares_memory", False) and self.key.kernel == _SHARING_KERNEL

    @property
    def _name(self) -> str:
        return f"{self.key.case} {self.key.kernel}"

    def problems(self, row: Row) -> list[str]:
        """Return what the recorded machine code does that it must not."""
        found = []
        for target, launch in self.launches.items():
            code = row[target]
            if code["stack"] or code["spills"]:
                found.append(f"{target}: {code['stack']} bytes of stack, {code['spills']} spills")
            warps = launch.options["num_warps"]
            if target != "gfx942" and code["registers"] * warps * 32 > REGISTERS_PER_BLOCK:
                found.append(f"{target}: {code['registers']} registers x {warps} warps do not fit")
            if code.get("shared", 0) > SHARED_BYTES[target]:
                found.append(f"{target}: {code['shared']} bytes of shared memory, at most {SHARED_BYTES[target]}")
            if code.get("products") == 0 and self.config.dtype != "float32":
                found.append(f"{target}: no tensor-core instructions")
        moved = row if self.by_target else row["sm_90"]
        found += [f"no 16-byte {kind}: {moved[kind]}" for kind in self._wide() if "128" not in moved[kind]]
        limit = self.config.limit(self.key.kernel)
        if limit is not None and not row.get("per_logit", 0) <= limit:
            found.append(f"{row['per_logit']} instructions per logit, at most {limit}")
        return [f"{self._name}: {problem}" for problem in found]

    def _wide(self) -> tuple[str, ...]:
        """Return which accesses move 16 bytes at a time."""
        if self.work is None or not (self.work.wide and getattr(self.config, "wide", self.by_target)):
            return ()
        if self.by_target:
            return ("loads",) if self.key.kernel.endswith("_forward_kernel") else ("loads", "stores")
        writes = any(self.arguments.get(name) is not None for name in _LONG_OUTPUTS)
        return ("loads", "stores") if writes else ("loads",)


@functools.cache
def _reader() -> str:
    """Return a hash of the code that reads numbers from machine code."""
    return ledger.source_hash(Path(reading.__file__).read_text())


def _picked(facts: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: facts[name] for name in names if name in facts}


@functools.cache
def tasks() -> tuple[Task, ...]:
    """Return every row to be, in the order of the tables."""
    found = []
    for op, of in calls.OPS.items():
        seen: dict[tuple[str, str], int] = {}
        for config in of.configs:
            by_target = {
                target: _named(record(of.call, config, gpu))
                for target, gpu in (TARGETS.items() if of.by_target else [("sm_90", TARGETS["sm_90"])])
            }
            for place in by_target["sm_90"]:
                if not _compiled(config, place[0], by_target, place):
                    continue
                launches = {target: by_target.get(target, by_target["sm_90"])[place] for target in TARGETS}
                repeat = seen[config.title, place[0]] = seen.get((config.title, place[0]), -1) + 1
                found.append(Task(Key(op, config.title, place[0], repeat), config, launches))
    return tuple(found)


def _named(launches: list[Launch]) -> dict[tuple[str, int], Launch]:
    """Return the launches by the kernel's name and how often it was launched before."""
    named: dict[tuple[str, int], Launch] = {}
    for launch in launches:
        before = sum(name == launch.name for name, _ in named)
        named[launch.name, before] = launch
    return named


def _compiled(config: Any, kernel: str, by_target: dict[str, Any], place: tuple[str, int]) -> bool:
    """Return whether a row is wanted: a configuration may name its kernels, and every target must have the launch."""
    if not all(place in launches for launches in by_target.values()):
        return False  # nothing to merge where another GPU's tiles are not split
    if kernels := getattr(config, "kernels", ()):
        return kernel in kernels
    scalars = getattr(config, "scalars", True)
    return scalars or calls.makes_products(by_target["sm_90"][place].arguments)


def _compile_nth(index: int, directory: str) -> tuple[Row, list[str]]:
    """Compile in another process: a task cannot be sent there, its number can."""
    os.environ["TRITON_CACHE_DIR"] = directory
    return tasks()[index].compile(Path(directory))


def compile_rows(indices: list[int], jobs: int) -> dict[Key, tuple[Row, list[str]]]:
    """Compile some tasks."""
    if not indices:
        return {}
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(jobs) as pool:
        results = pool.map(_compile_nth, indices, [directory] * len(indices))
        return {tasks()[index].key: result for index, result in zip(indices, results, strict=True)}


def read_tables(folder: Path) -> dict[Key, Row]:
    """Return the committed rows that this Triton wrote."""
    rows = {}
    for op in calls.OPS:
        path = folder / f"{op}.json"
        table = json.loads(path.read_text()) if path.exists() else {"triton": None, "rows": []}
        seen: dict[tuple[str, str], int] = {}
        for row in table["rows"]:
            place = row["case"], row["kernel"]
            seen[place] = seen.get(place, -1) + 1
            rows[Key(op, *place, seen[place])] = row
    return rows


def written_with(folder: Path) -> set[str]:
    """Return the versions of Triton that wrote the committed tables."""
    paths = [folder / f"{op}.json" for op in calls.OPS]
    return {json.loads(path.read_text())["triton"] for path in paths if path.exists()}


def text(rows: list[Row]) -> str:
    """Write a table with one row a line, so that differences can be read."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n'


def differences(now: dict[Key, Row], committed: dict[Key, Row], only: str) -> list[str]:
    """Return how rows differ from the committed ones in more than their seals."""
    found = []
    for key in dict.fromkeys([*committed, *now]):
        if only not in key.case:
            continue
        before, after = ({**row, "seal": ""} if row else None for row in (committed.get(key), now.get(key)))
        if before != after:
            lines = ([json.dumps(row)] if row else [] for row in (before, after))
            found += list(difflib.unified_diff(*lines, f"committed {key.op}", "now", n=0, lineterm=""))
    return found


def _view_problems(rows: dict[Key, Row], folder: Path) -> list[str]:
    from . import view

    if folder != ledger.TABLES or not VIEW.exists() or VIEW.read_text() == view.page(by_op(rows)):
        return []
    return [f"{VIEW} does not show the committed tables: run with --write"]


def by_op(rows: dict[Key, Row]) -> dict[str, list[Row]]:
    """Return the rows of each operator in the order of its configurations."""
    ordered = [task.key for task in tasks() if task.key in rows]
    return {op: [rows[key] for key in ordered if key.op == op] for op in calls.OPS}


def check(now: dict[Key, Row], committed: dict[Key, Row], options: argparse.Namespace) -> list[str]:
    """Compare with the committed tables."""
    others = written_with(options.tables) - {triton.__version__}
    if others:
        print(f"tables not compared: written with Triton {', '.join(map(str, others))}, this is {triton.__version__}")
        return []
    found = differences(now, committed, options.only)
    if found:
        found.append("the machine code differs from the committed table: read the lines above, then run with --write")
    elif renewed := sum(row["seal"] != committed[key].get("seal") for key, row in now.items()):
        print(f"{renewed} rows have the committed numbers from changed inputs: --write renews their seals")
    return found + _view_problems(committed, options.tables)


def write(rows: dict[Key, Row], folder: Path) -> None:
    """Rewrite the tables, and docs/kernels.md from them."""
    folder.mkdir(parents=True, exist_ok=True)
    for op, of in by_op(rows).items():
        (folder / f"{op}.json").write_text(text(of))
    if folder == ledger.TABLES:
        from . import view

        VIEW.write_text(view.page(by_op(rows)))
    print(f"wrote {folder}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare with the committed tables")
    mode.add_argument("--write", action="store_true", help="rewrite the committed tables")
    mode.add_argument("--no-table", action="store_true", help="compile every row and assert only")
    parser.add_argument("--all", action="store_true", help="compile every row, whatever the tables say")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--turn", type=int, metavar="N", help=f"compile part N of {ledger.TURNS} in rotation")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compiler processes (default 2)")
    parser.add_argument("--tables", type=Path, default=ledger.TABLES, help="another folder than the committed one")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    committed = read_tables(options.tables)
    turn = None if options.write else ledger.current_turn() if options.turn is None else options.turn % ledger.TURNS
    chosen = {index: task for index, task in enumerate(tasks()) if options.only in task.key.case}
    if not chosen:
        print(f"machine code: nothing was checked (no case contains {options.only!r})")
        return 1
    seals = {
        task.key: committed[task.key].get("seal") == task.seal(committed[task.key])
        for task in chosen.values()
        if task.key in committed
    }
    every = options.all or options.no_table
    reasons = {index: ledger.reason(index, seals, task.key, turn, every) for index, task in chosen.items()}
    compiled = compile_rows([index for index, why in reasons.items() if why != ledger.TABLE], options.jobs)

    problems = [problem for _, of in compiled.values() for problem in of]
    rows = {key: row for key, (row, _) in compiled.items()}
    for task in chosen.values():
        if task.key not in rows:  # the table's numbers are held to today's limits
            rows[task.key] = task.finished(committed[task.key])
            problems += task.problems(committed[task.key])
    print(f"machine code: {len(chosen)} rows for {', '.join(TARGETS)} with Triton {triton.__version__}:")
    print(f"  {ledger.summary(reasons.values(), turn)}")
    for index, why in reasons.items():
        if why in (ledger.NEW, ledger.CHANGED):
            print(f"  {why}: {chosen[index].key.case}, {chosen[index].key.kernel}")
    if options.write:
        write({**read_tables(options.tables), **rows}, options.tables)
    elif options.check:
        problems += check(rows, committed, options)
    for problem in problems:
        print(f"FAILED  {problem}")
    return 1 if problems else 0
