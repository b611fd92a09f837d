"""Compile the CUDA C++ backend for every shipped GPU architecture, without a GPU, and hold its machine code to rules.

    python scripts/cuda_gate.py --check    compile, assert, and compare with the committed table
    python scripts/cuda_gate.py --write    compile, assert, and rewrite the table (JSON; docs/cuda_kernels.md from it)

Asserted: every kernel compiles for sm_80, sm_90 and sm_100 without a stack frame and without spills (what ptxas says);
on sm_90 the kernels of rows, experts and blocks of similarities read and write 16 bytes at a time, the wide panels 8;
the host's side compiles with the headers of the installed torch. Where nvcc is not installed nothing can be checked:
that is said, and no failure.

The table is compared only where nvcc is of the release that wrote it; the rules hold for any.
"""

from __future__ import annotations

import argparse
import difflib
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cuda_*.cu"))
HOST_SOURCES = [*sorted((ROOT / "csrc").glob("*/cuda.cpp")), ROOT / "csrc/library.cpp"]
TABLE = ROOT / "benchmarks/results/aot/cuda.json"
VIEW = ROOT / "docs/cuda_kernels.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor of sm_90
#: Kernels that must move that many bits at a time on sm_90: (kernel, loads, stores).
WIDTHS = (
    (r"rows_forward_kernel", "128", "128"),
    (r"rows_gradient_kernel", "128", "128"),
    (r"rows_statistics_kernel", "128", None),
    (r"scale_kernel", "128", "128"),
    (r"panels_kernel<(BFloat16|Half), 4, .*", "64", "64"),
    (r"panels_kernel<Float, 2, .*", "64", "64"),
    (r"expert_fusion_forward_kernel|divergence_forward_kernel", "128", None),
    (r"divergence_backward_kernel", "128", "128"),
    (r"partitioned_forward_kernel<\w+, true>", "128", None),
    (r"partitioned_backward_kernel<\w+, true, .*", "128", "128"),
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = shutil.which(str(Path(home) / "bin/nvcc")) if home else None
    return named or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one that Triton's package carries."""
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


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> kernel<its template arguments>."""
    plain = run("c++filt", *names).splitlines()
    short = (re.sub(r"ltk::cuda::\(anonymous namespace\)::|^void |\(.*?\)$", "", name) for name in plain)
    return dict(zip(names, (name.split("(")[0] for name in short), strict=True))


def compile_one(nvcc: str, source: Path, architecture: str, folder: Path) -> list[dict[str, Any]]:
    """Facts on every kernel of one source file."""
    output = str(folder / f"{source.parent.name}_{source.stem}_{architecture}.o")
    log = run(nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-c", str(source), "-o", output)
    found = re.findall(
        r"Compiling entry function '(\w+)' for '\w+'.*?\n.*?\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        log,
    )
    names = readable([name for name, *_ in found])
    sass = {}
    if architecture == "sm_90":
        parts = re.split(r"\n\s*Function : (\w+)\n", run(cuobjdump(), "--dump-sass", output))
        sass = dict(zip(parts[1::2], parts[2::2], strict=True))
    records = []
    for name, stack, stores, loads, registers in found:
        record = {
            "kernel": names[name],
            "architecture": architecture,
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
        if name in sass:
            record["loads"] = widths(sass[name], r"(?:LDG|LDGSTS)")
            record["stores"] = widths(sass[name], "STG")
        records.append(record)
    return records


def widths(sass: str, opcode: str) -> dict[str, int]:
    """How many instructions move how many bits of global memory."""
    found = Counter(
        next((width for width in ("128", "64", "U16", "U8") if f".{width}" in modifiers), "32").lstrip("U")
        for modifiers in re.findall(rf"\b{opcode}((?:\.\w+)+)", sass)
    )
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def problems(record: dict[str, Any]) -> list[str]:
    what = f"{record['kernel']} on {record['architecture']}"
    found = [f"{what}: {record[key]} bytes of {key}" for key in ("stack", "spills") if record[key]]
    for pattern, loads, stores in WIDTHS:
        if "loads" not in record or not re.fullmatch(f"(?:{pattern})(<.*)?", record["kernel"]):
            continue
        for direction, width in (("loads", loads), ("stores", stores)):
            if width is not None and not record[direction].get(width):
                found.append(f"{what}: no {width}-bit {direction}")
    return found


def compile_host(nvcc: str, folder: Path) -> None:
    """The files that g++ compiles, with the headers of the installed torch."""
    from torch.utils.cpp_extension import include_paths

    stand_in = folder / "include/c10/cuda/impl/cuda_cmake_macros.h"  # the one header that CPU builds of torch lack
    stand_in.parent.mkdir(parents=True)
    stand_in.touch()
    includes = [str(folder / "include"), str(ROOT / "csrc"), *include_paths()]
    toolkit = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", str(SOURCES[0])), re.MULTILINE)
    assert toolkit is not None
    includes += [str(Path(toolkit[1]) / "include")]
    includes += [run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))").strip()]
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        *(f"-isystem{i}" for i in includes),
    ]
    defines = ["-DTORCH_EXTENSION_NAME=_C", '-DLTK_CUDA_ARCHITECTURES="9.0"', '-DLTK_COMPILER=""', '-DLTK_FLAGS=""']
    for source in HOST_SOURCES:
        run(os.environ.get("CXX", "g++"), *flags, *defines, str(source))


def build(nvcc: str, only: str, jobs: int) -> list[dict[str, Any]]:
    tasks = [(s, a) for s in SOURCES for a in ARCHITECTURES if only in f"{s.parent.name}/{s.stem} {a}"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        compile_host(nvcc, Path(name))
        lists = list(pool.map(lambda task: compile_one(nvcc, *task, Path(name)), tasks))
    return [record for records in lists for record in records]


def text(release: str, records: list[dict[str, Any]]) -> str:
    lines = ",\n  ".join(
        json.dumps(record) for record in sorted(records, key=lambda r: (r["kernel"], r["architecture"]))
    )
    return f'{{"nvcc": "{release}", "rows": [\n  {lines}\n]}}\n'


def view(table: dict[str, Any]) -> str:
    kernels: dict[str, dict[str, Any]] = {}
    for record in table["rows"]:
        kernels.setdefault(record["kernel"], {})[record["architecture"]] = record
    lines = [
        "# Machine code of the CUDA C++ kernels",
        "",
        f"Written by `python scripts/cuda_gate.py --write`, like `{TABLE.relative_to(ROOT)}`.",
        f"Compiled with nvcc {table['nvcc']}, not run: no GPU is needed for it. Loads and stores: how many of global",
        "memory of each width in bits, on sm_90; class vectors are read by a branch for each alignment. No kernel uses",
        "a stack or spills. Template arguments: logits; of rows threads and groups of 16 bytes (0: in shared memory),",
        "of panels positions per thread and whether backward; whether class_scale, smoothing, probabilities and",
        "predictions are possible; of partitioned kernels whether rows are aligned to 16 bytes, and whether sums over",
        "rows are wanted. Kernels of experts copy tiles to shared memory, 16 bytes at a time where they can.",
        "",
        "| kernel | registers sm_80 / 90 / 100 | loads | stores |",
        "|---|---|---|---|",
    ]
    for kernel, by in kernels.items():
        registers = " / ".join(str(by[a]["registers"]) if a in by else "-" for a in ARCHITECTURES)
        moved = (", ".join(f"{n}x{w}" for w, n in by["sm_90"][d].items()) or "-" for d in ("loads", "stores"))
        lines.append(f"| `{kernel}` | {registers} | {' | '.join(moved)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="sources and architectures that contain it: 'half sm_90'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write goes without --only: the table is whole")
    nvcc = find_nvcc()
    if nvcc is None:
        print("SKIPPED: nvcc was not found (PATH, CUDA_HOME, /usr/local/cuda); the CUDA C++ kernels were not compiled")
        return 0
    release = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    assert release is not None
    records = build(nvcc, arguments.only, arguments.jobs)
    found = [problem for record in records for problem in problems(record)]
    if not records:
        found.append(f"nothing matches --only {arguments.only!r}")
    new = text(release[1], records)
    if arguments.write and not found:
        TABLE.write_text(new)
        VIEW.write_text(view(json.loads(new)))
    elif arguments.check and not arguments.only:
        old = TABLE.read_text()
        if json.loads(old)["nvcc"] == release[1]:
            found += list(difflib.unified_diff(old.splitlines(), new.splitlines(), str(TABLE), "now", n=0, lineterm=""))
        if VIEW.read_text() != view(json.loads(old)):
            found.append(f"{VIEW} does not show {TABLE}: run scripts/cuda_gate.py --write")
    print("\n".join(found), file=sys.stderr)
    print(f"{len(records)} kernels compiled by nvcc {release[1]}, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
