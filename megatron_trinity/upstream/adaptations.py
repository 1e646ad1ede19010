"""The table of all adaptations: what each module of this package declares, in order.

Importing it imports every adaptation, and with them torch, but nothing of megatron-core.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from megatron_trinity import upstream
from megatron_trinity.upstream import cpu
from megatron_trinity.upstream.registry import Adaptation


def in_order(adaptations: Sequence[Adaptation]) -> tuple[Adaptation, ...]:
    """The stand-ins for CUDA before the others, then by name, each behind those it names.

    Raises:
        ValueError: two have one name, one names another that there is not, or they wait for
            each other.
    """
    by_name = {a.name: a for a in adaptations}
    if len(by_name) < len(adaptations):
        raise ValueError(f"two adaptations have one name: {sorted(a.name for a in adaptations)}")
    placed: dict[str, Adaptation] = {}

    def place(name: str, waiting: tuple[str, ...]) -> None:
        if name not in by_name:
            raise ValueError(f"adaptation {waiting[-1]!r} is after {name!r}, which there is not")
        if name in waiting:
            raise ValueError(f"adaptations wait for each other: {', '.join((*waiting, name))}")
        for earlier in sorted(by_name[name].after):
            place(earlier, (*waiting, name))
        placed.setdefault(name, by_name[name])

    for adaptation in sorted(adaptations, key=lambda a: (a.when == "always", a.name)):
        place(adaptation.name, ())
    return tuple(placed.values())


def needed_adaptations(cuda_available: bool) -> tuple[Adaptation, ...]:
    """Those that a process with or without CUDA needs, in order."""
    return tuple(a for a in ADAPTATIONS if a.when == "always" or not cuda_available)


_modules = (
    importlib.import_module(found.name)
    for folder in (upstream, cpu)
    for found in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")
)
_declaring = [module for module in _modules if hasattr(module, "ADAPTATION")]

ADAPTATIONS = in_order([module.ADAPTATION for module in _declaring])
"""All adaptations, in the order in which they are applied."""

MODULES = {module.ADAPTATION.name: module for module in _declaring}
"""Name of an adaptation to the module that declares and installs it."""
