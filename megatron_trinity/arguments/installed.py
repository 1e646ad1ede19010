"""Defaults on a GPU that follow from what is installed there, and what of it a flag needs.

Pure: a record of what is installed goes in, defaults, complaints and the line at start come out.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_trinity.arguments.cuda import CUDA_ONLY
from megatron_trinity.arguments.precision import BF16, PRECISIONS
from megatron_trinity.errors import UsageError
from megatron_trinity.upstream.installed import INSTALL_TRANSFORMER_ENGINE, Installed


@dataclass(frozen=True)
class Library:
    """A package that some flags need.

    Attributes:
        name: as it is called.
        found: whether it is there.
        way: how to get it.
    """

    name: str
    found: Callable[[Installed], bool]
    way: str


def _te(*least: int) -> Callable[[Installed], bool]:
    """Whether Transformer Engine is there, in version `least` or a later one."""

    def found(installed: Installed) -> bool:
        if installed.transformer_engine is None:
            return False
        numbers = re.findall(r"\d+", installed.transformer_engine)[: len(least)]
        return tuple(map(int, numbers)) >= least

    return found


TRANSFORMER_ENGINE = Library("Transformer Engine", _te(2, 1), INSTALL_TRANSFORMER_ENGINE)
DEEP_EP = Library("DeepEP", lambda i: i.deep_ep, "build it from github.com/deepseek-ai/DeepEP")


@dataclass(frozen=True)
class Fusion:
    """Work that is done in one kernel where there is one.

    Attributes:
        dest: the argument that turns it on.
        name: for the line at start.
        there: whether its kernel is.
        needs: what has to be installed for it.
    """

    dest: str
    name: str
    there: Callable[[Installed], bool]
    needs: str


FUSIONS: tuple[Fusion, ...] = (
    Fusion("apply_rope_fusion", "RoPE", _te(1, 4), "Transformer Engine"),
    Fusion(
        "moe_permute_fusion",
        "the permutation of tokens",
        lambda i: _te(2, 1)(i) and i.triton,
        "Transformer Engine and Triton",
    ),
    Fusion("bias_swiglu_fusion", "SwiGLU", lambda i: i.triton, "Triton with a C compiler"),
    Fusion(
        "gradient_accumulation_fusion",
        "the accumulation of gradients",
        lambda i: i.wgrad_fusion or _te(2, 1)(i),
        "Transformer Engine or NVIDIA's Apex",
    ),
)
"""Those that are a default of ours where they are there; what Megatron has beside them is
refused (that of the loss) or not part of a Trinity layer (that of the masked softmax)."""

NEEDS: Mapping[str, Library] = {
    "--transformer-impl": TRANSFORMER_ENGINE,
    "--precision": TRANSFORMER_ENGINE,  # a version for each
    "--te-rng-tracker": TRANSFORMER_ENGINE,
    "--use-te-activation-func": TRANSFORMER_ENGINE,
    "--fused-residual-rmsnorm": TRANSFORMER_ENGINE,
    "--attention-backend": TRANSFORMER_ENGINE,
    "--use-flash-attn": TRANSFORMER_ENGINE,
    "--tp-comm-overlap": TRANSFORMER_ENGINE,
    "--moe-grouped-gemm": TRANSFORMER_ENGINE,
    "--moe-permute-fusion": TRANSFORMER_ENGINE,
    "--use-precision-aware-optimizer": TRANSFORMER_ENGINE,
    "--optimizer-cpu-offload": TRANSFORMER_ENGINE,
    "--cpu-offloading-num-layers": TRANSFORMER_ENGINE,
    "--moe-enable-deepep": DEEP_EP,
    "--moe-token-dispatcher-type": DEEP_EP,
}
"""Flag of `CUDA_ONLY`, where it has a value that needs CUDA, to the package that it needs."""


def gpu_argument_defaults(installed: Installed) -> dict[str, Any]:
    """The defaults that replace Megatron's on a GPU: argparse dest to value."""
    fused = {fusion.dest: fusion.there(installed) for fusion in FUSIONS}
    layers = "transformer_engine" if TRANSFORMER_ENGINE.found(installed) else "local"
    return {**fused, "masked_softmax_fusion": False, "transformer_impl": layers}


def refuse_what_is_not_installed(args: Namespace, installed: Installed) -> None:
    """Refuse, by name, what was asked for and is not there.

    Raises:
        UsageError: lists every such flag, and how to install what it needs.
    """
    missing: dict[Library, list[str]] = {}
    for rule in CUDA_ONLY:
        library = _library_of(rule.flag, args)
        if library and rule.needs_cuda(getattr(args, rule.dest)) and not library.found(installed):
            missing.setdefault(library, []).append(rule.flag)
    if missing:
        raise UsageError(
            "; ".join(
                f"{', '.join(flags)}: {library.name} is not installed; leave it out, or "
                f"{library.way}"
                for library, flags in missing.items()
            )
        )


def _library_of(flag: str, args: Namespace) -> Library | None:
    if flag != "--precision":
        return NEEDS.get(flag)
    least = PRECISIONS[args.precision or BF16].transformer_engine
    if least is None:
        return None
    name = f"Transformer Engine {'.'.join(map(str, least))}, which {args.precision} needs,"
    return Library(name, _te(*least), INSTALL_TRANSFORMER_ENGINE)


def chosen(args: Namespace, installed: Installed) -> str:
    """The line at start: what is there, what is fused, and what is not and why."""
    te = installed.transformer_engine
    there = [
        (f"Transformer Engine {te}", te is not None),
        ("Apex", installed.apex),
        ("DeepEP", installed.deep_ep),
        ("Triton", installed.triton),
    ]
    on = [fusion.name for fusion in FUSIONS if getattr(args, fusion.dest)]
    off = [
        f"{fusion.name} ({'as asked' if fusion.there(installed) else f'needs {fusion.needs}'})"
        for fusion in FUSIONS
        if not getattr(args, fusion.dest)
    ]
    layers = "portable" if args.transformer_impl == "local" else "of Transformer Engine"
    return "; ".join(
        [
            f"layers: {layers}",
            f"kernels: {', '.join(name for name, found in there if found) or 'those of torch'}",
            f"fused: {', '.join(on) or 'nothing'}",
            *([f"not fused: {', '.join(off)}"] if off else []),
        ]
    )
