"""A rank with Transformer Engine: its Python modules over the emulation, and the real trainer."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from tests.distributed.worker import load_megatron

PACKAGES = "TRINITY_TEST_TE_PACKAGES"
"""Variable with the folder of the packages of requirements/te.txt."""

# On a machine without CUDA these are refused, and rightly: here they are what is under test.
_ALLOWED = ("transformer_impl", "moe_grouped_gemm", "precision")
_OF_FP8 = "--first-last-layers-bf16"


def load_emulated() -> None:
    """As `load_megatron`, after Transformer Engine. A rank, forked from this, calls it again."""
    # Behind the project's own packages, which win where both have one.
    if os.environ[PACKAGES] not in sys.path:
        sys.path.append(os.environ[PACKAGES])
    if "transformer_engine" in sys.modules:
        return
    from tests.transformer_engine.emulation.cuda import pretend_cuda
    from tests.transformer_engine.emulation.install import install_emulation

    install_emulation()
    load_megatron()
    pretend_cuda()

    from megatron_trinity.arguments import cuda
    from megatron_trinity.arguments.verdicts.needs_cuda import NEEDS_CUDA

    cuda.CUDA_ONLY = tuple(
        replace(rule, needs_cuda=lambda _: False) if rule.dest in _ALLOWED else rule
        for rule in cuda.CUDA_ONLY
    )
    for use in [use for use, flags in NEEDS_CUDA.items() if _OF_FP8 in flags]:
        del NEEDS_CUDA[use]
