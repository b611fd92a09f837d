"""Make Triton's interpreter fast enough for thousands of launches: half of its time is spent on preparations."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from triton.runtime import interpreter


def patch_languages_once() -> None:
    """Patch ``triton.language`` once a launch; the interpreter does it at every call of a device function."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()
    languages_of: dict[int, set[int]] = {}  # by the globals of a kernel's module

    def patch_new(fn: Any) -> Any:
        languages = languages_of.get(id(fn.__globals__))
        if languages is None:
            modules = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value)}
            languages = languages_of[id(fn.__globals__)] = modules & {id(interpreter.tl), id(interpreter.tl.core)}
        if languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch(fn)

    def launch_unpatched(self: Any, *arguments: Any, **keywords: Any) -> None:
        patched.clear()
        launch(self, *arguments, **keywords)
        patched.clear()

    interpreter._patch_lang = patch_new
    interpreter.GridExecutor.__call__ = launch_unpatched


def remember_dtypes() -> None:
    """Keep the numpy dtype of each Triton type; the interpreter builds a table of all at every call."""
    plain, known = interpreter._get_np_dtype, {}

    @functools.wraps(plain)
    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = plain(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered


def prepare() -> None:
    patch_languages_once()
    remember_dtypes()
