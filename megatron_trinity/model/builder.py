"""Builds a Trinity model, whole or one pipeline stage of it, from a `TrinityModelConfig`."""

from __future__ import annotations

from importlib.util import find_spec

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder

from megatron_trinity.errors import UsageError
from megatron_trinity.model.config import TrinityConfig
from megatron_trinity.model.initialization import initialize_weights
from megatron_trinity.model.layer_specs import PortableBackend, trinity_block_spec
from megatron_trinity.model.model import TrinityModel


class TrinityModelBuilder(GPTModelBuilder):
    """Megatron's model builder for Trinity; `build_distributed_models` is inherited."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> TrinityModel:
        """Build one stage, with its initial weights unless it is built on the meta device.

        Args:
            pg_collection: this process's groups.
            pre_process, post_process: whether the stage has the embedding and the LM head; by
                default as its place in the pipeline says.
            vp_stage: number of the virtual stage, if there are any.
        """
        model_config = self._model_config
        config = model_config.transformer
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_pp_first_stage(pg_collection.pp) and is_vp_first_stage(
                vp_stage, vp_size
            )
        if post_process is None:
            post_process = is_pp_last_stage(pg_collection.pp) and is_vp_last_stage(
                vp_stage, vp_size
            )
        model = TrinityModel(
            config=config,
            transformer_layer_spec=trinity_block_spec(
                config, _backend(config), vp_stage, pg_collection.pp.rank()
            ),
            vocab_size=model_config.vocab_size,
            true_vocab_size=model_config.true_vocab_size,
            max_sequence_length=model_config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=model_config.parallel_output,
            share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        initialize_weights(model, sigma=config.init_method_std, seed=config.weight_init_seed)
        return model


def _backend(config: TrinityConfig) -> BackendSpecProvider:
    """The one place where the portable modules and Transformer Engine's part ways."""
    if config.transformer_impl == "local":
        return PortableBackend()
    if config.transformer_impl == "transformer_engine":
        if find_spec("transformer_engine") is None:
            raise UsageError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; "
                "install it (docs/transformer_engine.md), or use --transformer-impl local"
            )
        # Only here: importing it takes seconds, and without Transformer Engine it is of no use.
        from megatron_trinity.model.te_backend import TransformerEngineBackend

        return TransformerEngineBackend()
    raise UsageError(
        f"--transformer-impl {config.transformer_impl} has no Trinity layer spec; "
        "use --transformer-impl local or transformer_engine"
    )
