"""What an adaptation of megatron-core is, and the tools that adaptations are written with."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

from megatron_trinity.errors import TrinityError


@dataclass(frozen=True)
class Adaptation:
    """One change to an installed package, with the reason for it and its end.

    Each stands at the head of a module that makes the change in its function `install`, and whose
    docstring begins with what the change is.

    Attributes:
        name: short identifier, used in messages.
        symbols: dotted names of the upstream objects that are replaced or relied on.
        reason: what goes wrong without it.
        written_for: the upstream versions it was written and tested for.
        remove_when: the upstream change that makes it unnecessary.
        when: "always", or "without_cuda" for the stand-ins of the CPU platform.
        after: names of adaptations that have to be made before.
    """

    name: str
    symbols: tuple[str, ...]
    reason: str
    written_for: str
    remove_when: str
    when: Literal["always", "without_cuda"] = "always"
    after: tuple[str, ...] = ()


def resolve(dotted_name: str) -> Any:
    """The object that a dotted name such as `module.function` or `module.Class.method` means.

    Raises:
        AttributeError: no such object.
    """
    parts = dotted_name.split(".")
    for cut in range(len(parts), 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only the absence of this very module sends the search one level up; a package that
            # the module itself needs and that is missing is a fault of its own.
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AttributeError(f"no module {parts[0]!r}")


def check_symbols(adaptation: Adaptation, installed_version: str) -> None:
    """Raise a readable error if upstream no longer has something that `adaptation` touches."""
    for symbol in adaptation.symbols:
        try:
            resolve(symbol)
        except (AttributeError, ModuleNotFoundError) as error:
            raise TrinityError(
                f"adaptation {adaptation.name!r} touches {symbol}, which megatron-core "
                f"{installed_version} no longer has: {error}. It was written for "
                f"{adaptation.written_for}; install that version, or see docs/upstream.md"
            ) from error


def rebind(original: Any, replacement: Any, package: str = "megatron") -> None:
    """Make every loaded module of `package` that holds `original` hold `replacement` instead.

    `from module import function` copies the reference, so replacing it in its own module would
    leave the copies of modules that were imported earlier as they were.
    """
    prefix = package + "."
    for module_name, module in list(sys.modules.items()):
        if module is None or not (module_name + ".").startswith(prefix):
            continue
        for attribute, value in list(vars(module).items()):
            if value is original:
                setattr(module, attribute, replacement)
