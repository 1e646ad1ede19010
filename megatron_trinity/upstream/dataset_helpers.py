"""The compiled dataset helpers are used as the wheel ships them.

Reason: at start rank 0 runs `make` in the package to compile `helpers_cpp`; the wheel has the
compiled module but no makefile, and the run exits.
Written for: megatron-core 0.19.2.
Remove when: `compile_helpers` looks whether the module is there.
"""

from __future__ import annotations

import functools
import importlib.util

from megatron.core.datasets import utils

from megatron_trinity.upstream.registry import rebind


def install() -> None:
    """Compile only when there is no compiled module."""
    original = utils.compile_helpers

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    rebind(original, compile_helpers)
