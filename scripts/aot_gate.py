"""Compile every Triton kernel at every shipped configuration, without a GPU, and hold the machine code to its budget.

    python scripts/aot_gate.py --check    compile, assert, and compare with the committed table
    python scripts/aot_gate.py --write    compile, assert, and rewrite the table (JSON, and docs/kernels.md from it)

What is compiled is what the launchers launch: they are called with tensors on the meta device while the kernels'
launch is replaced by a recorder, and the recorded arguments are specialised by Triton's own rules (None and 1 become
constants, multiples of 16 are marked). Targets: sm_80, sm_90, sm_100, gfx942.

"instructions per logit" is (SASS instructions on the longest path through the sm_90 kernel, predicated ones included,
NOPs not) * threads / classes: an upper bound of what a row costs, its scalar arithmetic included. Only kernels without
a loop over the classes have one.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lt_kernels.ops.margin_cross_entropy import triton as kernels  # noqa: E402
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments  # noqa: E402

TABLE = ROOT / "benchmarks/results/aot/margin_cross_entropy.json"
VIEW = ROOT / "docs/kernels.md"
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_INSTRUCTIONS_PER_LOGIT = 20.0
REGISTERS_PER_BLOCK = 65536
SHARED_BYTES = 227 * 1024
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """What Triton's just-in-time compiler would build for these arguments."""
        signature, constants, attributes = {}, {}, {}
        exempt = set(self.kernel.do_not_specialize or ())
        for position, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            exact = name not in exempt and position not in exempt
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and exact):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if exact and value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this package's kernels instead of running them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, num_warps: int, **named: Any) -> None:
                arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **named}
                launches.append(Launch(self.kernel, arguments, {"num_warps": num_warps}))

            return launch

    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    originals = {name: getattr(kernels, name) for name in names}
    try:
        for name, kernel in originals.items():
            setattr(kernels, name, Recorder(kernel))
        yield launches
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


@dataclass
class Configuration:
    """A call of the backend: shape, dtype, options."""

    name: str
    classes: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # () : forward, else backward for these inputs
    with_grad: bool = True  # of a forward
    with_lse: bool = False  # of a backward: an upstream gradient of the log-sum-exp too
    padding: int = 0  # columns between rows; odd numbers leave the tensors' rows without a common alignment
    rows: int = 1024
    positions: int = 1
    transposed: bool = False
    wide: bool = False  # held to 16-byte loads and stores
    budget: bool = False  # held to the instruction budget

    def launches(self) -> list[Launch]:
        n, c, k = self.rows, self.classes, self.positions

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return meta(*shape, dtype=dtype) if name in self.options else None

        x = meta(n, c + self.padding, k, dtype=self.dtype)[:, :c]
        if self.transposed:
            x = meta(c, n, dtype=self.dtype).T[:, :, None]
        soft = "soft" in self.options
        a = Arguments(
            input=x,
            target=meta(n, c, k, dtype=self.dtype) if soft else meta(n, k, dtype=torch.int64),
            mixed_target=option("mixed", n, k, dtype=torch.int64),
            mix_lambda=option("mixed", n, k),
            weight=option("weight", c),
            class_bias=option("class_bias", c),
            class_scale=option("class_scale", c),
            class_margin=option("margin", c),
            learned_scale=option("learned_scale"),
            coefficient=meta(2 if "mixed" in self.options else 1),
            scale=64.0 if "angular" in self.options else 1.0,
            margin=0.0,
            angular="angular" in self.options,
            ignore_index=-100,
            label_smoothing=0.1 if "smoothing" in self.options else 0.0,
        )
        with recording() as launches:
            if self.needs:
                needs = [name in self.needs for name in kernels.DIFFERENTIABLE]
                kernels.backward(meta(), meta(n, k) if self.with_lse else None, meta(2, n, k), a, needs)
            else:
                kernels.forward(a, "prediction" in self.options, self.with_grad)
        return launches


_VS = ("class_bias", "class_scale")
_MANY = ("class_bias", "class_scale", "margin", "weight", "mixed", "smoothing", "learned_scale", "prediction")
_CLASS_VECTORS = ("input", "class_bias", "class_scale", "class_margin", "learned_scale")
_HALF, _SINGLE = torch.float16, torch.float32


def _configurations() -> list[Configuration]:
    one_pass = [
        *(Configuration("plain", c, wide=True, budget=c != 21841) for c in (1000, 8142, 8192, 21841, 32768)),
        *(Configuration("plain", c, _SINGLE, wide=True, budget=True) for c in (8142, 8192, 32768)),
        Configuration("plain", 8142, _HALF, wide=True, budget=True),
        *(Configuration("class_bias", c, options=_VS[:1], wide=True, budget=True) for c in (8142, 8192, 32768)),
        Configuration("class_bias", 8142, _SINGLE, _VS[:1], wide=True, budget=True),
        *(Configuration("class_bias, class_scale", c, options=_VS, wide=True) for c in (8142, 16384)),
        *(
            Configuration("class_bias, prediction", c, options=(*_VS[:1], "prediction"), wide=True)
            for c in (8142, 16384)
        ),
        Configuration("weight, smoothing", 8142, options=("class_bias", "weight", "smoothing"), wide=True),
        Configuration("weight, smoothing", 16384, options=("class_bias", "weight", "smoothing"), wide=True),
        Configuration("angular", 10000, _SINGLE, ("angular", "margin"), wide=True),
        Configuration("mixed", 8142, options=("class_bias", "mixed"), wide=True),
        Configuration("probabilities", 8142, options=("class_bias", "soft"), wide=True),
        Configuration("all", 8142, options=_MANY, wide=True),
        Configuration("all", 8142, _SINGLE, _MANY, wide=True),
    ]
    forward_only = [
        Configuration("no gradient, class_bias", 8142, options=_VS[:1], with_grad=False, budget=True),
        Configuration("no gradient, class_bias", 8142, _HALF, _VS[:1], with_grad=False, budget=True),
        Configuration("no gradient, class_bias", 100003, options=_VS[:1], with_grad=False),
        Configuration("rows without a common alignment, class_bias", 8142, options=_VS[:1], padding=1),
    ]
    looped = [
        Configuration("plain", 65536, wide=True),
        Configuration("plain", 65536, _SINGLE, wide=True),
        Configuration("class_bias", 100003, options=_VS[:1], wide=True),
        Configuration("probabilities", 65536, options=("soft", "weight", "smoothing"), wide=True),
        Configuration("all", 65536, options=_MANY, wide=True),
    ]
    backward = [
        Configuration("plain", 8142, needs=("input",), wide=True),
        Configuration("class_bias", 8142, _SINGLE, _VS[:1], ("input",), wide=True),
        Configuration("all", 65536, options=_MANY, needs=("input",), wide=True),
        Configuration("probabilities", 8142, options=("class_bias", "soft"), needs=("input",), wide=True),
        Configuration("class_bias, log-sum-exp", 8142, options=_VS[:1], needs=("input",), with_lse=True, wide=True),
        Configuration("rows without a common alignment", 8142, needs=("input",), padding=1),
        Configuration("class vectors", 8142, options=_MANY, needs=_CLASS_VECTORS),
        Configuration("probabilities", 8142, _SINGLE, ("soft", "weight"), ("input", "target")),
    ]
    tiles = [
        Configuration("segmentation", 150, rows=4, positions=512 * 512, wide=True),
        Configuration("segmentation, all", 150, _SINGLE, _MANY, rows=4, positions=512 * 512),
        Configuration("segmentation", 19, needs=("input",), rows=4, positions=512 * 512, wide=True),
        Configuration("segmentation, class vectors", 150, _HALF, _MANY, _CLASS_VECTORS, rows=4, positions=512 * 512),
        Configuration("transposed", 8142, options=_VS[:1], transposed=True, wide=True),
        Configuration("few classes", 10),
        Configuration("few classes", 100, _SINGLE, _VS[:1]),
    ]
    return [*one_pass, *forward_only, *looped, *backward, *tiles]


def _scale_launches() -> list[tuple[str, Launch]]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        with recording() as launches:
            kernels.scale_gradient_(
                torch.empty((1024, 8192), dtype=dtype, device="meta"), torch.empty((), device="meta")
            )
        found += [(f"scale {str(dtype).removeprefix('torch.')}", launch) for launch in launches]
    return found


def _longest_path(sass: str) -> tuple[int, bool]:
    """Instructions on the longest way through, each loop's body once, and whether there is a loop."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*;)", line):
            lines.append(instruction[1])
    cost = [0] * (len(lines) + 1)
    reachable_loop = False
    for i in reversed(range(len(lines))):
        predicate, opcode = re.match(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", lines[i]).groups()  # type: ignore[union-attr]
        target = re.search(r"\((\.L_\w+)\)", lines[i])
        following = cost[i + 1]
        if opcode.startswith(("EXIT", "RET")):
            following = following if predicate else 0
        elif opcode.startswith("CALL") and target:
            following += cost[labels[target[1]]]
        elif opcode.startswith("BRA") and target:
            there = labels[target[1]]
            conditional = bool(predicate) or lines[i].count(",") > 0
            reachable_loop |= there < i
            jump = cost[there] if there > i else 0
            following = max(following, jump) if conditional else jump
        cost[i] = following + (opcode != "NOP")
    return cost[0], reachable_loop


def _widths(sass: str, opcode: str) -> dict[str, int]:
    """Global accesses by width in bits."""
    counts: Counter[int] = Counter()
    for suffix in re.findall(rf"\b{opcode}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix)
        counts[int(width[1].strip("US")) if width else 32] += 1
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def _nvidia(compiled: Any, directory: Path) -> dict[str, Any]:
    binary = directory / f"{os.getpid()}.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        return subprocess.run(
            [_BIN / command[0], *command[1:], binary], check=True, capture_output=True, text=True
        ).stdout

    usage = tool("cuobjdump", "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    sass = tool("nvdisasm", "-c")
    instructions, loop = _longest_path(sass)
    if instructions < 10:
        raise RuntimeError(f"could not read the machine code: {instructions} instructions found")
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "instructions": instructions,
        "loop": loop,
        "loads": _widths(sass, "LDG"),
        "stores": _widths(sass, "STG"),
        "shared": compiled.metadata.shared,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers, not to memory
    }


def _problems(record: dict[str, Any], configuration: Configuration | None) -> list[str]:
    """What the machine code does that it must not."""
    found = []
    sm90 = record["sm_90"]
    for target in TARGETS:
        if record[target]["stack"] or record[target]["spills"]:
            found.append(f"{target}: {record[target]['stack']} bytes of stack, {record[target]['spills']} spills")
        if target != "gfx942" and record[target]["registers"] * record["num_warps"] * 32 > REGISTERS_PER_BLOCK:
            found.append(f"{target}: {record[target]['registers']} registers x {record['num_warps']} warps do not fit")
    if sm90["shared"] > SHARED_BYTES:
        found.append(f"{sm90['shared']} bytes of shared memory, at most {SHARED_BYTES}")
    if configuration is not None and configuration.wide and record["kernel"].startswith(("_rows", "_tiles")):
        for kind in ("loads", "stores"):
            if "128" not in sm90[kind]:
                found.append(f"no 16-byte {kind}: {sm90[kind]}")
    if configuration is not None and configuration.budget and not record["per_logit"] <= MAX_INSTRUCTIONS_PER_LOGIT:
        found.append(f"{record['per_logit']} instructions per logit, at most {MAX_INSTRUCTIONS_PER_LOGIT}")
    return found


def _compile(
    name: str, launch: Launch, configuration: Configuration | None, directory: str
) -> tuple[dict[str, Any], list[str]]:
    """Table row of one launch, and its problems."""
    os.environ["TRITON_CACHE_DIR"] = directory
    record: dict[str, Any] = {"case": name, "kernel": launch.kernel.__name__, **launch.options}
    constants = ("GROUP", "BLOCK", "BLOCK_C", "BLOCK_K", "ONE_TILE")
    record.update({key: launch.arguments[key] for key in constants if key in launch.arguments})
    for target, gpu in TARGETS.items():
        compiled = triton.compile(launch.source(), target=gpu, options=dict(launch.options))
        record[target] = _amd(compiled) if gpu.backend == "hip" else _nvidia(compiled, Path(directory))
    sm90 = record["sm_90"]
    if configuration is not None and record.get("ONE_TILE"):
        record["per_logit"] = round(sm90["instructions"] * 32 * launch.options["num_warps"] / configuration.classes, 1)
        if configuration.budget:
            record["budget"] = MAX_INSTRUCTIONS_PER_LOGIT
    for target in ("sm_80", "sm_100"):
        record[target] = {key: record[target][key] for key in ("registers", "stack", "spills")}
    return record, [f"{name} {record['kernel']}: {problem}" for problem in _problems(record, configuration)]


def _tasks(only: str) -> list[tuple[str, Launch, Configuration | None]]:
    tasks: list[tuple[str, Launch, Configuration | None]] = []
    for c in _configurations():
        direction = f"backward ({', '.join(c.needs)})" if c.needs else "forward" + " + gradient" * c.with_grad
        name = f"{c.name}, C {c.classes}, {str(c.dtype).removeprefix('torch.')}, {direction}"
        tasks += [(name, launch, c) for launch in c.launches()]
    tasks += [(name, launch, None) for name, launch in _scale_launches()]
    return [task for task in tasks if only in task[0]]


def _compile_nth(index: int, only: str, directory: str) -> tuple[dict[str, Any], list[str]]:
    """``_compile`` in another process: a task cannot be sent there, its number can."""
    return _compile(*_tasks(only)[index], directory)


def build(only: str = "", jobs: int = 1) -> tuple[list[dict[str, Any]], list[str]]:
    """Table rows and problems of every configuration whose name contains ``only``."""
    count = len(_tasks(only))
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(_compile_nth, range(count), [only] * count, [directory] * count))
    return [row for row, _ in results], [problem for _, problems in results for problem in problems]


def _view(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Machine code of the Triton kernels",
        "",
        "Written by `python scripts/aot_gate.py --write`, like `benchmarks/results/aot/margin_cross_entropy.json`.",
        f"Compiled ahead of time with Triton {table['triton']}, not run: no GPU is needed for it. Instructions per",
        "logit: SASS instructions on the longest path through the kernel x threads / classes (kernels without a loop",
        "over the classes). Loads and stores: how many of each width in bits. No kernel uses a stack or spills.",
        "",
        f"At most {MAX_INSTRUCTIONS_PER_LOGIT} instructions per logit are asserted for the rows that say so:",
        "cross-entropy and logit adjustment, where a row fills its block. The others are recorded, not held to it:",
        "they do more for each logit (class_scale and weights are loaded for every column, at alignments that depend",
        "on the row; prediction and probabilities add sums of their own), or pad (21,841 classes fill 32,768 lanes).",
        "",
        "| case | kernel | warps | registers sm_80 / 90 / 100 / gfx942 | per logit | loads | stores | shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        sm90 = row["sm_90"]
        registers = " / ".join(str(row[target]["registers"]) for target in ("sm_80", "sm_90", "sm_100", "gfx942"))
        loads, stores = (", ".join(f"{n}x{width}" for width, n in sm90[kind].items()) for kind in ("loads", "stores"))
        cells = [row["case"], row["kernel"].strip("_").removesuffix("_kernel"), row["num_warps"], registers]
        cells += [
            f"{row.get('per_logit', '-')}" + (f" (<= {row['budget']})" if "budget" in row else ""),
            loads,
            stores,
            sm90["shared"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _text(table: dict[str, Any]) -> str:
    """One row a line, so that differences can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    return f'{{"triton": {json.dumps(table["triton"])}, "rows": [\n{rows}\n]}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare with the committed table")
    mode.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument("--only", default="", metavar="TEXT", help="check only cases whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compiler processes (default 2)")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table than the committed one")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write takes no --only: the table is written whole")

    rows, problems = build(options.only, options.jobs)
    if not rows:
        print(f"aot gate: nothing was checked (no case contains {options.only!r})")
        return 1
    table = {"triton": triton.__version__, "rows": rows}
    print(f"aot gate: {len(rows)} kernels compiled for {', '.join(TARGETS)} with Triton {triton.__version__}")
    for problem in problems:
        print(f"FAILED  {problem}")
    if options.write:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(_text(table))
        if options.table == TABLE:
            VIEW.write_text(_view(table))
        print(f"wrote {options.table}")
    else:
        problems += _differences(table, options.table, options.only)
    return 1 if problems else 0


def _differences(table: dict[str, Any], path: Path, only: str) -> list[str]:
    """Print how the table differs from the committed one; nothing if that was written with another Triton."""
    if not path.exists():
        print(f"FAILED  no committed table at {path}: run with --write")
        return ["no table"]
    committed = json.loads(path.read_text())
    if committed["triton"] != table["triton"]:
        print(f"table not compared: it was written with Triton {committed['triton']}, this is {table['triton']}")
        return []
    committed["rows"] = [row for row in committed["rows"] if only in row["case"]]
    diff = list(
        difflib.unified_diff(*(_text(t).splitlines() for t in (committed, table)), "committed", "now", n=0, lineterm="")
    )
    if diff:
        print("\n".join(diff))
        print("FAILED  the machine code differs from the committed table: read the lines above, then run with --write")
    if not only and VIEW.exists() and path == TABLE and VIEW.read_text() != _view(committed):
        diff.append("view")
        print(f"FAILED  {VIEW} is not what the committed table says: run with --write")
    return diff


if __name__ == "__main__":
    sys.exit(main())
