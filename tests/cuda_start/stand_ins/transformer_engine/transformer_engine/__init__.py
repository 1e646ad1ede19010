"""Transformer Engine, to be found: its modules are there, its layers cannot compute."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from tests.cuda_start.stand_ins import kernels_in_torch

__version__ = "2.20.2"
globals()["__path__"] = []  # so that every submodule is asked of the finder below

# megatron-core asks for these and has something else to do without them.
_ABSENT = ("apply_fused_qkv_rotary_pos_emb", "get_workspace", "is_symm_backed")


class Layer(torch.nn.Module):
    """Something to derive from."""


class StandIn(types.ModuleType):
    """A module in which everything is there; a kernel says that it was called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _ABSENT:
            raise AttributeError(name)
        found: Any = getattr(kernels_in_torch, name, None)
        if found is None and name.lstrip("_")[:1].isupper():
            found = type(name, (Layer,), {"__module__": self.__name__})
        elif found is None:

            def found(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f"a kernel of Transformer Engine was called: {name}")

        setattr(self, name, found)
        return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes each submodule that is asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if not package.startswith("transformer_engine") or last in _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, Finder())
for _part in ("common", "common.recipe", "pytorch", "pytorch.module", "pytorch.module.base"):
    importlib.import_module(f"transformer_engine.{_part}")
importlib.import_module("transformer_engine.pytorch.distributed")
