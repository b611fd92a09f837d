"""Record which tests a run collects, and compare two such records.

One test is one line: engine, file, function, and the words of its parameters' ids in alphabetical order. A case (a
dataclass) is recorded beside them with everything but its sizes: which options it has and what it differentiates.

    python tools/tested_set.py record before.json --engine cpu -- tests            appends what pytest collects
    python tools/tested_set.py compare before.json after.json renamed.json         exit status 1 if a test was lost

The file of renamed tests holds two lists: "renamed" of [pattern, replacement] and "gone" of [pattern, reason]. Patterns
are regular expressions, applied in order to the lines of the first record. ``tested_set_renamed.json`` leads from
revision c1eb8b1 to the suite with engines as of 3520e08.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

#: Fields of a case that say how large it is.
SIZES = ("id", "rows", "classes", "positions", "width", "keys", "experts", "spread")


def line(engine: str, file: str, function: str, ids: str) -> str:
    words = sorted(filter(None, re.split(r"[-\s]+", ids)))
    return f"{engine} | {file}::{function} | {' '.join(words)}"


def described(case: Any) -> str:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return repr({name: value for name, value in fields.items() if name not in SIZES})


class Recorder:
    """A pytest plugin that keeps the lines of everything collected."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.lines: list[str] = []
        self.cases: dict[str, str] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            file, _, name = item.nodeid.partition("::")
            function, _, ids = name.partition("[")
            self.lines.append(line(self.engine, file, function, ids.removesuffix("]")))
            for value in getattr(getattr(item, "callspec", None), "params", {}).values():
                value = getattr(value, "case", value)  # of a work of tests/kernels
                if dataclasses.is_dataclass(value) and hasattr(value, "id"):
                    key = f"{type(value).__module__.removeprefix('_cases.')}: {value.id}"
                    self.cases[key] = described(value)


def record(path: Path, engine: str, arguments: list[str]) -> int:
    import pytest

    recorder = Recorder(engine)
    status = int(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], plugins=[recorder]))
    stored = json.loads(path.read_text()) if path.exists() else {"tests": {}, "cases": {}}
    counts = Counter(stored["tests"]) + Counter(recorder.lines)
    stored["tests"] = dict(sorted(counts.items()))
    stored["cases"].update(recorder.cases)
    path.write_text(json.dumps(stored, indent=0) + "\n")
    print(f"{len(recorder.lines)} tests collected on {engine}, {len(counts)} lines in {path}")
    return status


def translated(text: str, rules: dict[str, list[list[str]]]) -> str | None:
    """Return the new name of a test, or None if it is listed as gone."""
    if any(re.search(pattern, text) for pattern, _ in rules["gone"]):
        return None
    for pattern, replacement in rules["renamed"]:
        text = re.sub(pattern, replacement, text)
    head, _, words = text.rpartition(" | ")
    return f"{head} | {' '.join(sorted(words.split()))}"


def compare(before: Path, after: Path, renamed: Path) -> int:
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    rules = json.loads(renamed.read_text())
    wanted = {translated(text, rules): text for text in old["tests"]}
    gone = sum(translated(text, rules) is None for text in old["tests"])
    wanted.pop(None, None)
    lost = sorted(text for name, text in wanted.items() if name not in new["tests"])
    modules = rules["case_modules"]  # a case is known by its module and its content: ids may be given twice
    kept = {(name.split(": ")[0], value) for name, value in new["cases"].items()}
    changed = [
        name
        for name, value in old["cases"].items()
        if (modules.get(name.split(": ")[0], name.split(": ")[0]), value) not in kept
    ]
    for text in lost:
        print(f"lost: {text}")
    for name in changed:
        print(f"lost case: {name}\n  before: {old['cases'][name]}")
    print(f"{len(old['tests'])} tests before, {len(new['tests'])} after; {gone} listed as gone, {len(lost)} lost")
    return 1 if lost or changed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="append what pytest collects")
    recording.add_argument("file", type=Path)
    recording.add_argument("--engine", required=True)
    comparing = commands.add_parser("compare", help="say which tests of the first record are missing from the second")
    for name in ("before", "after", "renamed"):
        comparing.add_argument(name, type=Path)
    words = [*sys.argv[1:], "--"]
    options = parser.parse_args(words[: words.index("--")])
    if options.command == "record":
        return record(options.file, options.engine, words[words.index("--") + 1 : -1])
    return compare(options.before, options.after, options.renamed)


if __name__ == "__main__":
    sys.exit(main())
