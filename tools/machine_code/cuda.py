"""Compile the CUDA C++ backend for every shipped GPU architecture, without a GPU, and hold its machine code to rules.

    python -m tools.machine_code.cuda --check        compile what is due, assert, and compare with the committed table
    python -m tools.machine_code.cuda --check --all  compile every source file for every architecture
    python -m tools.machine_code.cuda --write        compile what is new or changed; rewrite the table and its document

Asserted: every kernel compiles for sm_80, sm_90 and sm_100 without a stack frame and without spills (as ptxas reports);
on sm_90 the kernels of rows, experts and blocks of similarities read and write 16 bytes at a time, the wide panels 8;
the host's side compiles with the headers of the installed torch. Without nvcc nothing can be checked: the gate says so
and does not fail.

The unit of a check is one source file and one architecture. ``ledger.py`` says which units a run compiles. The seal of
a unit covers the file with everything of ``csrc`` that it includes (comments do not count), the flags, the compiler
and the numbers of its kernels. The table is compared only if nvcc is of the release that wrote it; the rules hold for
any.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from . import ledger

ROOT = ledger.ROOT
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.rglob("*.cu"))
HOST_SOURCES = [*sorted(CSRC.rglob("cuda.cpp")), *sorted(CSRC.rglob("library.cpp"))]
TABLE = ledger.TABLES / "cuda.json"
VIEW = ROOT / "docs/cuda_kernels.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HOST = "host"  # the architecture of the files that g++ compiles
FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v", "-c")
HOST_FLAGS = (
    *("-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DTORCH_EXTENSION_NAME=_C"),
    *('-DLTK_CUDA_ARCHITECTURES="9.0"', '-DLTK_COMPILER=""', '-DLTK_FLAGS=""'),
)
#: Kernels that must move that many bits at a time on sm_90: (kernel, loads, stores).
WIDTHS = (
    (r"rows_forward_kernel", "128", "128"),
    (r"rows_gradient_kernel", "128", "128"),
    (r"rows_statistics_kernel", "128", None),
    (r"scale_kernel", "128", "128"),
    (r"panels_kernel<(BFloat16|Half), 4, .*", "64", "64"),
    (r"panels_kernel<Float, 2, .*", "64", "64"),
    (r"expert_fusion_kernel", "128", None),
    (r"divergence_forward_kernel", "128", None),
    (r"divergence_backward_kernel", "128", "128"),
    (r"partitioned_forward_kernel<\w+, true>", "128", None),
    (r"partitioned_backward_kernel<\w+, true, .*", "128", "128"),
)
_VIEW_HEAD = """
# Machine code of the CUDA C++ kernels

`python -m tools.machine_code.cuda --write` writes this page and `{table}`. The kernels are
compiled with nvcc {nvcc} and not run: this needs no GPU. Loads and stores of global memory are counted by width in
bits, on sm_90; class vectors are read by a branch for each alignment. No kernel uses a stack or spills.

`make cuda` holds every kernel to its rules. It compiles the source files that changed since the table was written, and
one in twenty of the others, as the [Triton kernels](kernels.md) explain.

Template arguments begin with the logits' type. Rows: threads and groups of 16 bytes (0: in shared memory). Panels:
positions per thread and whether backward. Both: whether class_scale, smoothing, probabilities and predictions are
possible. Partitioned kernels: whether rows are aligned to 16 bytes, and whether sums over rows are wanted. Kernels of
experts copy tiles to shared memory, 16 bytes at a time if the alignment allows it.

| kernel | registers sm_80 / 90 / 100 | loads | stores |
|---|---|---|---|
"""

Row = dict[str, Any]


class Unit(NamedTuple):
    """One compilation: a source file, by its path under csrc, for one architecture or for the host."""

    source: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.source.removesuffix('.cu')} {self.architecture}"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = shutil.which(str(Path(home) / "bin/nvcc")) if home else None
    return named or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str:
    """Return the disassembler of the toolkit, or the one that Triton's package carries."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return found


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


@functools.cache
def included(path: Path) -> frozenset[Path]:
    """Return a file and every file of csrc that it includes, whatever the conditions around an include are."""
    found = {path}
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        near = [folder / name for folder in (path.parent, CSRC) if (folder / name).exists()]
        if near:
            found |= included(near[0].resolve())
    return frozenset(found)


def code(path: Path) -> str:
    """Return the text of a C++ file without comments and layout."""
    token = r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")'
    text = re.sub(token, lambda match: match[1] or " ", path.read_text(), flags=re.DOTALL)
    return "\n".join(words for line in text.splitlines() if (words := " ".join(line.split())))


def inputs(unit: Unit, nvcc: str) -> str:
    """Return everything that a unit's machine code depends on."""
    files = sorted((str(path.relative_to(CSRC)), code(path)) for path in included(CSRC / unit.source))
    if unit.architecture == HOST:
        import torch

        return repr((files, HOST_FLAGS, torch.__version__, run(host_compiler(), "--version")))
    reader = [ledger.source_hash(inspect.getsource(function)) for function in (compile_unit, readable, widths)]
    return repr((files, FLAGS, unit.architecture, run(nvcc, "--version"), reader))


def readable(names: list[str]) -> dict[str, str]:
    """Return kernel<its template arguments> by mangled name."""
    plain = run("c++filt", *names).splitlines()
    short = (re.sub(r"ltk::cuda::\(anonymous namespace\)::|^void |\(.*?\)$", "", name) for name in plain)
    return dict(zip(names, (name.split("(")[0] for name in short), strict=True))


def widths(sass: str, opcode: str) -> dict[str, int]:
    """Count the instructions that move each number of bits of global memory."""
    found = Counter(
        next((width for width in ("128", "64", "U16", "U8") if f".{width}" in modifiers), "32").lstrip("U")
        for modifiers in re.findall(rf"\b{opcode}((?:\.\w+)+)", sass)
    )
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def compile_unit(nvcc: str, unit: Unit, folder: Path) -> list[Row]:
    """Return facts on every kernel of a unit."""
    output = str(folder / f"{unit.source.replace('/', '_')}_{unit.architecture}.o")
    log = run(nvcc, *FLAGS, f"-arch={unit.architecture}", str(CSRC / unit.source), "-o", output)
    found = re.findall(
        r"Compiling entry function '(\w+)' for '\w+'.*?\n.*?\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        log,
    )
    names = readable([name for name, *_ in found])
    sass = {}
    if unit.architecture == "sm_90":
        parts = re.split(r"\n\s*Function : (\w+)\n", run(cuobjdump(), "--dump-sass", output))
        sass = dict(zip(parts[1::2], parts[2::2], strict=True))
    rows = []
    for name, stack, stores, loads, registers in found:
        row: Row = {"kernel": names[name], "source": unit.source, "architecture": unit.architecture}
        row |= {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        if name in sass:
            row["loads"] = widths(sass[name], r"(?:LDG|LDGSTS)")
            row["stores"] = widths(sass[name], "STG")
        rows.append(row)
    return sorted(rows, key=order)


def order(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["architecture"], row["source"]


def covers(pattern: str, row: Row) -> bool:
    """Return whether a pattern of WIDTHS is meant for a kernel."""
    return re.fullmatch(f"(?:{pattern})(<.*)?", row["kernel"]) is not None


def problems(row: Row) -> list[str]:
    """Return what a kernel does that it must not."""
    what = f"{row['kernel']} on {row['architecture']}"
    found = [f"{what}: {row[key]} bytes of {key}" for key in ("stack", "spills") if row[key]]
    for pattern, loads, stores in WIDTHS:
        if "loads" not in row or not covers(pattern, row):
            continue
        for direction, width in (("loads", loads), ("stores", stores)):
            if width is not None and not row[direction].get(width):
                found.append(f"{what}: no {width}-bit {direction}")
    return found


def host_compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def host_includes(nvcc: str, folder: Path) -> list[str]:
    """Return the folders of headers that the host's files need."""
    from torch.utils.cpp_extension import include_paths

    stand_in = folder / "include/c10/cuda/impl/cuda_cmake_macros.h"  # the one header that CPU builds of torch lack
    stand_in.parent.mkdir(parents=True)
    stand_in.touch()
    toolkit = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", str(SOURCES[0])), re.MULTILINE)
    assert toolkit is not None
    python = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))").strip()
    return [str(folder / "include"), str(CSRC), *include_paths(), str(Path(toolkit[1]) / "include"), python]


def compile_host(nvcc: str, unit: Unit, folder: Path) -> list[Row]:
    """Compile a file of the host's side with the headers of the installed torch; it has no kernels."""
    includes = [f"-isystem{path}" for path in host_includes(nvcc, folder)]
    run(host_compiler(), *HOST_FLAGS, *includes, str(CSRC / unit.source))
    return []


def units() -> list[Unit]:
    """Return every unit."""
    device = [Unit(str(s.relative_to(CSRC)), a) for s in SOURCES for a in ARCHITECTURES]
    return [*device, *(Unit(str(s.relative_to(CSRC)), HOST) for s in HOST_SOURCES)]


def compile_units(nvcc: str, chosen: list[Unit], jobs: int) -> dict[Unit, list[Row]]:
    """Compile some units."""
    if not chosen:
        return {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        if any(unit.architecture == HOST for unit in chosen):
            host_includes(nvcc, folder)

        def compile_any(unit: Unit) -> list[Row]:
            return (compile_host if unit.architecture == HOST else compile_unit)(nvcc, unit, folder)

        return dict(zip(chosen, pool.map(compile_any, chosen), strict=True))


def read_table() -> dict[str, Any]:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None, "rows": []}
    return {"seals": {}, **table}


def rows_of(table: dict[str, Any], unit: Unit) -> list[Row]:
    """Return the recorded kernels of a unit."""
    return [row for row in table["rows"] if (row.get("source"), row["architecture"]) == unit]


def text(table: dict[str, Any]) -> str:
    """Write a table with one row a line, so that differences can be read."""
    rows = ",\n  ".join(json.dumps(row) for row in table["rows"])
    seals = ",\n  ".join(f"{json.dumps(unit)}: {json.dumps(seal)}" for unit, seal in table["seals"].items())
    return f'{{"nvcc": "{table["nvcc"]}", "seals": {{\n  {seals}\n}}, "rows": [\n  {rows}\n]}}\n'


def view(table: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    kernels: dict[str, dict[str, Row]] = {}
    for row in table["rows"]:
        kernels.setdefault(row["kernel"], {})[row["architecture"]] = row
    lines = []
    for kernel, by in kernels.items():
        registers = " / ".join(str(by[a]["registers"]) if a in by else "-" for a in ARCHITECTURES)
        moved = (", ".join(f"{n}x{w}" for w, n in by["sm_90"][d].items()) or "-" for d in ("loads", "stores"))
        lines.append(f"| `{kernel}` | {registers} | {' | '.join(moved)} |\n")
    return _VIEW_HEAD.lstrip().format(table=TABLE.relative_to(ROOT), nvcc=table["nvcc"]) + "".join(lines)


def differences(committed: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """Return how a table differs from the committed one in more than its seals, and whether the document shows it."""
    before, after = (text({**each, "seals": {}}).splitlines() for each in (committed, table))
    found = list(difflib.unified_diff(before, after, str(TABLE), "now", n=0, lineterm=""))
    if VIEW.read_text() != view(committed):
        found.append(f"{VIEW} does not show {TABLE}: run with --write")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument("--all", action="store_true", help="compile every unit, whatever the table says")
    parser.add_argument("--only", default="", metavar="TEXT", help="units that contain it: 'half sm_90'")
    parser.add_argument("--turn", type=int, metavar="N", help=f"compile part N of {ledger.TURNS} in rotation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    nvcc = find_nvcc()
    if nvcc is None:
        print("SKIPPED: nvcc was not found (PATH, CUDA_HOME, /usr/local/cuda); the CUDA C++ kernels were not compiled")
        return 0
    release = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    assert release is not None
    committed, every = read_table(), units()
    turn = None if arguments.write else ledger.current_turn() if arguments.turn is None else arguments.turn
    made_from = {unit: inputs(unit, nvcc) for unit in every}
    seals = {
        unit: committed["seals"][str(unit)] == ledger.seal(made_from[unit], rows_of(committed, unit))
        for unit in every
        if str(unit) in committed["seals"]
    }
    chosen = {index: unit for index, unit in enumerate(every) if arguments.only in str(unit)}
    reasons = {unit: ledger.reason(index, seals, unit, turn, arguments.all) for index, unit in chosen.items()}
    compiled = compile_units(nvcc, [unit for unit, why in reasons.items() if why != ledger.TABLE], arguments.jobs)

    by_unit = {unit: compiled[unit] if unit in compiled else rows_of(committed, unit) for unit in every}
    rows = sorted((row for of in by_unit.values() for row in of), key=order)
    found = [problem for row in rows for problem in problems(row)]
    if not chosen:
        found.append(f"nothing matches --only {arguments.only!r}")
    known = {unit: by_unit[unit] for unit in every if unit in compiled or seals.get(unit)}
    renewed = {str(unit): ledger.seal(made_from[unit], of) for unit, of in known.items()}
    table = {"nvcc": release[1], "seals": renewed, "rows": rows}
    print(f"machine code: {len(chosen)} compilations of CUDA C++ by nvcc {release[1]}:")
    print(f"  {ledger.summary(reasons.values(), turn)}")
    if arguments.write and not found:
        TABLE.write_text(text(table))
        VIEW.write_text(view(table))
    elif arguments.check and committed["nvcc"] == release[1]:
        found += differences(committed, table)
    print("\n".join(found), file=sys.stderr)
    print(f"{len(rows)} kernels, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
