"""The limits of length that the code keeps: longer functions and files say too much at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lt_kernels", "csrc", "tools", "benchmarks", "tests", "examples")
SUFFIXES = (".py", ".pyi", ".cpp", ".cu", ".cuh", ".h")
#: Lines of a Python function below its docstring, and lines of a file.
LONGEST_BODY, LONGEST_FILE = 80, 700

FILES = [ROOT / "setup.py", *(f for name in FOLDERS for f in (ROOT / name).rglob("*") if f.suffix in SUFFIXES)]


def bodies(source: str) -> Iterator[tuple[str, int]]:
    """Yield every function's name with its line, and how many lines its body has below the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = node.body[ast.get_docstring(node) is not None :]
            if statements:
                yield f"{node.name}, line {node.lineno}", statements[-1].end_lineno - statements[0].lineno + 1


def test_lines_of_a_body_are_counted_without_the_docstring():
    source = 'def f(x):\n    """Say\n    so."""\n    # a comment\n    y = (\n        x\n    )\n    return y\n'
    assert list(bodies(source)) == [("f, line 1", 4)]


def test_every_folder_is_read():
    for name in FOLDERS:
        assert any(path.is_relative_to(ROOT / name) for path in FILES), name


def test_no_function_is_too_long():
    python = [path for path in FILES if path.suffix == ".py"]
    found = {f"{path.relative_to(ROOT)}: {name}": n for path in python for name, n in bodies(path.read_text())}
    assert {name: lines for name, lines in found.items() if lines > LONGEST_BODY} == {}


def test_no_file_is_too_long():
    found = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FILE} == {}
