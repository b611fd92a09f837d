"""The command ``lt-kernels`` (also ``python -m lt_kernels``)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, info

if TYPE_CHECKING:
    from .bench.records import Record


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status; errors of the user are one line on stderr and status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 0
    return run_command("lt-kernels", arguments.run, arguments)


def run_command(name: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Return the exit status of ``run``; errors of the user are one line on stderr and status 2."""
    try:
        return int(run(arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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

    _add_bench(commands)

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


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser(
        "bench",
        help="measure ops against eager PyTorch, torch.compile and other libraries",
        description="Measure ops against eager PyTorch, torch.compile and other libraries, after checking each\n"
        "provider's result against float64.",
        epilog="""examples:
  lt-kernels bench --list                                   ops, providers and cases
  lt-kernels bench                                          everything on the CPU
  lt-kernels bench margin_cross_entropy --case inat18-n512 --dtype float32
  lt-kernels bench expert_fusion expert_divergence          two ops
  lt-kernels bench --provider 'eager,lt[native]' --json out.json
  lt-kernels bench --device cuda --save                     into benchmarks/results/<device>/
  lt-kernels bench --device cuda --budget 240 --json out.json   what fits into four minutes, headline cases first
  lt-kernels bench --device cuda --clock wall               small batches, the host's time included

In a checkout, `python benchmarks/report.py` makes tables and figures from saved results, and
`python benchmarks/compare.py` says whether our code has become slower.""",
    )
    command.add_argument("op", nargs="*", metavar="OP", help="ops to measure (default: all)")
    command.add_argument("--list", action="store_true", help="list ops, providers and cases, and stop")
    add_measuring_options(command)
    command.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="what to measure (default: what is available here; reasons are printed for the rest); comma-separated, or "
        "given several times",
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the records to FILE (same cases are replaced)"
    )
    command.add_argument("--save", action="store_true", help="write them to benchmarks/results/<device>/<op>.json")
    command.add_argument("--dirty", action="store_true", help="with --save: save results of uncommitted code, too")
    command.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="checkout with the saved results")
    command.set_defaults(run=_bench)


class Parser(argparse.ArgumentParser):
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
    from .bench import runner

    for op in arguments.op:
        if op not in runner.OPS:
            raise ValueError(f"unknown op {op!r}; choose from: {', '.join(runner.OPS)}")
    ops = list(dict.fromkeys(arguments.op)) or list(runner.OPS)
    if arguments.list:
        for op in ops:
            _list(op)
        return 0

    options = measuring_options(arguments)
    if arguments.provider:
        options["providers"] = _names(arguments.provider)
    folder = _folder_of_results(arguments)
    status, measured = 0, False
    for op in ops:
        paths = [*([arguments.json] if arguments.json else []), *([folder / f"{op}.json"] if folder else [])]
        try:
            measured |= bool(runner.run(op, log=print_now, on_records=partial(_save, paths), **options))
        except runner.BenchmarkError as error:
            print(f"lt-kernels: {error}", file=sys.stderr)
            status = 1
        for path in paths:
            if path.exists():
                print(f"wrote {path}")
    if arguments.op and not measured and status == 0:
        names = ", ".join(ops)
        raise ValueError(f"{names} has none of the cases and providers asked for: see `lt-kernels bench --list`")
    return status


def _folder_of_results(arguments: argparse.Namespace) -> Path | None:
    """Return the folder for ``--save``, or None without it. ValueError if the measured code is not committed."""
    from .bench import records

    if not arguments.save:
        if arguments.dirty:
            raise ValueError("--dirty goes with --save")
        return None
    revision = records.git_revision() or ""
    if revision.endswith("-dirty") and not arguments.dirty:
        raise ValueError(
            f"--save: got revision {revision}: commit the changes in {', '.join(records.MEASURED)}, or give --dirty"
        )
    return records.find_root(arguments.root) / records.RESULTS / records.device_slug(arguments.device)


def _save(paths: Sequence[Path], found: list[Record]) -> None:
    from .bench import records

    for path in paths:
        records.save(path, found)


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and time measurements; ``measuring_options`` reads them."""
    for name, text in (
        ("case", "shapes to measure (default: those meant for the device)"),
        ("dtype", "float32, bfloat16, float16 (default: all)"),
        ("direction", "fwd, bwd, fwd_bwd (default: all)"),
    ):
        parser.add_argument(
            f"--{name}", action="append", metavar="NAME", help=f"{text}; comma-separated, or given several times"
        )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument(
        "--clock",
        metavar="NAME",
        help="of a GPU: device (default: events, without the host's time), wall (with it), graph (replays of a CUDA "
        "graph)",
    )
    for name, number, unit, text in (
        ("repetitions", int, "N", "of each provider, at least (20)"),
        ("seconds", float, "S", "per case and dtype, for fwd and again for bwd and fwd_bwd, at least (1)"),
        ("limit", float, "S", "the same, at most, once each provider has 3 repetitions (6)"),
        ("budget", float, "S", "for everything: headline cases first, what does not fit is named (no limit)"),
    ):
        parser.add_argument(f"--{name}", type=number, metavar=unit, help=text)


def measuring_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of ``add_measuring_options``, by the names of ``runner.run``."""
    lists = {"cases": arguments.case, "dtypes": arguments.dtype, "directions": arguments.direction}
    numbers = {name: getattr(arguments, name) for name in ("clock", "repetitions", "seconds", "limit", "budget")}
    given: dict[str, Any] = {name: _names(value) for name, value in lists.items() if value}
    given |= {name: value for name, value in numbers.items() if value is not None}
    return {"device": arguments.device, **given}


def print_now(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def _list(op: str) -> None:
    from .bench import records, runner

    spec = runner.OPS[op]
    print(op)
    print("  providers")
    for name, provider in spec.providers.items():
        states = []
        for device in ("cpu", "cuda"):
            unasked = provider.unasked(device)
            state = runner.unavailable_reason(op, name, device) or (unasked and f"only when asked for: {unasked}")
            states.append(f"{device}: {state or 'available'}")
        print(f"    {name:23} {'; '.join(states)}")
    print("  cases")
    for case in spec.cases.values():
        where = "/".join(case.devices) or "on request"
        shape = records.shape_of(case.sizes.values())
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
