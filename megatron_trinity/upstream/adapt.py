"""Applies the adaptations that this process needs."""

from __future__ import annotations

import contextlib
import os

from megatron_trinity.upstream.installed import find_installed
from megatron_trinity.upstream.registry import check_symbols
from megatron_trinity.upstream.version import check_version, installed_megatron_core

_applied: set[str] = set()


def adapt_megatron() -> None:
    """Check the version of megatron-core and make the changes to it that this project needs.

    To be called before `megatron.training` is imported. Calls after the first do nothing.

    Raises:
        TrinityError: megatron-core is missing, of another version, or lacks a symbol that an
            adaptation touches; or a package that it would use is not whole.
    """
    # Here, since tools import this package for a name, and the table imports torch.
    import torch

    from megatron_trinity.upstream.adaptations import MODULES, needed_adaptations
    from megatron_trinity.upstream.cpu.jit import importing_uncompiled

    installed = installed_megatron_core()
    check_version(installed)
    cuda_available = torch.cuda.is_available()
    if cuda_available and not find_installed().triton:
        # torch.compile then leaves functions as they are, and no step fails for want of a compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with contextlib.nullcontext() if cuda_available else importing_uncompiled():
        for adaptation in needed_adaptations(cuda_available):
            if adaptation.name in _applied:
                continue
            check_symbols(adaptation, installed)
            MODULES[adaptation.name].install()
            _applied.add(adaptation.name)
