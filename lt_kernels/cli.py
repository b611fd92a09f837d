"""The command ``lt-kernels`` (also ``python -m lt_kernels``)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

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
        help="measure an op; make tables and figures from results",
        description="Measure an op against eager PyTorch and torch.compile, after checking each provider's result\n"
        "against float64; or, with the word `report`, make tables and figures from saved results.",
        epilog="""examples:
  lt-kernels bench --list                                   ops, providers and cases
  lt-kernels bench                                          everything on the CPU
  lt-kernels bench margin_cross_entropy --case inat18-n512 --dtype float32
  lt-kernels bench --provider 'eager,lt[native]' --json out.json
  lt-kernels bench --device cuda --save                     into benchmarks/results/<device>/
  lt-kernels bench report                                   write README.md, docs/benchmarks.md and the figure
  lt-kernels bench report --check                           fail if they do not show the saved results""",
    )
    command.add_argument("op", nargs="?", metavar="OP", help="an op (default: all), or `report`")
    command.add_argument("--list", action="store_true", help="list ops, providers and cases, and stop")
    for name, text in (
        ("provider", "what to measure (default: what is available here, without lt[reference])"),
        ("case", "shapes to measure (default: those meant for the device)"),
        ("dtype", "float32, bfloat16, float16 (default: the first two)"),
        ("direction", "fwd, bwd, fwd_bwd (default: fwd and fwd_bwd)"),
    ):
        command.add_argument(
            f"--{name}", action="append", metavar="NAME", help=f"{text}; comma-separated, or given several times"
        )
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    command.add_argument("--repetitions", type=int, default=20, metavar="N", help="of each provider, at least")
    command.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="per case, dtype and direction, at least"
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the records to FILE (same cases are replaced)"
    )
    command.add_argument("--save", action="store_true", help="write them to benchmarks/results/<device>/<op>.json")
    command.add_argument(
        "--check", action="store_true", help="with `report`: change nothing, fail if something is stale"
    )
    command.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="checkout for --save and `report`")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "demo",
        help="train on long-tailed digits with five losses; measure throughput; two plots",
        description="Train a small network on scikit-learn's handwritten digits, made long-tailed, with five losses,\n"
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

    if arguments.op == "report":
        root = report.find_root(arguments.root)
        if arguments.check:
            try:
                report.check(root)
            except report.StaleReportError as error:
                print(f"lt-kernels: {error}", file=sys.stderr)
                return 1
            print("tables and figures show the saved results")
            return 0
        changed = report.write(root)
        print("\n".join(f"wrote {path}" for path in changed) or "everything is up to date")
        if not any((root / report.RESULTS).glob("nvidia-*/*.json")):
            print(report.NOT_ON_GPU)
        return 0
    if arguments.check:
        raise ValueError("--check goes with `lt-kernels bench report`")
    if arguments.op is not None and arguments.op not in runner.OPS:
        raise ValueError(f"unknown op {arguments.op!r}; choose from: {', '.join(runner.OPS)}, or `report`")
    ops = [arguments.op] if arguments.op else list(runner.OPS)
    if arguments.list:
        for op in ops:
            _list(op)
        return 0

    files = [arguments.json] if arguments.json else []
    options = {
        "cases": _names(arguments.case),
        "providers": _names(arguments.provider),
        "device": arguments.device,
        "repetitions": arguments.repetitions,
        "seconds": arguments.seconds,
    }
    for name, value in (("dtypes", _names(arguments.dtype)), ("directions", _names(arguments.direction))):
        options.update({name: value} if value else {})
    for op in ops:
        targets = list(files)
        if arguments.save:
            results = report.find_root(arguments.root) / report.RESULTS
            targets.append(results / records.device_slug(arguments.device) / f"{op}.json")

        def keep(group: list[records.Record], targets: list[Path] = targets) -> None:
            for path in targets:
                records.save(path, group)

        runner.run(op, log=lambda line: print(line, flush=True), on_records=keep, **options)
        for path in targets:
            print(f"wrote {path}")
    return 0


def _list(op: str) -> None:
    from .bench import runner

    module = runner.OPS[op]
    print(op)
    print("  providers")
    for provider in module.PROVIDERS:
        reasons = {device: runner.unavailable_reason(op, provider, device) for device in ("cpu", "cuda")}
        print(
            f"    {provider:14} "
            + "; ".join(f"{device}: {reason or 'available'}" for device, reason in reasons.items())
        )
    print("  cases")
    for case in module.CASES.values():
        where = "/".join(case.devices) or "on request"
        print(f"    {case.name:18} N {case.rows:>6,}  C {case.classes:>7,}  {where:10}  {case.note}".rstrip())


def _names(values: list[str] | None) -> list[str] | None:
    return [name for value in values for name in value.split(",") if name] if values else None


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
