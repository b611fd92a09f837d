"""What an editor knows of the public names: precise return types, and overloads where a flag changes the result."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import lt_kernels
from lt_kernels import datasets, functional, losses, metrics, mixing, priors, queues, schedules, testing

MODULES = (lt_kernels, functional, losses, priors, queues, schedules, datasets, mixing, metrics, testing)
#: Flags that change what comes back, and of what.
FLAGS: dict[Callable[..., Any], tuple[str, ...]] = {
    functional.margin_cross_entropy: ("return_lse", "return_prediction"),
    functional.linear_margin_cross_entropy: ("return_lse", "return_prediction"),
    functional.expert_cross_entropy: ("return_ensemble",),
    functional.partitioned_logsumexp: ("separate_scale",),
    testing.dense_partitioned_logsumexp: ("separate_scale",),
    losses.GMLLoss.forward: ("return_terms",),
    losses.ELMLoss.forward: ("return_terms",),
}


def own(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The module's public names that the package defines."""
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]:
        value = getattr(module, name)
        if str(getattr(value, "__module__", "")).startswith("lt_kernels"):
            yield f"{module.__name__}.{name}", value


def methods(name: str, cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for key, value in vars(cls).items():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if key[0] != "_" and inspect.isfunction(value):
            yield f"{name}.{key}", value


CALLABLES: dict[str, Callable[..., Any]] = {}
for module in MODULES:
    for name, value in own(module):
        found = methods(name, value) if inspect.isclass(value) else [(name, value)]
        CALLABLES |= {key: each for key, each in found if inspect.isfunction(inspect.unwrap(each))}


def test_the_callables_are_found():
    assert len(CALLABLES) > 100
    assert {"lt_kernels.functional.margin_cross_entropy", "lt_kernels.losses.GMLLoss.forward"} <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_returns_something_precise(name):
    annotation = inspect.signature(CALLABLES[name]).return_annotation
    assert annotation is not inspect.Signature.empty, "no return type"
    assert annotation not in ("Any", Any)
    if name.endswith(".extra_repr"):
        assert annotation == "str"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
@pytest.mark.parametrize(("function", "flags"), FLAGS.items(), ids=lambda value: getattr(value, "__qualname__", ""))
def test_overloads_say_what_a_flag_changes(function, flags):
    from typing import get_overloads

    overloads = [inspect.signature(each) for each in get_overloads(function)]
    plain = [each for each in overloads if all(each.parameters[f].annotation == "Literal[False]" for f in flags)]
    assert len(plain) == 1
    for flag in flags:
        given = {each.return_annotation for each in overloads if each.parameters[flag].annotation == "Literal[True]"}
        assert len(given) == 1
        assert given != {plain[0].return_annotation}
    known = set(inspect.signature(function).parameters) - set(flags)
    assert set(plain[0].parameters) - {*flags, "options", "keys"} <= known
