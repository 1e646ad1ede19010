"""The table of all adaptations, found in their files, in the order in which they are made."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from types import ModuleType

from megatron_trinity import upstream
from megatron_trinity.upstream import cpu
from megatron_trinity.upstream.registry import Adaptation


def in_order(adaptations: Iterable[Adaptation]) -> tuple[Adaptation, ...]:
    """Stand-ins for CUDA first, then by name, and each behind those that it names in `after`.

    Importing megatron-core needs the stand-ins.

    Raises:
        KeyError: `after` names none of them.
        RecursionError: they wait for each other.
    """
    by_name = {adaptation.name: adaptation for adaptation in adaptations}
    placed: dict[str, Adaptation] = {}

    def place(adaptation: Adaptation) -> None:
        for name in adaptation.after:
            place(by_name[name])
        placed.setdefault(adaptation.name, adaptation)

    for adaptation in sorted(by_name.values(), key=lambda a: (a.when == "always", a.name)):
        place(adaptation)
    return tuple(placed.values())


def _modules() -> Iterator[ModuleType]:
    for folder in (upstream, cpu):
        for found in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            if found.name != __name__ and not found.ispkg:
                yield import_module(found.name)


MODULES = {module.ADAPTATION: module for module in _modules() if hasattr(module, "ADAPTATION")}
"""Each adaptation and the module that makes it. None imports megatron-core before it is made."""

ADAPTATIONS = in_order(MODULES)
