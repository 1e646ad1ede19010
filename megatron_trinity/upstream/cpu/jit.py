"""No `torch.compile` on functions of megatron-core."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-jit",
    symbols=(
        "megatron.core.jit.disable_jit_fuser",
        "megatron.core.jit.noop_decorator",
    ),
    reason=(
        "megatron-core's fusions are compiled for a GPU; on the CPU the first call would look for "
        "an accelerator and a C++ compiler, and take longer than many runs"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`jit_fuser` does nothing without CUDA",
    when="without_cuda",
    # It is the first to import megatron-core.
    after=("quiet", "cpu-device", "cpu-memory", "cpu-packages", "cpu-placement"),
)


def _leave_as_is(function: Any = None, **options: Any) -> Any:
    """In the place of `torch.compile`, as a function and as a decorator with options."""
    return function if function is not None else lambda decorated: decorated


@contextlib.contextmanager
def importing_uncompiled() -> Iterator[None]:
    """Imports in this context leave functions decorated with `torch.compile` as they are.

    Importing megatron.core decorates functions before its fuser can be turned off. Left as they
    are, they also spare the process the import of torch._dynamo, several seconds of its start.
    """
    with mock.patch.object(torch, "compile", _leave_as_is):
        yield


def _undo_in_loaded_modules(noop_decorator: Callable[..., Any]) -> None:
    """For a process that had imported megatron-core before it was adapted."""
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith("megatron."):
            continue
        for name, value in list(vars(module).items()):
            if name == "jit_fuser":
                setattr(module, name, noop_decorator)
            elif "_torchdynamo_orig_callable" in getattr(value, "__dict__", {}):
                setattr(module, name, value._torchdynamo_orig_callable)


def install() -> None:
    """Turn the fuser off for modules to come, and undo it in modules already imported."""
    from megatron.core import jit

    jit.disable_jit_fuser()
    _undo_in_loaded_modules(jit.noop_decorator)
