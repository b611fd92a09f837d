"""Make Triton's interpreter fast enough for thousands of launches."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


def patch_languages_once() -> None:
    """Patch ``triton.language`` once a launch; the interpreter does it at every call of a device function."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_new(fn: Any) -> Any:
        modules = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value)}
        languages = modules & {id(interpreter.tl), id(interpreter.tl.core)}
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
