"""A measurement, the environment it was taken in, and the files of saved ones."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__

SCHEMA = 5
_READABLE = (1, 2, 3, 4, 5)  # 1: without static_floor_ms; 2: date; 3: class_counts; 4: clock
#: The saved results of a checkout.
RESULTS = Path("benchmarks/results")
#: The measured code.
MEASURED = ("lt_kernels", "csrc", "setup.py")


@dataclass(frozen=True)
class Record:
    """One provider on one case in one dtype and direction. Times in milliseconds, bandwidths in 1e9 bytes a second."""

    op: str
    provider: str
    backend: str | None  # reference | native | triton for ours, None for others
    case: str
    sizes: dict[str, int]
    dtype: str
    direction: str  # fwd | bwd | fwd_bwd
    ms_median: float
    ms_p20: float
    ms_p80: float
    repetitions: int
    peak_bytes: int | None  # allocated beyond what the inputs hold
    bytes_moved: int  # the least that the result needs
    flops: int
    gbps: float  # bytes_moved / ms_median
    copy_gbps: float | None  # a copy of the logits, read + write, measured in the same turns; None where gemms is
    fraction_of_floor: float | None  # time of the op's floor in the same turns / ms_median; see Floor
    device: str
    device_slug: str
    versions: dict[str, str | None]
    git: str | None
    static_floor_ms: float | None = None  # Cost.static_floor_ms; None for a chip it does not know
    date: str | None = None  # of the measurement, ISO 8601; None in old records
    class_counts: str | None = (
        None  # the data set and a digest of its counts, see Case.counts_name; None in old records
    )
    clock: str = "device"  # device | wall | graph, see timing.CLOCKS; "device" in old records

    @property
    def shape(self) -> str:
        return shape_of(self.sizes.values())

    @property
    def kind(self) -> str:
        """cpu | cuda"""
        return "cpu" if self.device_slug.startswith("cpu-") else "cuda"

    @property
    def with_host(self) -> bool:
        """Whether the host's part of a call is in the times."""
        return self.kind == "cpu" or self.clock == "wall"

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Records of one group were measured in turns in one run, so their ratios mean something."""
        return (self.op, self.case, self.dtype, self.clock)


def shape_of(sizes: Iterable[int]) -> str:
    """Format sizes for people."""
    return " x ".join(f"{size:,}" for size in sizes)


#: Our providers in the order in which the library chooses among them.
PREFERRED = {"cuda": ("lt[triton]", "lt[native]", "lt[reference]"), "cpu": ("lt[native]", "lt[reference]")}


def by_direction(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Group by device, op, case, dtype and direction, in order of appearance; each group is provider -> record."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        key = (record.device_slug, *record.group, record.direction)
        found.setdefault(key, {})[record.provider] = record
    return list(found.values())


def first(group: dict[str, Record]) -> Record:
    """Return a record of a group, for what all of it share."""
    return next(iter(group.values()))


def ours(group: dict[str, Record]) -> Record | None:
    """Return the record of the backend that the library picks by itself."""
    return next((group[name] for name in PREFERRED[first(group).kind] if name in group), None)


def is_ours(provider: str) -> bool:
    """Say whether it is one of our backends, lt[backend], or one of our strategies, lt-strategy."""
    return provider.startswith(("lt[", "lt-"))


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def device_slug(device: str) -> str:
    """A folder name: ``cpu-<model>-<threads>c`` or the GPU's name."""
    name = device_name(device)
    if device != "cuda":
        name = f"cpu-{name.split(',')[0].removesuffix(' Processor')}-{torch.get_num_threads()}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    from .. import info

    facts = info()
    return {
        "lt_kernels": __version__,
        "python": facts["python"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "cuda": torch.version.cuda,
        "cpu_capability": facts["cpu_capability"],
    }


def git_revision() -> str | None:
    """Return the commit of this package's checkout, with "-dirty" if its code changed; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("LT_KERNELS_GIT_REVISION")  # a copy of a checkout without its history

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)

    try:
        revision = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--", *MEASURED).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{revision}-dirty" if revision and changed else revision or None


def find_root(start: Path) -> Path:
    """Return the nearest folder at or above ``start`` that holds benchmarks/results.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / RESULTS).is_dir():
            return folder
    raise FileNotFoundError(f"no {RESULTS} at or above {start.resolve()}: run this in a checkout, or give --root")


def load(path: Path) -> list[Record]:
    """Read the records of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file, or one of another schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        schema, entries = content["schema"], content["records"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: expected a results file of `lt-kernels bench`") from None
    if schema not in _READABLE:
        raise ValueError(f"{path}: got schema {schema!r}, expected one of {_READABLE}")
    return [Record(**record) for record in entries]


def save(path: Path, records: list[Record]) -> None:
    """Write ``records`` to ``path``; they replace records of the same groups (op, case, dtype, clock)."""
    measured = {record.group for record in records}
    kept = [record for record in load(path) if record.group not in measured] if path.exists() else []
    lines = ",\n  ".join(json.dumps(asdict(record)) for record in kept + records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"schema": {SCHEMA}, "records": [\n  {lines}\n]}}\n')
