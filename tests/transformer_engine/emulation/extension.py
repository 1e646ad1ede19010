"""The module that takes the place of `transformer_engine_torch`."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.transformer_engine.emulation.enumerations import enumerations

NAME = "transformer_engine_torch"

_CLASSES = (
    "CommOverlap",
    "CommOverlapBase",
    "CommOverlapCore",
    "CommOverlapHelper",
    "CommOverlapP2P",
    "CommOverlapP2PBase",
    "FP8TensorMeta",
)
"""Named in annotations and `isinstance`, never made here."""

calls: Counter[str] = Counter()
"""How often each emulated function was called, so that a test sees that it took this way."""

_functions: dict[str, Callable[..., Any]] = {}


def emulates(function: Callable[..., Any]) -> Callable[..., Any]:
    """Put a function into the extension under its own name. Autograd does not look into it."""
    name = function.__name__

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        with torch.no_grad():
            return function(*args, **kwargs)

    _functions[name] = counted
    return function


class Extension(types.ModuleType):
    """A module whose functions without an emulation exist, and say so when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "ep_")):  # asked for with `hasattr`: parts that may be absent
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{NAME}.{name} is not emulated")

        return missing


def build_extension() -> Extension:
    """The module, with what has been emulated so far."""
    module = Extension(NAME)
    contents = {**enumerations(), **{name: type(name, (), {}) for name in _CLASSES}, **_functions}
    for name, value in contents.items():
        setattr(module, name, value)
    return module
