"""Which rows of a committed table a run compiles, shared by the gates of Triton and of CUDA.

Each row (for CUDA: each source file and architecture) carries a seal, a hash over what its machine code is made from
and over the numbers recorded for it. A row whose seal fits was compiled from the same kernel, configuration and
compiler when it was written, and its numbers have not been edited since: a run may take it from the table. The
committed table is thus the record of the last verified revision. A seal can be forged on purpose, so every run also
compiles one twentieth of the other rows. The number of commits chooses it: twenty successive commits check every row.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "benchmarks/results/aot"
TURNS = 20
NEW, CHANGED, ROTATION, EVERY, TABLE = "new", "changed", "rotation", "asked for", "unchanged"


def seal(inputs: str, numbers: Any) -> str:
    """Return the hash of a row's inputs and recorded numbers."""
    return hashlib.sha256(f"{inputs}\n{json.dumps(numbers, sort_keys=True)}".encode()).hexdigest()[:16]


def code_text(tree: ast.AST) -> str:
    """Return Python code without comments and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def source_hash(source: str) -> str:
    """Return a hash of Python code; comments and docstrings do not count."""
    return hashlib.sha256(code_text(ast.parse(source)).encode()).hexdigest()


def current_turn(root: Path = ROOT) -> int:
    """Return which twentieth is due: the number of commits counts, or the day where the history is not at hand."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    whole = git("rev-parse", "--is-shallow-repository") == "false"
    commits = git("rev-list", "--count", "--first-parent", "HEAD") if whole else ""
    return (int(commits) if commits else int(time.time() // 86400)) % TURNS


def reason(index: int, seals: Mapping[Any, bool], key: Any, turn: int | None, every: bool) -> str:
    """Return why a row is compiled, or TABLE if it is taken from the table.

    ``seals`` says for every committed row whether its seal fits; ``turn`` None compiles no row in rotation.
    """
    if every:
        return EVERY
    if key not in seals:
        return NEW
    if not seals[key]:
        return CHANGED
    return ROTATION if turn is not None and index % TURNS == turn else TABLE


def summary(reasons: Iterable[str], turn: int | None) -> str:
    """Say how many rows were compiled and why, and how many were taken from the table."""
    counts = Counter(reasons)
    taken, total = counts.pop(TABLE, 0), sum(counts.values())
    names = {NEW: "not in the table", CHANGED: "changed since they were written", EVERY: "asked for"}
    names[ROTATION] = f"in rotation, part {turn} of {TURNS}"
    why = ", ".join(f"{counts[key]} {name}" for key, name in names.items() if counts[key])
    return f"{total} compiled{f' ({why})' if why else ''}; {taken} taken from the table, whose seals fit"
