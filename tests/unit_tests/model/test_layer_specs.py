"""What is on disk does not depend on which modules a layer is made of."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from megatron_trinity.checkpoint.hf.mapping import entries
from megatron_trinity.model.shards import model_shards, whole_tensors
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, load_whole_tensors, parse

TOKENS = torch.arange(40)[None] * 3


def fused_backend() -> Any:
    """As Transformer Engine's: a norm and the linear layer behind it are one module."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_trinity.model.layer_specs import PortableBackend

    class LayerNormLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            self.layer_norm_weight = nn.Parameter(torch.ones(input_size))
            self.eps = config.layernorm_epsilon

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
            normed = nn.functional.rms_norm(
                input_, input_.shape[-1:], self.layer_norm_weight, self.eps
            )
            return super().forward(normed, *args, **kwargs)

    class FusedBackend(PortableBackend):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type[LayerNormLinear]:
            return LayerNormLinear

    return FusedBackend()


def run_model(rank: int, world_size: int, fused: bool) -> tuple[Tensor, dict[str, Any], set[str]]:
    """Logits with random weights; canonical shapes; names of gains inside linear layers."""
    from megatron_trinity.model.layer_specs import PortableBackend

    backend = fused_backend() if fused else PortableBackend()
    with patch("megatron_trinity.model.builder._backend", lambda config: backend):
        model = build(parse(afmoe_config())).eval()
    generator = torch.Generator().manual_seed(4)
    tensors = whole_tensors(model)
    for key in sorted(tensors):
        tensors[key] += torch.randn(tensors[key].shape, generator=generator) / 16
    load_whole_tensors(model, tensors)
    gains = {name for name, _ in model.named_parameters() if name.endswith("layer_norm_weight")}
    with torch.no_grad():
        logits = model(TOKENS, torch.arange(TOKENS.shape[1])[None], None)
    return logits, {shard.key: shard.global_shape for shard in model_shards(model)}, gains


def test_a_fused_norm_is_saved_as_the_norm_itself(ranks: RankPools) -> None:
    [(logits, shapes, gains)] = ranks.run(run_model, True, world_size=1)
    [(expected, expected_shapes, no_gains)] = ranks.run(run_model, False, world_size=1)
    assert no_gains == set()
    assert gains == {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        *(f"decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight" for n in range(5)),
    }
    # The table of conversion, written by hand, is what both have to have on the disk.
    assert shapes == expected_shapes == {e.trinity: e.shape for e in entries(afmoe_config())}
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
