"""Messages that a user cannot act on, named one by one.

Each filter below names one message; anything else is shown.
"""

from __future__ import annotations

import logging
import re
import warnings

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="quiet",
    symbols=("warnings.filterwarnings",),
    reason=(
        "megatron-core warns at import about optional packages that this project does without "
        "on purpose, and torch about calls inside megatron-core"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="the messages are no longer printed",
)


# Optional packages are the user's choice of installation, not news at each start of each rank.
_ABSENT_PACKAGES = (
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "Transformer Engine and Apex are not installed. Falling back to local implementations of "
    "multi_tensor_applier and multi_tensor_scale",
    "Transformer Engine and Apex are not installed. Falling back to local implementations of "
    "multi_tensor_applier, multi_tensor_l2norm, and multi_tensor_scale",
    "Transformer Engine and Apex are not installed. Falling back to local implementations of "
    "multi_tensor_applier and multi_tensor_l2norm",
    "Apex is not installed. Falling back to Torch Norm",
    "MimoModelConfig is experimental and still under active development. The API may change "
    "without notice in future releases.",
    "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0. Use local "
    "linear implementation instead.",
)
# Calls inside megatron-core that torch or megatron-core itself comments on.
_INSIDE_MEGATRON = (
    "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory "
    "won't be used.",
    "Could not determine rank from torch.distributed, RANK, or SLURM_PROCID. Defaulting to rank 0.",
    "`torch.distributed.all_gather_into_tensor` is deprecated. Please use "
    "`torch.distributed.all_gather_single` instead.",
    "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use "
    "`torch.distributed.reduce_scatter_single` instead.",
    "Please use DTensor instead and we are deprecating ShardedTensor.",
    "The argument order of load has been changed. Please check the document to avoid future "
    "breakages.",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load "
    "in a single process.",
    "\n        It is recommended to use a ModelConfig",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
)
# Beginnings of log lines, by logger: news about modes of megatron-core and plans of its authors.
_LOGGED: dict[str, tuple[str, ...]] = {
    "megatron.core.dist_checkpointing.strategies.torch": (
        "MCore's async save is deprecated and will be removed in the future releases.",
    ),
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED.",),
    "megatron.core.rerun_state_machine": (
        # What `rejected-steps` does in place of that is said in a line of its own.
        "Exiting now.",
        "RerunStateMachine initialized in mode RerunMode.",
        "Result validation enabled",
        "Saving a checkpoint and exiting now.",
        "Setting RerunStateMachine mode RerunMode.",
    ),
    "torch.utils.cpp_extension": ("No CUDA runtime is found, using CUDA_HOME=",),
}


class _Without(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is to be shown."""
        return not record.getMessage().startswith(self._beginnings)


def install() -> None:
    """Add the filters to `warnings` and to the loggers."""
    for message in (*_ABSENT_PACKAGES, *_INSIDE_MEGATRON):
        warnings.filterwarnings("ignore", message=re.escape(message))
    for logger, beginnings in _LOGGED.items():
        logging.getLogger(logger).addFilter(_Without(beginnings))
