"""The parameters of a rank, from arguments alone: which there are, in their order, how large.

Shapes: h hidden size, d head_dim, n query heads, g query groups, f width of a dense MLP, e of an
expert, v padded vocabulary; over tensor-parallel ranks t, of experts u.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_trinity.optimizer.layout import OWN_BUFFERS
from megatron_trinity.optimizer.param_groups import RULES
from megatron_trinity.planning.sizes import LayerKind, ModelSizes
from megatron_trinity.planning.stages import Chunk


@dataclass(frozen=True)
class RankParameter:
    """Attributes:
    group: its optimizer group, see `param_groups.RULES`.
    shape: of this rank's part.
    routed: whether the ranks that hold it are the experts' data-parallel group.
    """

    group: str
    shape: tuple[int, ...]
    routed: bool = False

    @property
    def numel(self) -> int:
        rows, *columns = self.shape
        return rows * (columns[0] if columns else 1)


def chunk_parameters(args: Namespace, chunk: Chunk) -> list[RankParameter]:
    """Of one chunk on any rank of its stage, in the order of the model."""
    sizes, h = ModelSizes.from_args(args), args.hidden_size
    rows = args.padded_vocab_size // args.tensor_model_parallel_size
    found = [RankParameter("embedding", (rows, h))] if chunk.has_embedding else []
    for kind in chunk.kinds:
        found += _layer(args, sizes, kind)
    if chunk.has_lm_head:
        found += [RankParameter("gains", (h,)), RankParameter("output", (rows, h))]
    return found


def counted_parameters(args: Namespace, chunk: Chunk) -> Counter[RankParameter]:
    """The same without their order: how many there are of each."""
    found = Counter(chunk_parameters(args, replace(chunk, layers=())))
    sizes = ModelSizes.from_args(args)
    for kind, number in Counter(kind.is_moe for kind in chunk.kinds).items():
        layer = Counter(_layer(args, sizes, LayerKind(is_global=False, is_moe=kind)))
        for parameter, times in layer.items():
            found[parameter] += number * times
    return found


def _layer(args: Namespace, sizes: ModelSizes, kind: LayerKind) -> Iterator[RankParameter]:
    h, d, tensor = sizes.hidden_size, sizes.head_dim, args.tensor_model_parallel_size
    heads = 2 * sizes.num_attention_heads + 2 * sizes.num_query_groups  # with the gate's
    gain = RankParameter("gains", (h,))
    yield gain
    yield RankParameter("attention", (h, sizes.num_attention_heads * d // tensor))
    yield RankParameter("attention", (heads * d // tensor, h))
    yield from (RankParameter("gains", (d,)),) * 2
    yield from (gain, gain)
    if kind.is_moe:
        yield from _experts(args, sizes)
    else:
        yield from _swiglu("dense", h, sizes.ffn_hidden_size // tensor)
    yield gain


def _experts(args: Namespace, sizes: ModelSizes) -> Iterator[RankParameter]:
    h, tensor = sizes.hidden_size, args.tensor_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size
    yield RankParameter("router", (sizes.num_experts, h))
    own = sizes.num_experts // args.expert_model_parallel_size
    routed = args.expert_model_parallel_size > 1 or expert_tensor != tensor
    expert = list(_swiglu("experts", h, sizes.moe_ffn_hidden_size // expert_tensor, routed))
    if args.transformer_impl == "transformer_engine":  # all first products, then all second ones
        yield from (part for part in expert for _ in range(own))
    else:
        yield from expert * own
    if sizes.num_shared_experts:
        shared = sizes.num_shared_experts * sizes.moe_ffn_hidden_size
        yield from _swiglu("dense", h, shared // tensor)


def _swiglu(group: str, h: int, width: int, routed: bool = False) -> Iterator[RankParameter]:
    yield RankParameter(group, (2 * width, h), routed)
    yield RankParameter(group, (h, width), routed)


def optimizer_kinds(args: Namespace) -> dict[str, str]:
    """Optimizer group to `muon` or `adamw`; with `--optimizer adam` all are the latter."""
    if args.optimizer != "muon":
        return {rule.name: "adamw" for rule in RULES}
    return {rule.name: rule.kind or args.router_optimizer for rule in RULES}


def matrix_width(args: Namespace, parameter: RankParameter) -> int:
    """The size beside h of the largest matrix that Muon finds in a parameter, over all ranks."""
    if parameter.group == "dense":  # of a dense layer or of shared experts
        rows, columns = parameter.shape
        width = rows // 2 if columns == args.hidden_size else columns
        return int(width * args.tensor_model_parallel_size)
    widths = {
        "attention": args.num_attention_heads * args.kv_channels,
        "experts": args.moe_ffn_hidden_size,
        "router": args.num_experts,
    }
    return int(widths[parameter.group])


def meta_parameters(args: Namespace, parameters: list[RankParameter]) -> list[Any]:
    """The same as torch has them, on the meta device, with the marks that buffers go by.

    Gains stay fp32.
    """
    import torch

    dtype, kinds = model_dtype(args), optimizer_kinds(args)
    found = []
    for parameter in parameters:
        of = torch.float32 if parameter.group == "gains" else dtype
        tensor = torch.nn.Parameter(torch.empty(parameter.shape, dtype=of, device="meta"))
        setattr(tensor, "allreduce", not parameter.routed)
        setattr(tensor, OWN_BUFFERS, kinds[parameter.group] == "muon")
        found.append(tensor)
    return found


def model_dtype(args: Namespace) -> Any:
    """Of all weights but gains."""
    import torch

    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32
