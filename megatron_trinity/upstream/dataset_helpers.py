"""The compiled dataset helpers are used as the wheel ships them."""

from __future__ import annotations

import functools
import importlib.util

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="dataset-helpers",
    symbols=("megatron.core.datasets.utils.compile_helpers",),
    reason=(
        "at start rank 0 runs `make` in the package to compile `helpers_cpp`; the wheel has the "
        "compiled module but no makefile, and the run exits"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`compile_helpers` looks whether the module is there",
)


def install() -> None:
    """Compile only when there is no compiled module."""
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    rebind(original, compile_helpers)
