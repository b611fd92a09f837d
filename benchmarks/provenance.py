"""The origin of a result: its revision, date and versions, and whether its kernels or class counts have changed since.

``revisions.json`` keeps the date of each measured revision and fingerprints of its kernels. ``report.py`` asks git for
them once, when it publishes. Its ``--check`` reads files alone, so a clone without history and a copy without git say
the same. A Triton kernel's fingerprint is its machine code, case by case, in the ahead-of-time table of its op. A
native kernel's fingerprint is a digest of the C++ (on a GPU: CUDA) sources of its op and everything they include,
without comments, white space and ``#include`` lines. To change how fingerprints are made, delete the file and publish.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lt_kernels.bench.cases import DATA_SETS, counts_digest
from lt_kernels.bench.records import RESULTS, Record

REVISIONS = RESULTS / "revisions.json"
#: The op whose sources an op without its own folder in csrc runs.
_SOURCES_OF = {"linear_margin_cross_entropy": "margin_cross_entropy"}
Fingerprint = dict[str, str]  # part -> digest


class Tree(Protocol):
    """The files of a checkout, now or at a revision."""

    def read(self, path: str) -> str | None: ...

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below ``folder``."""
        ...


class WorkingTree(NamedTuple):
    root: Path

    def read(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text() if file.is_file() else None

    def files(self, folder: str) -> list[str]:
        found = (path for path in (self.root / folder).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.root).as_posix() for path in found)


class GitTree(NamedTuple):
    root: Path
    revision: str

    def git(self, *arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *arguments], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def date(self) -> str | None:
        """Return the day of the commit, ISO 8601; None if git does not know it."""
        shown = self.git("show", "--no-patch", "--format=%cs", f"{self.revision}^{{commit}}")
        return shown.strip() if shown else None

    def read(self, path: str) -> str | None:
        return self.git("show", f"{self.revision}:{path}")

    def files(self, folder: str) -> list[str]:
        return (self.git("ls-tree", "-r", "--name-only", self.revision, f"{folder}/") or "").splitlines()


class Kernels(NamedTuple):
    """The kernels behind a record of ours."""

    op: str
    kind: str  # cpu | cuda
    backend: str  # native | triton

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def of(cls, record: Record) -> Kernels | None:
        """None for other libraries, for strategies, whose backend is not recorded, and for the reference."""
        if record.backend not in ("native", "triton"):
            return None
        return cls(record.op, record.kind, record.backend)

    def fingerprint(self, tree: Tree) -> Fingerprint:
        """Return a digest for each part; empty if the tree has no such kernels."""
        return machine_code(tree, self.op) if self.backend == "triton" else sources(tree, self.op, self.kind)


def machine_code(tree: Tree, op: str) -> Fingerprint:
    """Return a digest of the machine code of each case, whatever its kernels are called."""
    text = tree.read(f"{RESULTS.as_posix()}/aot/{op}.json")
    found: dict[str, list[str]] = {}
    for row in json.loads(text)["rows"] if text else []:
        code = {target: facts for target, facts in row.items() if isinstance(facts, dict) and "registers" in facts}
        found.setdefault(row["case"], []).append(json.dumps(code, sort_keys=True))
    return {case: _digest(*sorted(codes)) for case, codes in sorted(found.items())}


def sources(tree: Tree, op: str, kind: str) -> Fingerprint:
    """Return one digest of an op's own sources and of everything in csrc that they include."""
    folder = f"csrc/{_SOURCES_OF.get(op, op)}"
    left = [path for path in tree.files(folder) if _is_cuda(path) == (kind == "cuda")]
    contents: dict[str, str] = {}
    while left:
        path = left.pop()
        text = None if path in contents else tree.read(path)
        if text is None:
            continue
        contents[path] = _code(text)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
            left += [posixpath.normpath(f"{base}/{name}") for base in (posixpath.dirname(path), "csrc")]
    return {"sources": _digest(*sorted(contents.values()))} if contents else {}


def _is_cuda(path: str) -> bool:
    return "cuda" in path.removeprefix("csrc/") or path.endswith((".cu", ".cuh"))


def _code(text: str) -> str:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*#\s*(include|pragma once).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\s+", "", text)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


class Revision(NamedTuple):
    """The facts about one revision that ``revisions.json`` keeps."""

    date: str | None
    kernels: dict[str, Fingerprint]


def load(root: Path) -> dict[str, Revision]:
    """Read the facts; none if there is no file."""
    path = root / REVISIONS
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {name: Revision(**facts) for name, facts in content.items()}


def complete(root: Path, records: Iterable[Record]) -> dict[str, Revision]:
    """Return the facts about all measured revisions: the known ones, and those that git knows.

    A dirty revision has the facts of the commit below its changes.
    """
    known = load(root)
    wanted: dict[str, set[Kernels]] = {}
    for record in records:
        kernels = Kernels.of(record)
        if record.git is not None and kernels is not None:
            wanted.setdefault(record.git, set()).add(kernels)
    found = {}
    for name, all_kernels in sorted(wanted.items()):
        tree = GitTree(root, name.removesuffix("-dirty"))
        before = known.get(name, Revision(None, {}))
        date = before.date or tree.date()
        if date is None:
            continue
        fingerprints = {}
        for kernels in sorted(all_kernels):
            fingerprint = before.kernels.get(str(kernels)) or kernels.fingerprint(tree)
            if fingerprint:
                fingerprints[str(kernels)] = fingerprint
        found[name] = Revision(date, fingerprints)
    return found


def text_of(revisions: dict[str, Revision]) -> str:
    """Write the facts as ``revisions.json`` has them."""
    return json.dumps({name: facts._asdict() for name, facts in revisions.items()}, indent=1) + "\n"


def counts_verdict(record: Record) -> str:
    """Say whether the class counts of a measurement have changed since; nothing where they have not."""
    name, _, digest = (record.class_counts or "").partition(" ")
    return f"other {name} counts then" if name in DATA_SETS.values() and digest != counts_digest(name) else ""


class Origins:
    """Describes the origin of a record in a table's cell."""

    def __init__(self, root: Path, revisions: dict[str, Revision]) -> None:
        self._revisions = revisions
        self._now = cache(lambda kernels: kernels.fingerprint(WorkingTree(root)))

    def describe(self, record: Record) -> str:
        """Return date, revision and versions, and whether the kernels or class counts have changed since.

        An old record has no date of its own; its revision's date is shown.
        """
        facts = self._revisions.get(record.git or "", Revision(None, {}))
        libraries = ("torch", "triton") if record.backend == "triton" else ("torch",)
        versions = [f"{name} {record.versions[name]}" for name in libraries if record.versions.get(name)]
        revision = f"revision {record.git or 'unknown'}"
        if record.date is None and facts.date is not None:
            revision += f" of {facts.date}"
        known = ", ".join([*([record.date] if record.date else []), revision, *versions])
        verdicts = [self._verdict(record, facts), counts_verdict(record)]
        return "; ".join([known, *filter(None, verdicts)])

    def _verdict(self, record: Record, facts: Revision) -> str:
        kernels = Kernels.of(record)
        if kernels is None:
            return ""
        then = facts.kernels.get(str(kernels))
        if not then:
            return "kernels not compared"
        now = self._now(kernels)
        if all(now.get(part) == digest for part, digest in then.items()):
            return ""
        return "kernels changed since" if kernels.backend == "triton" else "csrc changed since"
