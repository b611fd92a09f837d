"""Modules whose tensors are never uninitialised memory, on whatever device they are built and however they are moved.

Large models are built on the meta device, which has no values, and moved by ``to_empty``: FSDP, torchtitan, Lightning
and transformers do so. A module here keeps what its tensors start from as plain data and fills them by itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class InitializedModule(nn.Module):
    """A module that knows what each of its own tensors starts from.

    * Built on the meta device and moved, by ``to_empty`` or ``to``: its tensors have their first values.
    * Moved by ``to_empty`` from any other device: its tensors keep their values.
    * Moved to the meta device: buffers that were set since, such as a new ``weight``, start from what they were then.
    * ``from_pretrained`` of transformers (5 or later): tensors that the checkpoint lacks have their first values, with
      or without an ``_init_weights`` that calls ``reset_parameters``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, tuple[torch.Size, array[float]]] = {}  # no tensors: no move of the module touches them

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the module's own tensors to what they start from, in place, on their device."""
        self._fill(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """Return the module's own parameters and buffers that it initialises, by name."""
        named = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _keep_start(self, name: str, value: Tensor) -> None:
        """Keep ``value`` as what the tensor ``name`` starts from."""
        numbers = value.detach().to("cpu", torch.float64).flatten().tolist()
        self._start[name] = value.shape, array("d", numbers)

    def _kept_start(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a copy of what the tensor ``name`` starts from, on the CPU."""
        shape, numbers = self._start[name]
        return torch.frombuffer(numbers, dtype=torch.float64).reshape(shape).to(dtype, copy=True)

    def _initial(self) -> dict[str, Tensor]:
        """Return what the module's tensors start from, by name, on the CPU."""
        tensors = self._tensors()
        return {name: self._kept_start(name, tensors[name].dtype) for name in self._start if name in tensors}

    def _fill(self, names: Iterable[str]) -> None:
        tensors, initial = self._tensors(), self._initial()
        for name in names:
            if name in initial:
                _copy(tensors[name], initial[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = {id(tensor): name for name, tensor in self._tensors().items()}
        initial = cache(self._initial)

        def with_values(tensor: Tensor) -> Tensor:
            name = own.get(id(tensor))
            start = initial().get(name) if name is not None and tensor.is_meta else tensor
            if name is None or start is None:  # a gradient, of a module inside, or of a subclass
                return fn(tensor)
            try:
                moved = fn(tensor)
            except NotImplementedError:  # a copy out of the meta device
                moved = fn(start.to(tensor.dtype))
            if moved is not tensor and not moved.is_meta:
                _copy(moved, start)
            elif moved.is_meta and is_readable(tensor) and name in self._buffers and name not in initial():
                self._keep_start(name, tensor)
            return moved

        return super()._apply(with_values, recurse)

    # transformers sets this on a module after its own _init_weights: what the checkpoint lacks is uninitialised then,
    # and only the tensors that came from the checkpoint have the same mark

    @property
    def _is_hf_initialized(self) -> bool:
        return bool(self.__dict__.get("_hf_initialized", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_hf_initialized"] = value
        if value:
            loaded = [name for name, tensor in self._tensors().items() if getattr(tensor, "_is_hf_initialized", False)]
            with torch.no_grad():
                self._follow(loaded)
                self._fill(name for name in self._tensors() if name not in loaded)

    def _follow(self, loaded: Iterable[str]) -> None:
        """Take over the values that were loaded, by name, as what the module starts from."""
        for name in loaded:
            tensor = self._buffers.get(name)  # a learned parameter starts where it started
            if name in self._start and tensor is not None and is_readable(tensor):
                # equal ones keep the digits that the tensor has not
                if not torch.equal(self._kept_start(name, tensor.dtype), tensor.cpu()):
                    self._keep_start(name, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow(name for name in self._tensors() if prefix + name in state_dict)


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, which moves or casts a tensor, but for casts to half precision."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

    return moved


def is_readable(tensor: Tensor) -> bool:
    """Return whether a tensor has values of its own to read: it is neither on the meta device nor fake or a shard."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy ``value`` to ``target``, which is a shard under FSDP2."""
    with torch.no_grad():
        if hasattr(target, "device_mesh") and not hasattr(value, "device_mesh"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(target, DTensor)
            value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
        target.copy_(value)
