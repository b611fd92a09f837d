"""The command ``lt-kernels`` (also ``python -m lt_kernels``)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, info


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status; errors of the user are one line on stderr and status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 0
    try:
        return int(arguments.run(arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"lt-kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lt-kernels",
        description="Fused losses for training classifiers on long-tailed labels with very many classes.",
        epilog="""examples:
  lt-kernels info                  what is installed, and which backend can run where
  lt-kernels demo                  train on long-tailed digits, compare losses, measure throughput
  lt-kernels bench --list          what can be measured
  lt-kernels COMMAND --help        options and examples of a command""",
    )
    parser.add_argument("--version", action="version", version=f"lt_kernels {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    command = commands.add_parser(
        "info",
        help="versions, devices, and why a backend is not available",
        description="Versions, devices, the extension's build; per op which backends can run and why others cannot.",
        epilog="""examples:
  lt-kernels info
  lt-kernels info --json > environment.json""",
    )
    command.add_argument("--json", action="store_true", help="print JSON: lt_kernels.info() as it is")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "bench",
        help="measure an op; compare with saved results; make tables and figures from them",
        description="Measure an op against eager PyTorch, torch.compile and other libraries, after checking each\n"
        "provider's result against float64. With the word `compare`: has our code become slower, relative to\n"
        "eager PyTorch and torch.compile? With the word `report`: tables and figures from saved results.",
        epilog="""examples:
  lt-kernels bench --list                                   ops, providers and cases
  lt-kernels bench                                          everything on the CPU
  lt-kernels bench margin_cross_entropy --case inat18-n512 --dtype float32
  lt-kernels bench --provider 'eager,lt[native]' --json out.json
  lt-kernels bench --device cuda --save                     into benchmarks/results/<device>/
  lt-kernels bench --device cuda --budget 240 --json out.json   what fits into four minutes, headline cases first
  lt-kernels bench compare                                  a few cases now, against the saved results
  lt-kernels bench compare before.json after.json           two results files; nothing is measured
  lt-kernels bench report                                   write README.md, docs/benchmarks.md and the figures
  lt-kernels bench report --check                           fail if they do not show the saved results""",
    )
    command.add_argument(
        "op", nargs="*", metavar="OP", help="an op (default: all), or `compare [BEFORE.json AFTER.json]`, or `report`"
    )
    command.add_argument("--list", action="store_true", help="list ops, providers and cases, and stop")
    for name, text in (
        ("provider", "what to measure (default: what is available here; reasons are printed for the rest)"),
        ("case", "shapes to measure (default: those meant for the device)"),
        ("dtype", "float32, bfloat16, float16 (default: all)"),
        ("direction", "fwd, bwd, fwd_bwd (default: all)"),
    ):
        command.add_argument(
            f"--{name}", action="append", metavar="NAME", help=f"{text}; comma-separated, or given several times"
        )
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    for name, number, unit, text in (
        ("repetitions", int, "N", "of each provider, at least (20)"),
        ("seconds", float, "S", "per case and dtype, for fwd and again for bwd and fwd_bwd, at least (1)"),
        ("limit", float, "S", "the same, at most, once each provider has 3 repetitions (6)"),
        ("budget", float, "S", "for everything: headline cases first, what does not fit is named (no limit)"),
        ("tolerance", float, "X", "with `compare`: growth of our relative time that is a regression (0.3)"),
    ):
        command.add_argument(f"--{name}", type=number, metavar=unit, help=text)
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the records to FILE (same cases are replaced)"
    )
    command.add_argument("--save", action="store_true", help="write them to benchmarks/results/<device>/<op>.json")
    command.add_argument(
        "--check", action="store_true", help="with `report`: change nothing, fail if something is stale"
    )
    command.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="checkout with the saved results")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "demo",
        help="train on long-tailed digits with nine losses; measure throughput; four plots",
        description="Train a small network on scikit-learn's handwritten digits, made long-tailed, with nine losses,\n"
        "and measure the fused loss on an iNaturalist-2018-like head. Needs the extra: pip install 'lt_kernels[demo]'.",
        epilog="""examples:
  lt-kernels demo
  lt-kernels demo --out /tmp/demo --seeds 1 --epochs 10 --skip-throughput""",
    )
    command.add_argument(
        "--out", type=Path, default=Path("output"), metavar="DIR", help="folder of the plots (output/)"
    )
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="independent splits and networks (3)")
    command.add_argument("--epochs", type=int, default=80, metavar="N", help="per network (80)")
    command.add_argument("--skip-throughput", action="store_true", help="train only")
    command.set_defaults(run=_demo)
    return parser


class _Parser(argparse.ArgumentParser):
    """Keeps the line breaks of examples, in sub-commands too."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})  # type: ignore[arg-type]


def _info(arguments: argparse.Namespace) -> int:
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name in ("lt_kernels", "python", "torch", "triton"):
        print(f"{name:14} {facts[name] or 'not installed'}")
    print(f"{'devices':14} {', '.join(facts['devices'])}")
    print(f"{'CPU':14} {facts['cpu_capability']}, {facts['threads']} threads")
    print(f"{'settings':14} {', '.join(f'{name}={value}' for name, value in facts['settings'].items())}")
    print("\nextension")
    for name, value in (facts["extension"] or {"not built": "native is not available"}).items():
        print(f"  {name:12} {', '.join(map(str, value)) or 'none' if isinstance(value, (list, tuple)) else value}")
    for op, devices in facts["backends"].items():
        print(f"\n{op}")
        for device, backends in devices.items():
            for backend, reason in backends.items():
                print(f"  {device:6} {backend:10} {'available' if reason is None else f'not available: {reason}'}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import records, report, runner

    word, *files = arguments.op or [None]
    if files and word != "compare":
        raise ValueError(f"got {' '.join(arguments.op)!r}, expected one op, or `compare` with two files, or `report`")
    if arguments.check and word != "report":
        raise ValueError("--check goes with `lt-kernels bench report`")
    if arguments.tolerance is not None and word != "compare":
        raise ValueError("--tolerance goes with `lt-kernels bench compare`")
    if word == "report":
        return _report(arguments)
    if word == "compare":
        return _compare(arguments, [Path(file) for file in files])
    if word is not None and word not in runner.OPS:
        raise ValueError(f"unknown op {word!r}; choose from: {', '.join(runner.OPS)}, or `compare` or `report`")
    ops = [word] if word else list(runner.OPS)
    if arguments.list:
        for op in ops:
            _list(op)
        return 0

    options = _options(arguments)
    if arguments.provider:
        options["providers"] = _names(arguments.provider)
    status = 0
    for op in ops:
        targets = [arguments.json] if arguments.json else []
        if arguments.save:
            results = report.find_root(arguments.root) / report.RESULTS
            targets.append(results / records.device_slug(arguments.device) / f"{op}.json")

        def keep(group: list[records.Record], targets: list[Path] = targets) -> None:
            for path in targets:
                records.save(path, group)

        try:
            measured = runner.run(op, device=arguments.device, log=_print, on_records=keep, **options)
            if word and not measured:
                raise ValueError(f"{op} has none of the cases and providers asked for: see `lt-kernels bench --list`")
        except runner.BenchmarkError as error:
            print(f"lt-kernels: {error}", file=sys.stderr)
            status = 1
        for path in targets:
            if path.exists():
                print(f"wrote {path}")
    return status


def _report(arguments: argparse.Namespace) -> int:
    from .bench import report

    root = report.find_root(arguments.root)
    if arguments.check:
        try:
            report.check(root)
        except report.StaleReportError as error:
            print(f"lt-kernels: {error}", file=sys.stderr)
            return 1
        print("tables and figures show the saved results")
        return 0
    changed = [f"{'wrote' if path.exists() else 'removed'} {path}" for path in report.write(root)]
    print("\n".join(changed) or "everything is up to date")
    if all(path.parent.name.startswith("cpu-") for path in report.result_files(root)):
        print(report.NOT_ON_GPU)
    return 0


def _compare(arguments: argparse.Namespace, files: list[Path]) -> int:
    from .bench import compare, records, report, runner

    tolerance = compare.TOLERANCE if arguments.tolerance is None else arguments.tolerance
    if not tolerance > 0:
        raise ValueError(f"--tolerance: got {tolerance}, expected a number above 0")
    if len(files) not in (0, 2):
        raise ValueError(f"compare: got {len(files)} file, expected two, or none to measure now")
    if files:
        found = compare.compare(records.load(files[0]), records.load(files[1]), tolerance)
        if not found:
            raise ValueError(f"{files[0]} and {files[1]} have no case in common with our time and a reference's")
    else:
        results = report.find_root(arguments.root) / report.RESULTS
        try:
            found = compare.compare_now(results, arguments.device, tolerance, _print, **_options(arguments))
        except runner.BenchmarkError as error:
            print(f"lt-kernels: {error}", file=sys.stderr)
            return 1
    print(f"\nour time / that of the reference, before -> now; a regression grows beyond {1 + tolerance:g}x in each")
    print(compare.table(found))
    regressions = sum(one.verdict == "regression" for one in found)
    print(f"{regressions} of {len(found)} are regressions" if regressions else "no regression")
    return 1 if regressions else 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options that choose and time measurements, by the names of ``runner.run``."""
    lists = {"cases": arguments.case, "dtypes": arguments.dtype, "directions": arguments.direction}
    numbers = {name: getattr(arguments, name) for name in ("repetitions", "seconds", "limit", "budget")}
    given: dict[str, Any] = {name: _names(value) for name, value in lists.items() if value}
    return given | {name: value for name, value in numbers.items() if value is not None}


def _print(line: str) -> None:
    print(line, flush=True)


def _list(op: str) -> None:
    from .bench import runner

    module = runner.OPS[op]
    print(op)
    print("  providers")
    for name, provider in module.PROVIDERS.items():
        states = []
        for device in ("cpu", "cuda"):
            unasked = provider.unasked(device)
            state = runner.unavailable_reason(op, name, device) or (unasked and f"only when asked for: {unasked}")
            states.append(f"{device}: {state or 'available'}")
        print(f"    {name:23} {'; '.join(states)}")
    print("  cases")
    for case in module.CASES.values():
        where = "/".join(case.devices) or "on request"
        shape = " x ".join(f"{size:,}" for size in case.sizes.values())
        print(f"    {case.name:18} {shape:22}  {where:10}  {case.note}".rstrip())


def _names(values: list[str]) -> list[str]:
    return [name for value in values for name in value.split(",") if name]


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    for name in ("seeds", "epochs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: got {getattr(arguments, name)}, expected at least 1")
    missing = demo.missing_packages()
    if missing:
        raise ValueError(f"the demo needs {', '.join(missing)}: pip install 'lt_kernels[demo]'")
    demo.run(arguments.out, arguments.seeds, arguments.epochs, throughput=not arguments.skip_throughput)
    return 0
