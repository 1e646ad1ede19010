"""Which module sits where in a Trinity layer.

Everything that differs between the portable modules and Transformer Engine's is in a backend, a
`megatron.core.models.backends.BackendSpecProvider`; `trinity_block_spec` is the same for both. So
are the names in a checkpoint: where a backend has a norm and the linear layer behind it in one
module, the gain is saved as if it were the norm's own.
"""

from __future__ import annotations

from functools import partial

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MlpBuilder,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_trinity.model.core_attention import PortableCoreAttention
from megatron_trinity.model.experts import EXPERT_SUBMODULES, GroupedExperts
from megatron_trinity.model.layer import TrinityLayer
from megatron_trinity.model.norm import PostNormAdd, TrinityRMSNorm
from megatron_trinity.moe.router import TrinityRouter

CANONICAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""In a layer: name of a fused norm's tensors, to that in a checkpoint."""


class PortableBackend(LocalSpecProvider):
    """Modules that need neither CUDA nor Transformer Engine."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type[TrinityRMSNorm]:
        return TrinityRMSNorm

    def core_attention(self) -> type[PortableCoreAttention]:
        return PortableCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial[GroupedExperts]:
        return partial(GroupedExperts, submodules=EXPERT_SUBMODULES)


def trinity_block_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers that one pipeline stage builds.

    Args:
        config: its `moe_layer_freq` holds a 1 for each MoE layer and a 0 for each dense one.
        backend: where norms, linears, attention and experts come from.
        vp_stage, pp_rank: the stage; `pp_rank` defaults to this process's.
    """
    norm = backend.layer_norm(rms_norm=True)
    before_dense = IdentityOp if backend.fuse_layernorm_and_linear() else norm
    layer = {
        0: _layer_spec(config, backend, _dense_mlp(backend), before_dense),
        1: _layer_spec(config, backend, _moe(config, backend), norm),
    }
    return TransformerBlockSubmodules(
        layer_specs=[layer[config.moe_layer_freq[i]] for i in _stage(config, vp_stage, pp_rank)],
        layer_norm=norm,
    )


def _layer_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    mlp: MlpBuilder,
    pre_mlp_layernorm: LayerNormBuilder,
) -> ModuleSpec:
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=True)
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True)
    post_norm_add = ModuleSpec(module=PostNormAdd, params={"config": config, "norm": norm})
    return ModuleSpec(
        module=TrinityLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_after_norm(backend),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=post_norm_add,
            pre_mlp_layernorm=pre_mlp_layernorm,
            mlp=mlp,
            mlp_bda=post_norm_add,
            sharded_state_dict_keys_map=CANONICAL_NAMES,
        ),
    )


def _after_norm(backend: BackendSpecProvider) -> type:
    """A column-parallel linear layer, with the norm in front of it where the backend fuses them."""
    fused = backend.column_parallel_layer_norm_linear()
    return (
        fused if fused and backend.fuse_layernorm_and_linear() else backend.column_parallel_linear()
    )


def _mlp_submodules(backend: BackendSpecProvider, linear_fc1: type) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=linear_fc1,
        linear_fc2=backend.row_parallel_linear(),
        activation_func=backend.activation_func(),
    )


def _dense_mlp(backend: BackendSpecProvider) -> MlpBuilder:
    return partial(MLP.as_mlp_submodule, submodules=_mlp_submodules(backend, _after_norm(backend)))


def _moe(config: TransformerConfig, backend: BackendSpecProvider) -> MlpBuilder:
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            router=TrinityRouter,
            experts=backend.grouped_mlp_modules(config.moe_grouped_gemm),
            shared_experts=partial(
                SharedExpertMLP,
                submodules=_mlp_submodules(backend, backend.column_parallel_linear()),
            ),
        ),
    )


def _stage(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """0-based numbers of the decoder layers that a pipeline stage holds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return list(
            layout.get_layer_id_list(
                layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
            )
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(
        range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    )
