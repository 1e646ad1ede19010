"""What a step takes of Transformer Engine and Apex where they are installed, in plain torch.

`CALLS` counts each, so that a test can tell that the step took it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step is counted in the group, as that of both libraries does."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        CALLS["adam"] += 1
        for group in self.param_groups:
            steps = group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                first, second = group["betas"]
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                mean = state["exp_avg"] / (1 - first**steps)
                root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean / (root + group["eps"]))


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, **layout: Any) -> Tensor:
    CALLS["rope"] += 1
    x, angle = t.float(), freqs[: t.shape[0]].float()
    a, b = x.chunk(2, -1)
    return (x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()).to(t.dtype)


def moe_permute(tokens: Tensor, routing_map: Tensor, **sizes: Any) -> tuple[Tensor, Tensor]:
    CALLS["permute"] += 1
    rows = torch.arange(tokens.shape[0]).expand(routing_map.shape[1], -1)
    index = rows.masked_select(routing_map.bool().T)
    return tokens.index_select(0, index), index


def moe_permute_with_probs(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, **sizes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    permuted, index = moe_permute(tokens, routing_map)
    return permuted, probs.T.masked_select(routing_map.bool().T), index


def moe_unpermute(
    tokens: Tensor, index: Tensor, merging_probs: Any = None, restore_shape: Any = None, **more: Any
) -> Tensor:
    CALLS["unpermute"] += 1
    assert merging_probs is None
    return tokens.new_zeros(restore_shape).index_add(0, index, tokens)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor | None]:
    CALLS["norm"] += 1
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else None


def multi_tensor_scale(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: float
) -> None:
    for source, target in zip(lists[0], lists[1], strict=True):
        target.copy_(source * factor)


def multi_tensor_applier(
    operation: Callable[..., Any], overflow: Tensor, lists: Any, *arguments: Any
) -> Any:
    return operation(2048 * 32, overflow, lists, *arguments)


def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
    CALLS["wgrad"] += 1
    main_grad.add_(gradient.T.float() @ inputs.float())


def get_cpu_offload_context(*arguments: Any, **more: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Of layers that keep what they save on the device."""
    return contextlib.nullcontext(), lambda tensor: tensor


class _SplitAlongDim:
    @staticmethod
    def apply(tensor: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        CALLS["split"] += 1
        return tensor.split(sizes, dim)


def general_gemm(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    layout: str,
    out: Tensor | None = None,
    accumulate: bool = False,
    **more: Any,
) -> tuple[Tensor, ...]:
    """By columns, as cuBLAS has it: of rows it is op(b) op(a). Both have one dtype."""
    CALLS["gemm"] += 1
    assert a.dtype == b.dtype
    left, right = (b.T if layout[1] == "T" else b), (a.T if layout[0] == "T" else a)
    result = left.to(out_dtype) @ right.to(out_dtype)
    if out is None:
        return (result,)
    return ((out.add_ if accumulate else out.copy_)(result),)


def moe_sort_chunks_by_index(tokens: Tensor, sizes: Tensor, index: Tensor) -> Tensor:
    CALLS["sort"] += 1
    chunks = tokens.split(sizes.flatten().tolist())
    return torch.cat([chunks[number] for number in index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    tokens: Tensor, probs: Tensor, sizes: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return moe_sort_chunks_by_index(tokens, sizes, index), moe_sort_chunks_by_index(
        probs, sizes, index
    )


def multi_tensor_scale_tensor(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: Tensor
) -> None:
    multi_tensor_scale(chunk, overflow, lists, float(factor))


def get_dummy_wgrad(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What is handed to autograd in the place of a gradient that has been added up already."""
    return torch.zeros(tuple(shape), dtype=dtype)
