"""Registration of functional operators under ``torch.ops.lt_kernels``."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Annotated, Any, Generic, NoReturn, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad

from .._checks import is_batched, is_transformed, operand

NAMESPACE = "lt_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

_Arguments = TypeVar("_Arguments")
_REFERENCE = "the reference backend, asked for by name: with lt_kernels.use_backend('reference')"
_TYPES = {Tensor: "Tensor", float: "float", bool: "bool", int: "int", str: "str"}
#: An int that may be symbolic in compiled code, such as a tensor's size.
Size: TypeAlias = Annotated[int, "SymInt"]


def flatten(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Return the fields of a NamedTuple in order, the fields of a nested NamedTuple in its place."""
    flat: list[Any] = []
    for value in arguments:
        if isinstance(value, tuple):
            flat.extend(value)
        else:
            flat.append(value)
    return tuple(flat)


class Signature(Generic[_Arguments]):
    """The flat list of arguments that the dispatcher takes for a NamedTuple, derived from its annotations.

    The last is ``numbers``, None unless compiled code has a number among them that may change: then it is all of them,
    float64 on the CPU, and the operator reads them when it runs.

    Args:
        kind: the NamedTuple; a field may be a NamedTuple itself.
        differentiable: names of the flat arguments that can receive a gradient, in the order of backward's results.
    """

    def __init__(self, kind: type[_Arguments], differentiable: Sequence[str] = ()) -> None:
        self.kind: Any = kind
        self.differentiable = tuple(differentiable)
        self._spans: list[tuple[Any, slice]] = []  # each nested NamedTuple, None for another field, and its arguments
        flat: list[tuple[str, Any]] = []
        for name, annotation in get_type_hints(kind, include_extras=True).items():
            nested = annotation if hasattr(annotation, "_fields") else None
            fields = [(name, annotation)] if nested is None else [*get_type_hints(nested, include_extras=True).items()]
            self._spans.append((nested, slice(len(flat), len(flat) + len(fields))))
            flat += fields
        flat.append(("numbers", Tensor | None))
        self.names = tuple(name for name, _ in flat)
        kinds = [_schema_type(annotation) for _, annotation in flat]
        #: The arguments in the schema language of torch.library.
        self.schema = ", ".join(f"{each} {name}" for each, name in zip(kinds, self.names, strict=True))
        tensors = [place for place, each in enumerate(kinds) if each in ("Tensor", "Tensor?")]
        others = [place for place, each in enumerate(kinds) if each not in ("Tensor", "Tensor?")]
        split = [*tensors, *others]
        self.n_tensors = len(tensors)
        self._split = itemgetter(*split)
        self._join = itemgetter(*(split.index(place) for place in range(len(split))))
        self._position = {name: place for place, name in enumerate(self.names)}
        self._needs = [self._position[name] for name in self.differentiable]
        self._numbers = [(place, each == "float[]") for place, each in enumerate(kinds) if each.startswith("float")]

    def flatten(self, arguments: Any) -> tuple[Any, ...]:
        """Return the flat arguments of a NamedTuple, which may have operands (``operand``) for numbers."""
        flat = flatten(arguments)
        if not torch.compiler.is_compiling():
            return (*flat, None)
        given = [each for place, many in self._numbers for each in (flat[place] if many else [flat[place]])]
        numbers = [each if isinstance(each, Tensor) else operand(each) for each in given]
        if not any(isinstance(each, Tensor) for each in numbers):
            return (*flat, None)
        one = torch.ones((), dtype=torch.float64, device="cpu")
        unread = list(flat)
        for place, many in self._numbers:
            unread[place] = [0.0] * len(flat[place]) if many else 0.0
        return (*unread, torch.stack([one * each for each in numbers]))

    def read(self, flat: Sequence[Any]) -> _Arguments:
        """Return the NamedTuple of flat arguments with all its numbers, where the operator runs."""
        return self.rebuild(flat) if flat[-1] is None else self._filled(flat, flat[-1].tolist())

    def trace(self, flat: Sequence[Any]) -> _Arguments:
        """Return the NamedTuple of flat arguments where nothing is read: ``numbers`` are 0-dim tensors in it."""
        return self.rebuild(flat) if flat[-1] is None else self._filled(flat, flat[-1].unbind())

    def _filled(self, flat: Sequence[Any], values: Iterable[Any]) -> _Arguments:
        numbers = iter(values)
        flat = list(flat)
        for place, many in self._numbers:
            flat[place] = [next(numbers) for _ in flat[place]] if many else next(numbers)
        return self.rebuild(flat)

    def rebuild(self, flat: Sequence[Any]) -> _Arguments:
        """Return the NamedTuple of flat arguments for their shapes: ``numbers`` are not read."""
        values = [flat[span.start] if nested is None else nested._make(flat[span]) for nested, span in self._spans]
        arguments: _Arguments = self.kind._make(values)
        return arguments

    def split(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the tensors (and their Nones) of flat arguments, which autograd saves, and the others."""
        both = self._split(flat)
        return both[: self.n_tensors], both[self.n_tensors :]

    def join(self, tensors: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
        """Return the flat arguments that ``split`` took apart."""
        flat: tuple[Any, ...] = self._join((*tensors, *others))
        return flat

    def needs(self, flat: Sequence[bool]) -> list[bool]:
        """Return which differentiable arguments need a gradient, from the answer for each flat argument."""
        return [flat[place] for place in self._needs]

    def gradients(self, values: Mapping[str, Any]) -> list[Any]:
        """Return gradients by name in the order of the flat arguments, None for the others."""
        flat: list[Any] = [None] * len(self.names)
        for name, value in values.items():
            flat[self._position[name]] = value
        return flat


def _schema_type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return str(annotation.__metadata__[0])
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (each for each in get_args(annotation) if each is not type(None))
        return f"{_TYPES[inner]}?"
    if get_origin(annotation) is list:
        return f"{_TYPES[get_args(annotation)[0]]}[]"
    return _TYPES[annotation]


def with_transforms(operator: Any, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator, in whose place ``eager`` is called where the reference backend is transformed.

    Args:
        operator: its last argument is the backend.
        eager: the same results in eager PyTorch, which autograd, forward mode and ``torch.func`` go through. What is
            not differentiable may be anything.
    """

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and is_transformed():
            if arguments[-1] == "reference":
                return eager(*arguments)
            if isinstance(arguments[0], list) and any(map(is_batched, arguments[0])):
                raise NotImplementedError(f"{operator.name()} takes no part in torch.func.vmap: use {_REFERENCE}")
        return operator(*arguments)

    return call


def through_eager(backend: str, upstream: Iterable[Tensor | None]) -> bool:
    """Return whether this backward pass goes through eager PyTorch, for gradients that can be differentiated
    (``create_graph``) or for many upstream gradients at once (``is_grads_batched``)."""
    if backend != "reference" or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or _are_many(upstream)


def _are_many(upstream: Iterable[Tensor | None]) -> bool:
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in upstream)


def eager_gradients(
    eager: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Any],
    needs: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients of ``eager(*arguments)``, which can be differentiated in turn; None for arguments without need.

    Args:
        needs: of each argument.
        upstream: gradients of the first results, None for none.
    """
    # aliases: one argument may have been computed from another, whose gradient goes its own way
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [value.view_as(value) if need else value for value, need in zip(arguments, needs, strict=True)]
        results = eager(*inputs)
    learning = [value for value, need in zip(inputs, needs, strict=True) if need]
    pairs = [(value, grad) for value, grad in zip(results, upstream, strict=False) if grad is not None]
    pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
    if not pairs or not learning:
        return [None] * len(inputs)
    values, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(values, learning, grads, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]


def listed_gradients(
    eager: Callable[..., Sequence[Tensor]],
    listed: Sequence[Tensor],
    others: Sequence[Any],
    needs_input_grad: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Return ``eager_gradients`` of an operator whose first argument is a Tensor[], as its backward pass returns them.

    Args:
        listed: that argument.
        needs_input_grad: of the context, see ``register_autograd``.
    """
    count = len(listed)

    def flat(*arguments: Any) -> Sequence[Tensor]:
        return eager(list(arguments[:count]), *arguments[count:])

    found = eager_gradients(flat, [*listed, *others], needs_input_grad[2:], upstream)
    return (found[:count], *found[count:])


class ReadyGradient:
    """The gradient that forward computed beside the loss, for an upstream gradient of 1.

    The first backward pass scales it in place, in a buffer that only its node of the graph holds. A second pass over a
    retained graph, ``create_graph`` and compiled code, which can trace neither, compute the gradient again.
    """

    def __init__(self, ready: bool) -> None:
        self.ready = ready

    def take(self, buffers: Sequence[Tensor], upstream: Tensor | None) -> list[Tensor]:
        """Return the buffers to be scaled, once and if ``upstream`` can be written into them; else none."""
        if not self.ready or upstream is None or not spends_in_place(upstream):
            return []
        self.ready = False
        return [buffer.data for buffer in buffers]  # scaling it is no change of a saved tensor


def spends_in_place(upstream: Tensor) -> bool:
    """Return whether a backward pass with this upstream gradient may overwrite what its node keeps."""
    eager = not torch.compiler.is_compiling() and type(upstream) is Tensor and not _are_many([upstream])
    return eager and not torch.is_grad_enabled()  # create_graph: the registered operator says what is not possible


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    decomposition: Callable[..., Any] | None = None,
) -> str:
    """Define one operator for every device (its backends choose the kernels) and return its qualified name.

    ``decomposition``: the same in torch's own operators, which ``torch.onnx.export`` writes in its place.
    """
    name = schema[: schema.index("(")]
    functional = "!" not in schema  # compiled code takes no operator that writes to its arguments
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,) if functional else ())
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if decomposition is not None:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        # unsafe: it has no ``out`` to convert. Symbolic shapes would come from it, were the fake not there too.
        register_decomposition(overload, unsafe=True)(decomposition)
        register_decomposition(overload, type="meta", unsafe=True)(fake)
    return qualified


def register_autograd(qualified: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an operator its gradient.

    ``torch.library.register_autograd`` does the same, but spends most of a small call on matching the schema's
    default values, of which our schemas have none.

    ``setup_context`` keeps the backend as ``ctx.backend``. Where the first argument is a Tensor[], it sees it as a
    list, ``ctx.needs_input_grad`` is that of (keyset, its length, *its tensors, *the others), and ``backward`` returns
    its gradients as a sequence, or None for none of them, and then those of the others.
    """
    name = qualified.removeprefix(f"{NAMESPACE}::")
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    listed = str(overload._schema.arguments[0].type) == "List[Tensor]"

    def below_autograd(keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        if listed:
            count, *flat = arguments
            arguments = (flat[:count], *flat[count:])
            ctx.list_length = count
        output = below_autograd(keyset, *arguments)
        setup_context(ctx, arguments, output)
        return output

    def backward_of_all(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if _are_many(grads) and ctx.backend != "reference":
            raise NotImplementedError(
                f"{qualified} takes one upstream gradient at a time: got is_grads_batched=True, expected one call of "
                f"torch.autograd.grad for each gradient, or {_REFERENCE}"
            )
        if listed:
            of_list, *others = backward(ctx, *grads)
            return (None, None, *([None] * ctx.list_length if of_list is None else of_list), *others)
        return (None, *backward(ctx, *grads))

    # forward(ctx, ...) and not a separate setup_context: with one, apply() binds the signature anew at each call
    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    function = type(f"{name}_autograd", (torch.autograd.Function,), functions)

    def dispatch(keyset: Any, *arguments: Any) -> Any:
        if is_transformed():
            _refuse_transforms(qualified, arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if listed:
                first, *others = arguments
                return function.apply(keyset, len(first), *first, *others)  # type: ignore[attr-defined]
            return function.apply(keyset, *arguments)  # type: ignore[attr-defined]
        return below_autograd(keyset, *arguments)

    _library.impl(name, dispatch, "Autograd", with_keyset=True)


def _refuse_transforms(qualified: str, arguments: tuple[Any, ...]) -> None:
    """Raise where forward-mode differentiation or a torch.func transform would silently lose a derivative."""
    flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    dual = any(
        isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None
        for argument in flat
        if forward_ad._current_level >= 0
    )
    if dual or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{qualified} has no forward-mode derivative and takes no part in torch.func transforms: "
            f"use backward() or torch.autograd.grad, or {_REFERENCE}"
        )


def register_no_double_backward(qualified: str) -> None:
    """Make differentiating a backward operator a clear error."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{qualified} has no derivative: lt_kernels losses are differentiable once. For second derivatives "
            f"(create_graph=True, torch.autograd.functional.hessian) use {_REFERENCE}"
        )

    torch.library.register_autograd(qualified, backward, lib=_library)
