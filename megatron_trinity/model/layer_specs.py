"""Which module sits where in a Trinity layer.

Everything that differs between the portable modules and Transformer Engine's is in a backend,
a `megatron.core.models.backends.BackendSpecProvider`; `trinity_block_spec` is the same for both.
"""

from __future__ import annotations

from functools import partial

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
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
    layer = {
        0: _layer_spec(config, backend, _dense_mlp(backend)),
        1: _layer_spec(config, backend, _moe(config, backend)),
    }
    return TransformerBlockSubmodules(
        layer_specs=[layer[config.moe_layer_freq[i]] for i in _stage(config, vp_stage, pp_rank)],
        layer_norm=backend.layer_norm(rms_norm=True),
    )


def _layer_spec(
    config: TransformerConfig, backend: BackendSpecProvider, mlp: MlpBuilder
) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True)
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True)
    post_norm_add = ModuleSpec(module=PostNormAdd, params={"config": config, "norm": norm})
    return ModuleSpec(
        module=TrinityLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=post_norm_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=post_norm_add,
        ),
    )


def _mlp_submodules(backend: BackendSpecProvider) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(),
        linear_fc2=backend.row_parallel_linear(),
        activation_func=backend.activation_func(),
    )


def _dense_mlp(backend: BackendSpecProvider) -> MlpBuilder:
    return partial(MLP.as_mlp_submodule, submodules=_mlp_submodules(backend))


def _moe(config: TransformerConfig, backend: BackendSpecProvider) -> MlpBuilder:
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            router=TrinityRouter,
            experts=backend.grouped_mlp_modules(config.moe_grouped_gemm),
            shared_experts=partial(SharedExpertMLP, submodules=_mlp_submodules(backend)),
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
