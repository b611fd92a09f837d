"""Every check of an argument. An error names the argument, what was given and what was expected.

The checks return the value, converted where their docstring says so. ``expected`` and ``note`` replace or extend the
text of a message. A text that shows a size is given as a function: compiled code that formats a size is compiled for it
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import _settings

if TYPE_CHECKING:
    import numpy as np

#: Operators take ints of 64 bits.
_TOO_LARGE = 2**63


class Indexed(Protocol):
    """Values by an index, as a pandas ``Series`` has them."""

    @property
    def index(self) -> Any: ...
    def items(self) -> Iterable[tuple[Any, Any]]: ...


#: One number for each class: list, tuple, numpy array or tensor in the order of the classes, or by class: a mapping
#: such as a ``Counter``, or a pandas ``Series``, whose index has the classes.
ClassVector: TypeAlias = "Sequence[float] | Tensor | np.ndarray[Any, Any] | Mapping[int, float] | Indexed"

#: Most classes of a vector by class: a wrong key is not to take all memory.
_MOST_CLASSES = 2**31

#: Part of a message, or a function that makes it.
Text: TypeAlias = "str | Callable[[], str]"

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, expected: str | None = None
) -> float:
    """Return ``value`` as a float: a finite real number, least <= value <= most."""
    if type(value).__name__ == "ndarray" and torch.compiler.is_compiling() and value.ndim == 0:
        value = value.item()  # traced code has NumPy's numbers as arrays
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:  # it may fit no float, and no operator's int
        raise ValueError(f"{name}: got an int of {value.bit_length()} bits, expected {expected or 'a smaller number'}")
    number = float(value)
    # math.isfinite does not trace where the number is symbolic; NaN fails these comparisons too
    if not (-math.inf < number < math.inf and least <= number <= most):
        if expected is None:
            bounds = f"a number >= {least:g}" if most == math.inf else f"a number in [{least:g}, {most:g}]"
            expected = "a finite number" if least == -math.inf else bounds
        raise ValueError(f"{name}: got {value}, expected {expected}")
    return number


def check_positive(name: str, value: Any, expected: str | None = None) -> float:
    """Return ``value`` as a float: a finite real number > 0."""
    number = check_number(name, value, expected=expected)
    if number <= 0:
        raise ValueError(f"{name}: got {value}, expected {expected or 'a number > 0'}")
    return number


def check_int(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    kind: str = "an int",
    expected: Text | None = None,
) -> int:
    """Return ``value``: an int of 64 bits, least <= value <= most; ``kind`` says what the type should be."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {kind}")
    value = value if isinstance(value, int) else int(value)  # of NumPy
    if not -_TOO_LARGE <= value < _TOO_LARGE:
        raise ValueError(
            f"{name}: got an int of {value.bit_length()} bits, expected {told(expected) or 'one of 64 bits'}"
        )
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, expected {told(expected) or f'an int >= {least}'}")
    return value


def check_flag(name: str, value: Any, kind: str = "a bool") -> bool:
    """Return ``value``: a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {kind}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str], expected: str | None = None) -> None:
    """Refuse a ``value`` that is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected {expected or f'one of {quoted(choices)}'}")


def told(text: Text | None) -> str | None:
    return text() if callable(text) else text


def quoted(choices: Sequence[str]) -> str:
    return ", ".join(map(repr, choices))


def check_tensor(name: str, value: Any, expected: Text = "a Tensor") -> Tensor:
    """Return ``value``: a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {told(expected)}")
    if value.is_nested:
        raise TypeError(f"{name}: got a nested tensor, expected a dense one (its values(), or torch.cat of its parts)")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, expected a dense one (to_dense())")
    return value


def with_values(name: str, value: Tensor) -> Tensor:
    """Return ``value``: a tensor whose values can be read."""
    if value.is_meta:
        raise ValueError(f"{name}: got a tensor on the meta device, which has no values, expected device='cpu'")
    return value


def check_floating(name: str, value: Any, expected: Text = "a Tensor", kind: str = f"one of {FLOATING}") -> Tensor:
    """Return ``value``: a tensor of a dtype in ``FLOATING``; ``kind`` says so in the message."""
    check_tensor(name, value, expected)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {kind}")
    return value


def as_dtype(name: str, value: Any) -> torch.dtype:
    """Return a floating-point dtype for new tensors; None is torch's default."""
    if value is None:
        return torch.get_default_dtype()
    if not isinstance(value, torch.dtype) or value not in FLOATING:
        raise TypeError(f"{name}: got {value!r}, expected a floating-point dtype")
    return value


def as_device(name: str, value: Any, default: torch.device | str | None = None) -> torch.device:
    """Return the device that a torch.device, its name or its index stands for; None is ``default``, or torch's."""
    try:
        return torch.device(value if value is not None else default or torch.get_default_device())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {value!r}, expected a torch.device or the name of one") from error


def device_of(device: Any, value: Any) -> torch.device:
    """Return the device asked for; by default that of ``value``, or torch's default device if it has none."""
    return as_device("device", device, value.device if isinstance(value, Tensor) else None)


def check_embeddings(name: str, value: Any, shape: str) -> Tensor:
    """Return ``value``: floating, with as many dimensions as ``shape``, such as "[N, D]"."""
    check_floating(name, value, f"a Tensor {shape}", "a floating-point dtype")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    return value


def check_integers(
    name: str, value: Any, expected: Text = "a Tensor of integers", kind: str = "an integer dtype"
) -> Tensor:
    """Return ``value``: a tensor of any integer dtype."""
    check_tensor(name, value, expected)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {kind}")
    return value


def as_int64(name: str, value: Tensor) -> Tensor:
    """Return integers as int64; uint64 beyond that become its largest value, which is no class, and on the CPU or with
    checks on an IndexError.
    """
    integers = value.to(torch.int64)
    if value.dtype != torch.uint64:
        return integers
    integers = check_values(check_not_wrapped, name, integers)
    return integers.masked_fill(integers < 0, torch.iinfo(torch.int64).max)


def check_shape(
    name: str, value: Tensor, shape: Sequence[int], note: str = "", *, expected: Text | None = None
) -> None:
    """Refuse a tensor of another shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {told(expected) or tuple(shape)}{note}")


def check_device(name: str, value: Tensor, like: Tensor, note: str = "") -> None:
    """Refuse a tensor on another device than that of ``like``."""
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device}{note}")


def check_scalar(name: str, value: Tensor, input: Tensor) -> Tensor:
    """Return ``value``: floating, 0-dim, on the device of ``input``."""
    if value.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
    check_floating(name, value, kind="a floating dtype")
    check_device(name, value, input, " as input")
    return value


def operand(number: float) -> Any:
    """Return a number; in compiled code that has been called with several values, a 0-dim float64 tensor of the CPU.

    ``Signature.flatten`` does so for all numbers of an operator, which would make each value a constant of a graph of
    its own. Numbers that something is computed from come here before.
    """
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import has_static_value  # of torch's compiler, loaded by now

    # a product, because torch's compiler turns no other use of such a number into one of tensors
    return number if has_static_value(number) else torch.ones((), dtype=torch.float64, device="cpu") * number


def filled(shape: tuple[int, ...], value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor full of an operand."""
    if isinstance(value, Tensor):
        return (torch.ones(shape, dtype=torch.float64, device=device) * value).to(dtype)
    return torch.full(shape, value, dtype=dtype, device=device)


def check_factor(name: str, value: Any, input: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """Return ``value``, a finite number or a 0-dim tensor, as a number and a tensor in ``dtype`` that multiplies it."""
    if isinstance(value, Tensor):
        return 1.0, check_scalar(name, value, input).to(dtype)
    return check_number(name, value), None


def check_both(name: str, value: object, other_name: str, other: object) -> None:
    """Refuse one of two arguments without the other."""
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{missing}: got None with {given}, expected both or neither")


def check_class_vector(
    name: str, value: Any, classes: int, input: Tensor, dtype: torch.dtype, of: str = "class"
) -> Tensor | None:
    """Return ``value`` [classes] in ``dtype``, or None; ``of`` names what has one value each."""
    if value is None:
        return None
    check_floating(name, value, lambda: f"a Tensor of shape [{classes}]", "a floating dtype")
    check_shape(name, value, (classes,), f", one value per {of}", expected=lambda: f"[{classes}]")
    check_device(name, value, input, " as input")
    return value.to(dtype).contiguous()


def as_class_vector(name: str, value: ClassVector, gap: float | None = None) -> Tensor:
    """Return a copy of ``value``, any finite vector, in float64 on the CPU, whatever torch's default device.

    A mapping or Series is read by class; ``gap`` stands for the classes that it lacks, None refuses them.
    """
    if isinstance(value, (str, bytes)) or not (hasattr(value, "__len__") or isinstance(value, Tensor)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a 1-D sequence, array or tensor of numbers")
    if isinstance(value, Tensor):
        with_values(name, check_tensor(name, value))
    given: Any = _by_class(name, value, gap)
    try:
        raw = given.detach() if isinstance(given, Tensor) else torch.tensor(given, device="cpu")
        numeric = not (raw.is_complex() or raw.dtype == torch.bool)
        vector = raw.to("cpu", torch.float64, copy=True) if numeric else raw
        if numeric and not isinstance(given, Tensor):
            # Python floats would have been rounded to float32
            vector = torch.tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value).__name__} ({error}), expected numbers [C]") from error
    if not numeric:
        raise TypeError(f"{name}: got dtype {raw.dtype}, expected integers or real floating-point numbers")
    if vector.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected a 1-D vector [C]")
    if len(vector) == 0:
        raise ValueError(f"{name}: got no elements, expected one per class")
    check_each_class(name, vector, vector.isfinite(), "finite numbers")
    return vector


def _by_class(name: str, value: Any, gap: float | None) -> Any:
    """Return a mapping or Series as a list in the order of the classes, anything else as it is."""
    if not isinstance(value, Mapping):
        if callable(getattr(value, "index", len)) or not hasattr(value, "items"):
            return value  # a sequence, whose index is a method, or an array: the order is that of the classes
        if getattr(value, "ndim", 1) != 1:
            raise ValueError(f"{name}: got a {type(value).__name__} of shape {value.shape}, expected a 1-D vector [C]")
    values: dict[int, Any] = {}
    for key, number in value.items():
        if isinstance(key, bool) or not isinstance(key, Integral):
            raise TypeError(f"{name}: got {key!r} ({type(key).__name__}) as a class, expected ints 0, 1, ...")
        at = int(key)
        if not 0 <= at < _MOST_CLASSES:
            raise ValueError(f"{name}: got {at} as a class, expected {'0, 1, ...' if at < 0 else 'one below 2^31'}")
        if at in values:
            raise ValueError(f"{name}: got class {at} twice, expected each class once")
        values[at] = number
    classes = max(values, default=-1) + 1
    if gap is None and len(values) < classes:
        missing = next(c for c in range(classes) if c not in values)
        raise ValueError(f"{name}: got nothing for class {missing}, expected a number for each of {classes} classes")
    return [values.get(c, gap) for c in range(classes)]


def check_each_class(name: str, vector: Tensor, holds: Tensor, expected: str) -> None:
    """Refuse a vector with an entry for which ``holds`` is False, naming the first."""
    bad = [] if has_no_values(holds) else (~holds).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{name}: got {vector[bad[0]].item():g} at class {bad[0]}{more}, expected {expected}")


def check_classes_last(name: str, target: Any, shape: tuple[int, ...], batch: int = 0) -> None:
    """Refuse the target of logits [..., C] where N is dimension ``batch`` and classes are the next; say what to do."""
    if len(shape) <= batch + 2 or not isinstance(target, Tensor):
        return
    expected = (*shape[batch : batch + 1], *shape[batch + 2 :])
    if tuple(target.shape) == shape[batch:-1] != expected:
        raise ValueError(
            f"{name}: got class indices of shape {tuple(target.shape)}, expected {expected} for logits of shape "
            f"{tuple(shape)}, whose classes are dimension {batch + 1} (classes in the last one: "
            f"logits.movedim(-1, {batch + 1}), or logits.flatten({batch}, -2) with target.flatten())"
        )


def check_angles(name: str, value: Any) -> None:
    """Refuse a number, or numbers by class, that are no angles in radians."""
    angles = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if angles.dim() == 0:
        check_number(name, angles.item(), 0.0, math.pi, expected="an angle in [0, pi]")
    else:
        check_each_class(name, angles, (angles >= 0) & (angles <= math.pi), "angles in [0, pi]")


def check_counted(counted: int, classes: int, of: str) -> None:
    """Refuse ``of`` with another number of classes than the class counts, the argument that the caller knows."""
    if counted != classes:
        raise ValueError(f"class_counts: got {counted} classes, expected {classes} as {of}")


def checks_on() -> bool:
    """Return whether values are checked that a GPU would have to be waited for. Traced code does without."""
    return _settings.checks and not torch.compiler.is_compiling()


def reads_values(tensor: Tensor) -> bool:
    """Return whether values are checked: on the CPU, where nothing has to be waited for, and everywhere with checks
    on."""
    here = tensor.device.type == "cpu" or _settings.checks
    return here and not torch.compiler.is_compiling() and not has_no_values(tensor)


def is_transformed() -> bool:
    """Return whether forward-mode differentiation or a ``torch.func`` transform is going on."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Return whether ``torch.func.vmap`` stands for the values of many tensors by this one: they cannot be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor cannot be read: on the meta device, fake, or batched."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or is_batched(tensor)


def check_all(name: str, holds: Tensor, problem: str) -> None:
    """Refuse values with a ``problem`` unless ``holds`` is True for each. Reads values: a GPU is waited for."""
    if not has_no_values(holds) and not bool(holds.all()):
        raise ValueError(f"{name}: got {problem}")


def check_values(
    check: Callable[..., None], name: str, value: Tensor, *numbers: int, words: Sequence[str] = ()
) -> Tensor:
    """Return ``value``, which ``check(name, value, *numbers, *words)`` refuses where values are read.

    Compiled code reads them when it runs, as the result is used.

    Args:
        check: one of ``VALUE_CHECKS``.
    """
    if reads_values(value):
        check(name, value, *numbers, *words)
    elif torch.compiler.is_compiling() and (value.device.type == "cpu" or _settings.checks):
        of_value = value.detach()
        return value + torch.ops.lt_kernels.checked(of_value, check.__name__, name, list(numbers), list(words))
    return value


def _are_within(integers: Tensor, low: int, high: int) -> bool:
    """Return whether all are from ``low`` to ``high``, in one pass over them."""
    if integers.numel() == 0:
        return True
    least, greatest = integers.aminmax()
    return low <= int(least) and int(greatest) <= high


def check_classes(
    name: str, label: Tensor, classes: int, none: int | None = None, hint: str | None = None, what: str = "class"
) -> None:
    """Raise IndexError for the first label that is neither a class nor ``none``. Reads values: a GPU is waited for."""
    label = as_int64(name, label)
    if not has_no_values(label) and _are_within(label, -1 if none == -1 else 0, classes - 1):
        return
    bad = (label < 0) | (label >= classes)
    if none is not None:
        bad &= label != none
        hint = f" or ignore_index={none}" if hint is None else hint
    if not has_no_values(bad) and bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        got = int(label.flatten()[row])
        raise IndexError(f"{name}: row {row} has {what} {got}, expected 0 <= {what} < {classes}{hint or ''}")


def check_keys(name: str, index: Tensor, keys: int) -> None:
    """Raise IndexError for the first index that is neither that of a key nor -1."""
    if _are_within(index, -1, keys - 1):
        return
    bad = (index < -1) | (index >= keys)
    row = int(bad.nonzero()[0])
    raise IndexError(f"{name}: got {int(index[row])} in row {row}, expected a key from 0 to {keys - 1}, or -1")


def check_int32(name: str, label: Tensor) -> None:
    """Refuse labels, int64, beyond the range of int32, in which they are compared."""
    limits = torch.iinfo(torch.int32)
    if _are_within(label, limits.min, limits.max):
        return
    low, high = (int(bound) for bound in label.aminmax())
    bad = low if low < limits.min else high
    raise ValueError(f"{name}: got {bad}, expected labels from {limits.min} to {limits.max}")


def check_not_wrapped(name: str, integers: Tensor) -> None:
    """Raise IndexError for uint64 that int64, in which they are given, has no room for."""
    wrapped = integers < 0
    if bool(wrapped.any()):
        raise IndexError(f"{name}: got {int(integers[wrapped].max()) + 2**64}, expected integers below 2^63")


def check_weights(name: str, weight: Tensor) -> None:
    """Refuse weights that are negative or not finite."""
    if not bool(((weight >= 0) & (weight < math.inf)).all()):
        raise ValueError(f"{name}: got a weight that is negative or not finite, expected finite weights >= 0")


#: What ``check_values`` takes, by name.
VALUE_CHECKS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (check_classes, check_keys, check_int32, check_not_wrapped, check_weights)
}


def _checked(value: Tensor, check: str, name: str, numbers: Sequence[int], words: Sequence[str]) -> Tensor:
    VALUE_CHECKS[check](name, value, *numbers, *words)
    return _nothing(value)


def _nothing(value: Tensor, *_: Any) -> Tensor:
    """Return a 0 that can be added to ``value``."""
    return value.new_zeros(())


# below the other operators, for queues need it too. It waits for a GPU, which no captured graph can
_library = torch.library.Library("lt_kernels", "FRAGMENT")
_library.define(
    "checked(Tensor value, str check, str name, SymInt[] numbers, str[] words) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_library.impl("checked", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("lt_kernels::checked", _nothing, lib=_library)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on inputs in ``dtype``, and of the results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(left: Tensor, right: Tensor, name: str, other: str) -> torch.dtype:
    """Return the dtype of the product of two matrices; ``right`` is the argument ``name``, ``left`` is ``other``."""
    kinds = {left.dtype, right.dtype}
    device = left.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in kinds:
        return torch.get_autocast_dtype(device)
    if len(kinds) == 2 and (torch.float32 not in kinds or torch.float64 in kinds):
        raise TypeError(
            f"{name}: got dtype {right.dtype}, expected {left.dtype} as {other}, or float32 beside float16 or bfloat16"
        )
    return min(kinds, key=lambda kind: kind.itemsize)
