"""Trinity's configuration: megatron-core's, with what it has no field for."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import ClassVar

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
)
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_trinity.moe.balancing import SMEBU_DEFAULTS


@dataclass
class TrinityConfig(TransformerConfig):
    """`TransformerConfig` plus Trinity's own fields.

    Weights get their values from `megatron_trinity.model.initialization` after the model is built,
    so Megatron's own initialisation is always off.
    """

    mup_enabled: bool = True
    """Multiply token embeddings by sqrt(hidden_size) (report, eq. 39; the HF config's name)."""

    weight_init_seed: int = 1234
    """Seed of the initial weights; the same seed gives the same weights in every layout."""

    load_balancing: str = "sign"
    """How the expert bias follows the load: smebu, sign or none."""

    smebu_kappa: float = SMEBU_DEFAULTS[0]
    smebu_lambda: float = SMEBU_DEFAULTS[1]
    smebu_beta: float = SMEBU_DEFAULTS[2]

    seq_aux_loss_coeff: float = 0.0
    """alpha of the sequence-wise auxiliary loss (report, eq. 29)."""

    loss_chunk_size: int | None = None
    """Tokens whose logits are held at once, see `megatron_trinity.model.loss.token_losses`."""

    def __post_init__(self) -> None:
        self.perform_initialization = False
        super().__post_init__()


@dataclass(kw_only=True)
class TrinityModelConfig(GPTModelConfig):
    """What `TrinityModelBuilder` builds from: a `TrinityConfig` and the vocabulary."""

    builder: ClassVar[str] = "megatron_trinity.model.builder.TrinityModelBuilder"

    true_vocab_size: int | None = None
    """Tokens without the padding that makes `vocab_size` divide over ranks; None: no padding."""


def model_config_from_args(args: Namespace) -> TrinityModelConfig:
    """The model that parsed and validated arguments describe."""
    config = core_transformer_config_from_args(args, TrinityConfig)
    model_config: TrinityModelConfig = gpt_config_from_args(
        args, config=config, model_config_cls=TrinityModelConfig
    )
    model_config.true_vocab_size = args.vocab_size
    return model_config


def padded_vocab_size(args: Namespace) -> int:
    """Rows of embedding and LM head: the true vocabulary, padded to divide over tensor ranks."""
    size: int = calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    return size
