"""Checkpoints say whether they have the momentum of SMEBU."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-metadata",
    symbols=("megatron.training.checkpointing._build_sharded_state_dict_metadata",),
    reason=(
        "what a sharded state dict holds depends on the metadata of the checkpoint that is "
        "written or read; one without the momentum could not be loaded by a run that has it"
    ),
    written_for="megatron-core 0.19.2",
    remove_when=(
        "modules can add to the metadata of a checkpoint, or name tensors that may be missing"
    ),
)


MOMENTUM = "expert_bias_momentum"


def install() -> None:
    """Add one key to the metadata of every checkpoint that is written from now on."""
    from megatron.training import checkpointing

    original = checkpointing._build_sharded_state_dict_metadata

    @functools.wraps(original)
    def build_metadata(args: Namespace, *more: Any, **kwargs: Any) -> dict[str, Any]:
        has_momentum = args.load_balancing == "smebu"
        return {**original(args, *more, **kwargs), MOMENTUM: has_momentum}

    checkpointing._build_sharded_state_dict_metadata = build_metadata
