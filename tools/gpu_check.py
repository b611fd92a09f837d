"""Everything that needs a GPU, in one command and under nine minutes: build, test, sanitise, count bytes, measure.

    tools/gpu_check.sh OUT                  every step
    tools/gpu_check.sh OUT --only tests     one step again (may be given several times); the others' results stay
    tools/gpu_check.sh OUT --limit bench=90 another limit for a step, in seconds (likewise)

Needs a Python that has torch >= 2.11 with CUDA and Triton >= 3.6; uses no network and installs nothing. pytest may come
as wheels in the folder wheels/. What is missing (nvcc, pytest, compute-sanitizer, ncu) costs its step only. Every step
has a time limit, a log OUT/STEP.log, and its state in OUT/summary.json: passed, passed in part (the limit came, nothing
had failed), failed, timed out, or skipped, with the reason. OUT/<device>/ is what the repository keeps, under
benchmarks/results/. Status 1 unless every step that ran passed, passed in part, or was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77  # exit status of a command that could not do its work here; its last line says why
IN_PART = 75  # of one whose time did not suffice, and in which nothing failed; its last line says how far it came
FINE = ("passed", "passed in part", "skipped")
TOOLKIT = "/usr/local/cuda"
TOOL_FOLDERS = (f"{TOOLKIT}/bin", "/opt/nvidia/nsight-compute/*")

#: What the sanitizer looks at: small shapes, every layout, and classes out of range. Tests as ``--select`` takes them.
SANITISED = ["test_bad_targets"] + [
    f"test_every_element_is_written[{case}]"
    for case in (
        # rows
        "odd",
        "inat18 width",
        "wide rows",
        "sliced",
        "padded rows",
        "every other column",
        "segmentation",
        "transposed with everything",
        "mixup with everything",
        "probabilities with everything",
        # experts
        "loss: few classes",
        "losses: 8142",
        "loss of a list: 8142",
        "fusion: 8142",
        "prediction: few classes",
        "to_mean: 8142",
        "pairwise: few classes",
        # contrastive losses
        "everything",
        "everything with itself",
        "one feature",
    )
]
RACED = [
    *(f"test_every_element_is_written[{case},mean]" for case in ("odd", "inat18 width", "wide rows", "segmentation")),
    *(f"test_every_element_is_written[{work}: 8142]" for work in ("loss", "fusion", "to_mean")),
    "test_every_element_is_written[everything]",
]


@dataclass
class Machine:
    """What the steps need to know of where they run."""

    python: str
    out: Path
    info: dict[str, Any]  # lt_kernels.info()
    facts: dict[str, Any]  # of the device: name, slug, capability

    @property
    def native(self) -> bool:
        reasons: dict[str, str | None] = self.info["backends"]["margin_cross_entropy"]["cuda"]
        return reasons["native"] is None

    @property
    def backends(self) -> str:
        return "triton,native" if self.native else "triton"

    def file(self, name: str) -> str:
        return str(self.out / name)


@dataclass
class Command:
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    limit: float  # seconds
    commands: Callable[[Machine, float], dict[str, Command] | str]  # run side by side; or why the step is skipped


@dataclass
class Outcome:
    state: str  # passed | passed in part | failed | timed out | skipped
    seconds: float = 0.0
    note: str = ""  # why, or the last line it wrote


# ---------------------------------------------------------------------------------------------------------------- steps


def build(machine: Machine, limit: float) -> dict[str, Command] | str:
    environment = {"LT_KERNELS_BUILD": "cuda", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", machine.facts["capability"])
    if "CUDA_HOME" not in os.environ and Path(TOOLKIT, "bin/nvcc").exists():
        environment["CUDA_HOME"] = TOOLKIT  # the nvcc on PATH may be a script that is not beside the headers
    return {"": Command([machine.python, "setup.py", "build_ext", "--inplace"], environment)}


def pytest(machine: Machine, results: str, limit: float, *arguments: str, jobs: bool = True) -> Command | str:
    """Run tests on the device, the most informative first, and record them; or say why this machine cannot."""
    if not importable(machine, "pytest"):
        return "pytest cannot be imported: docs/gpu_check.md says how to carry its wheels"
    command = [machine.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "limited_run", "--tb=short"]
    command += ["--engine=gpu", "--seconds", str(limit), "--results", machine.file(results)]
    if jobs and importable(machine, "xdist"):
        command += ["--numprocesses", str(min(os.cpu_count() or 1, 16)), "--dist", "loadgroup"]
    environment = {"LT_KERNELS_TEST_BACKENDS": machine.backends, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Command([*command, *arguments], environment)


def tests(folder: str, results: str) -> Callable[[Machine, float], dict[str, Command] | str]:
    def commands(machine: Machine, limit: float) -> dict[str, Command] | str:
        command = pytest(machine, results, limit - 20, folder)
        return command if isinstance(command, str) else {"": command}

    return commands


def sanitizer(machine: Machine, limit: float) -> dict[str, Command] | str:
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer was not found"
    runs = [("memcheck", backend, SANITISED) for backend in machine.backends.split(",")]
    runs += [("racecheck", "native", RACED)] if machine.native else []
    commands = {}
    for kind, backend, names in runs:
        selection = [word for name in names for word in ("--select", name)]
        results = f"sanitizer-{kind}-{backend}.json"
        command = pytest(machine, results, limit - 25, "tests/kernels", *selection, jobs=False)
        if isinstance(command, str):
            return command
        options = ["--tool", kind, "--error-exitcode", "1", "--target-processes", "application-only"]
        # without the caching allocator every tensor is an allocation of its own, whose ends are known
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LT_KERNELS_TEST_BACKENDS": backend}
        arguments = [tool, *options, *command.arguments]
        commands[f"{kind}-{backend}"] = Command(arguments, {**command.environment, **environment})
    return commands


def ncu(machine: Machine, limit: float) -> dict[str, Command] | str:
    tool = find_tool("ncu")
    if tool is None:
        return "ncu was not found"
    arguments = [machine.python, "tools/gpu_counters.py", "--ncu", tool, "--backend", machine.backends]
    counters = machine.file(f"{machine.facts['slug']}/counters.json")
    return {"": Command([*arguments, "--seconds", str(limit - 25), "--json", counters])}


def bench(op: str) -> Callable[[Machine, float], dict[str, Command] | str]:
    def commands(machine: Machine, limit: float) -> dict[str, Command] | str:
        results = machine.file(f"{machine.facts['slug']}/{op}.json")
        arguments = [machine.python, "-m", "lt_kernels", "bench", op, "--device", "cuda"]
        return {"": Command([*arguments, "--budget", str(limit - 15), "--json", results])}

    return commands


#: In this order. The limits add up to less than nine minutes.
STEPS = {
    "build": Step(70, build),
    "tests": Step(120, tests("tests/kernels", "tests.json")),
    "suite": Step(50, tests("tests/ops", "suite.json")),
    "sanitizer": Step(45, sanitizer),
    "ncu": Step(40, ncu),
    "bench": Step(55, bench("margin_cross_entropy")),
    "bench-linear": Step(40, bench("linear_margin_cross_entropy")),
    "bench-experts": Step(30, bench("expert_cross_entropy")),
    "bench-fusion": Step(15, bench("expert_fusion")),
    "bench-divergence": Step(20, bench("expert_divergence")),
    "bench-contrastive": Step(35, bench("partitioned_logsumexp")),
}

# -------------------------------------------------------------------------------------------------------- running them


def run_step(name: str, step: Step, machine: Machine) -> Outcome:
    commands = step.commands(machine, step.limit)
    if isinstance(commands, str):
        return Outcome("skipped", note=commands)
    started = time.monotonic()
    with ThreadPoolExecutor(len(commands)) as pool:
        outcomes = pool.map(
            lambda label, command: run(
                command, machine.out / f"{'-'.join(filter(None, (name, label)))}.log", step.limit
            ),
            commands,
            commands.values(),
        )
        by_label = dict(zip(commands, outcomes, strict=True))
    states = [outcome.state for outcome in by_label.values()]
    order = ("timed out", "failed", "skipped", "passed in part", "passed")
    worst = next(state for state in order if state in states)
    notes = [f"{label}: {outcome.note}" if label else outcome.note for label, outcome in by_label.items()]
    return Outcome(worst, round(time.monotonic() - started, 1), "; ".join(notes))


def run(command: Command, log: Path, limit: float) -> Outcome:
    """Run a command in the repository's root; after ``limit`` seconds end it and every process it started."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1", **command.environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process.pid)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    state = {None: "timed out", 0: "passed", SKIPPED: "skipped", IN_PART: "passed in part"}.get(status, "failed")
    if state in ("failed", "timed out"):
        print("\n".join(f"    {line}" for line in lines[-25:]), flush=True)
    why = {"failed": f"status {status}; last line: ", "timed out": f"over {limit:.0f} s; last line: "}.get(state, "")
    return Outcome(state, round(time.monotonic() - started, 1), why + (lines[-1].strip("= ") if lines else "none"))


def end(group: int) -> None:
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        time.sleep(patience)


# ------------------------------------------------------------------------------------------------------------ the place


def search_path() -> str:
    """Return where Python finds this package, its tools, and the wheels in ``wheels/``."""
    wheels = [str(path) for path in sorted(ROOT.glob("wheels/*.whl"))]
    return os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tools"), *wheels, os.environ.get("PYTHONPATH"))))


def output(*command: str) -> str | None:
    """Return what a short command prints, or None if it cannot be run."""
    environment = {**os.environ, "PYTHONPATH": search_path()}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def importable(machine: Machine, module: str) -> bool:
    return output(machine.python, "-c", f"import {module}") is not None


def find_tool(name: str) -> str | None:
    folders = [os.environ.get("PATH", "")]
    folders += [str(path) for pattern in TOOL_FOLDERS for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    return shutil.which(name, path=os.pathsep.join(folders))


def look(python: str, out: Path) -> Machine | str:
    """The machine, or why nothing can run here."""
    code = """
import json, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device is available")
import lt_kernels
from lt_kernels.bench.records import device_slug
major, minor = torch.cuda.get_device_capability()
facts = {"name": torch.cuda.get_device_name(), "slug": device_slug("cuda"), "capability": f"{major}.{minor}",
         "count": torch.cuda.device_count(), "memory": torch.cuda.mem_get_info()[1], "cuda": torch.version.cuda}
print(json.dumps({"facts": facts, "info": lt_kernels.info()}))
"""
    try:
        done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot be run: {error}"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"{python} ended with status {done.returncode}"])[-1]
    return Machine(python, out, **json.loads(done.stdout.strip().splitlines()[-1]))


def environment(machine: Machine | str) -> dict[str, Any]:
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")
    git = output(*describe) if (ROOT / ".git").exists() else None
    compiler = re.search(r"release ([\d.]+)", output("nvcc", "--version") or "")
    fields = (
        "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    )
    return {
        "git": git or os.environ.get("LT_KERNELS_GIT_REVISION"),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processors": os.cpu_count(),
        "nvcc": compiler[1] if compiler else None,
        "nvidia_smi": output("nvidia-smi", f"--query-gpu={fields}", "--format=csv"),
        "tools": {name: find_tool(name) is not None for name in ("nvcc", "compute-sanitizer", "ncu")},
        "device": machine.facts if isinstance(machine, Machine) else None,
        "info": machine.info if isinstance(machine, Machine) else None,
    }


def for_the_repository(facts: dict[str, Any], tests: Path) -> dict[str, Any]:
    """Return the summary without what the commands wrote, and how many tests passed."""
    steps = {name: {key: step[key] for key in ("state", "seconds")} for name, step in facts["steps"].items()}
    counts = json.loads(tests.read_text())["counts"] if tests.exists() else None
    return {"steps": steps, "device_checks": counts, "environment": facts["environment"]}


def limit(given: str) -> tuple[str, float]:
    """STEP=S of the command line."""
    name, _, seconds = given.partition("=")
    if name not in STEPS:
        raise argparse.ArgumentTypeError(f"got {given!r}, expected STEP=S with a step of {', '.join(STEPS)}")
    try:
        value = float(seconds)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {given!r}, expected STEP=S with seconds S > 0")
    return name, value


def write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs and results; made if it is not there")
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help=f"one of {', '.join(STEPS)}")
    parser.add_argument(
        "--limit", action="append", type=limit, default=[], metavar="STEP=S", help="seconds that a step may take"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch (default: this one)")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = out / "summary.json"
    steps: dict[str, Any] = json.loads(summary.read_text())["steps"] if summary.exists() and options.only else {}

    started = time.monotonic()
    limits = dict(options.limit)
    chosen = [name for name in STEPS if not options.only or name in options.only]
    python = shutil.which(options.python) or options.python
    machine = look(python, out)
    for name in chosen:
        if isinstance(machine, str):
            outcome = Outcome("failed", note=machine)
        else:
            outcome = run_step(name, replace(STEPS[name], limit=limits.get(name, STEPS[name].limit)), machine)
        steps[name] = asdict(outcome)
        print(f"{name:16} {outcome.state:14} {outcome.seconds:6.1f} s  {outcome.note}", flush=True)
        if name == "build":
            machine = look(python, out)  # it may have a backend more
        facts = {"steps": {step: steps[step] for step in STEPS if step in steps}, "environment": environment(machine)}
        write(summary, facts)
        if isinstance(machine, Machine):
            write(out / machine.facts["slug"] / "gpu_check.json", for_the_repository(facts, out / "tests.json"))
    print(f"{time.monotonic() - started:.0f} s in all; {summary}")
    return 1 if any(steps[name]["state"] not in FINE for name in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
