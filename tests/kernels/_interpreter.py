"""Make Triton's interpreter fast enough for thousands of launches: most of its time is spent on preparations."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from triton._utils import validate_block_shape
from triton.language import core
from triton.runtime import interpreter


def patch_languages_once() -> None:
    """Leave ``triton.language`` patched; the interpreter does it at every call of a device function."""
    patch = interpreter._patch_lang
    patched: set[int] = set()
    languages_of: dict[int, set[int]] = {}  # by the globals of a kernel's module

    def patch_new(fn: Any) -> Any:
        languages = languages_of.get(id(fn.__globals__))
        if languages is None:
            modules = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value)}
            languages = languages_of[id(fn.__globals__)] = modules & {id(interpreter.tl), id(core)}
        if not languages <= patched:
            patched.update(languages)
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_new


def remember_dtypes() -> None:
    """Keep the numpy dtype of each Triton type; the interpreter builds a table of all at every call."""
    plain, known = interpreter._get_np_dtype, {}

    @functools.wraps(plain)
    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = plain(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered


def remember_shapes() -> None:
    """Check each shape once, and make the names of types and the types of tuples when they are asked for."""

    @functools.cache
    def checked(shape: tuple[int, ...]) -> tuple[Any, int]:
        return core.tuple(shape), validate_block_shape(shape)

    @functools.cache
    def constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel = checked(tuple(map(core._unwrap_if_constexpr, shape)))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape) if type.is_block() else ())

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        self.given_type = type if type is None or isinstance(type, core.tuple_type) else core.tuple_type(type)

    def type_of_tuple(self: Any) -> Any:
        return core._type_for_tuple_values(self.values) if self.given_type is None else self.given_type

    core.block_type.__init__ = make_block
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = make_tensor
    core.tuple.__init__ = make_tuple
    core.tuple.type = property(type_of_tuple)


def prepare() -> None:
    patch_languages_once()
    remember_dtypes()
    remember_shapes()
