"""What the layers of a bf16 model keep in fp32 for the backward pass, as on a GPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from tests.distributed.pool import RankPools
from tests.gpu_forms import as_if_compiled, as_if_kernel
from tests.trinity import afmoe_config, build, parse

LENGTH, BATCH = 32, 2
HIDDEN, HEADS, HEAD_DIM, EXPERTS, LAYERS, DENSE = 64, 4, 32, 8, 5, 1


def kept_in_fp32(rank: int, world_size: int) -> dict[tuple[int, ...], int]:
    """Shapes of what is kept and is no parameter, and how many there are of each."""
    model = build(parse(afmoe_config(head_dim=HEAD_DIM), ("--bf16",))).bfloat16()
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if tensor.dtype == torch.float32 and storage not in parameters:
            kept[storage] = tensor
        return tensor

    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    with (
        as_if_compiled(),
        as_if_kernel() as products,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(tokens, positions, None, labels=tokens)
    assert products.call_count == 2 * (LAYERS - DENSE)
    return dict(Counter(tuple(tensor.shape) for tensor in kept.values()))


def test_no_hidden_states_are_kept_in_fp32(ranks: RankPools) -> None:
    [kept] = ranks.run(kept_in_fp32, world_size=1)
    tokens = LENGTH * BATCH
    a_number_or_few_a_token = 4
    large = {
        shape for shape in kept if torch.Size(shape).numel() > a_number_or_few_a_token * tokens
    }
    assert large == {
        # The output gate's sigmoid, Megatron's, which is compiled on a GPU and then not kept.
        (LENGTH, BATCH, HEADS * HEAD_DIM),
        (tokens, EXPERTS),  # the scores of the router
    }
    assert kept[LENGTH, BATCH, HEADS * HEAD_DIM] == LAYERS
    assert kept[tokens, EXPERTS] == LAYERS - DENSE
    assert kept[LENGTH, BATCH, 1] >= 4 * LAYERS  # of the norms, a factor a token
