"""Facts read from the machine code of a compiled kernel."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

#: The tensor-core instructions of each GPU.
TENSOR_CORE = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b", "gfx942": r"\bv_mfma"}
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_FAR = 10**9


class Flow(NamedTuple):
    """The instructions of a kernel and where they lead."""

    lines: list[str]
    predicates: list[str | None]
    opcodes: list[str]
    targets: list[int | None]  # the instruction that a jump or call leads to

    @property
    def loops(self) -> list[tuple[int, int]]:
        """The first and last instruction of every loop."""
        jumps = [(target, i) for i, target in enumerate(self.targets) if self.opcodes[i].startswith("BRA")]
        return [(target, i) for target, i in jumps if target is not None and target < i]

    def falls_through(self, i: int) -> bool:
        """Return whether a jump may be passed by."""
        return self.predicates[i] is not None or self.lines[i].count(",") > 0


def parse(sass: str) -> Flow:
    """Read what nvdisasm prints."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*;)", line):
            lines.append(instruction[1])
    parts = [re.match(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line).groups() for line in lines]  # type: ignore[union-attr]
    named = [re.search(r"\((\.L_\w+)\)", line) for line in lines]
    targets = [labels[name[1]] if name else None for name in named]
    return Flow(lines, [predicate for predicate, _ in parts], [opcode for _, opcode in parts], targets)


def count_longest_path(flow: Flow, trips: int = 1) -> int:
    """Count the instructions on the longest path, with the body of each loop ``trips`` times."""

    def cost_from(first: int, last: int) -> int:
        """From one instruction to another or to any exit; a jump back or beyond ends the path."""
        cost = [0] * (len(flow.lines) + 1)
        for i in reversed(range(first, last + 1)):
            opcode, there, following = flow.opcodes[i], flow.targets[i], cost[i + 1]
            if opcode.startswith(("EXIT", "RET")):
                following = following if flow.predicates[i] else 0
            elif opcode.startswith("CALL") and there is not None:
                following += cost[there] if first <= there <= last else cost_from(there, len(flow.lines) - 1)
            elif opcode.startswith("BRA") and there is not None:
                jump = cost[there] if i < there <= last else 0
                following = max(following, jump) if flow.falls_through(i) else jump
            cost[i] = following + (opcode != "NOP")
        return cost[first]

    return cost_from(0, len(flow.lines) - 1) + (trips - 1) * sum(cost_from(*loop) for loop in flow.loops)


def count_loop(flow: Flow) -> int:
    """Count the instructions of the shortest trip round the first loop: tiles in which no column is looked up."""
    first, last = min(flow.loops, key=lambda loop: (loop[0], -loop[1]))
    cost = [_FAR] * (last + 1)
    for i in reversed(range(first, last + 1)):
        opcode, there, following = flow.opcodes[i], flow.targets[i], 0 if i == last else cost[i + 1]
        if opcode.startswith(("EXIT", "RET")):
            following = following if flow.predicates[i] else _FAR
        elif opcode.startswith("BRA") and there is not None and i < last:
            jump = cost[there] if i < there <= last else _FAR
            following = min(following, jump) if flow.falls_through(i) else jump
        cost[i] = following + (opcode != "NOP")
    return cost[first]


def count_widths(sass: str, opcode: str) -> dict[str, int]:
    """Count global accesses by width in bits."""
    counts: Counter[int] = Counter()
    for suffix in re.findall(rf"\b{opcode}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix)
        counts[int(width[1].strip("US")) if width else 32] += 1
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def find_unguarded_stores(ptx: str, parameters: dict[int, str]) -> list[str]:
    """Return the pointers through which a kernel loads and then stores with no barrier between.

    Read from PTX, whose registers are written once, so that an address leads back to its parameter; the assembler moves
    no access to memory over a barrier.
    """
    owner: dict[str, str] = {}  # of the registers that hold an address
    loaded: set[str] = set()
    unguarded, passed = [], False
    for line in ptx.splitlines():
        code = re.sub(r"^\s*(@!?%\w+\s+)?", "", line)
        registers = re.findall(r"%rd\d+", code)
        if parameter := re.match(r"ld\.param.*_param_(\d+)\]", code):
            if int(parameter[1]) in parameters:
                owner[registers[0]] = parameters[int(parameter[1])]
        elif re.match(r"(bar|barrier)(\.cta)?\.sync", code):
            passed, loaded = passed or bool(loaded), set()
        elif access := re.match(r"(ld|st)\.global.*?\[\s*(%rd\d+)", code):
            pointer = owner.get(access[2])
            if access[1] == "ld" and pointer is not None:
                loaded.add(pointer)
            elif access[1] == "st" and pointer in loaded and pointer not in unguarded:
                unguarded.append(pointer)
        elif source := next((owner[register] for register in registers[1:] if register in owner), None):
            owner[registers[0]] = source  # an address computed from another
    if not passed and not unguarded:
        raise RuntimeError(f"no load through {', '.join(parameters.values())} was found")
    return unguarded


def read_nvidia(compiled: Any, target: str, directory: Path, trips: int, one_trip: bool) -> dict[str, Any]:
    """Return the facts of a kernel compiled for one of NVIDIA's GPUs."""
    binary = directory / f"{os.getpid()}.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        arguments = [_BIN / command[0], *command[1:], binary]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

    usage = tool("cuobjdump", "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    sass = tool("nvdisasm", "-c")
    flow = parse(sass)
    if len(flow.lines) < 10:
        raise RuntimeError(f"could not read the machine code: {len(flow.lines)} instructions found")
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "instructions": count_longest_path(flow, trips),
        "loads": count_widths(sass, "LDG"),
        "stores": count_widths(sass, "STG"),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(TENSOR_CORE[target], sass)),
        "in_loop": count_loop(flow) if one_trip else 0,
    }


def read_amd(compiled: Any) -> dict[str, Any]:
    """Return the facts of a kernel compiled for AMD's GPU."""
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers, not to memory
        "shared": compiled.metadata.shared,
        "products": len(re.findall(TENSOR_CORE["gfx942"], code)),
    }
