"""What cannot work, why, and what to do instead: one table, checked before anything is built."""

from __future__ import annotations

from argparse import Namespace

from megatron_trinity.arguments.checkpoints import CHECKPOINT_REFUSALS
from megatron_trinity.arguments.data import DATA_REFUSALS
from megatron_trinity.arguments.faults import FAULT_REFUSALS
from megatron_trinity.arguments.kernels import KERNEL_REFUSALS
from megatron_trinity.arguments.loss import LOSS_REFUSALS
from megatron_trinity.arguments.model import MODEL_REFUSALS
from megatron_trinity.arguments.monitoring import MONITORING_REFUSALS
from megatron_trinity.arguments.optimizer import OPTIMIZER_REFUSALS
from megatron_trinity.arguments.other_models import OTHER_MODEL_REFUSALS
from megatron_trinity.arguments.parallelism import PARALLELISM_REFUSALS
from megatron_trinity.arguments.precision import PRECISION_REFUSALS
from megatron_trinity.arguments.refusal import Refusal, refuse
from megatron_trinity.arguments.router import ROUTER_REFUSALS
from megatron_trinity.arguments.schedule import SCHEDULE_REFUSALS

REFUSALS: tuple[Refusal, ...] = (
    *MODEL_REFUSALS,
    *PARALLELISM_REFUSALS,
    *SCHEDULE_REFUSALS,
    *OPTIMIZER_REFUSALS,
    *CHECKPOINT_REFUSALS,
    *LOSS_REFUSALS,
    *DATA_REFUSALS,
    *ROUTER_REFUSALS,
    *MONITORING_REFUSALS,
    *FAULT_REFUSALS,
    *OTHER_MODEL_REFUSALS,
    *KERNEL_REFUSALS,
    *PRECISION_REFUSALS,
)


def validate(args: Namespace) -> None:
    """Refuse arguments that cannot work, before Megatron's own checks.

    Raises:
        UsageError: the first row of the table that applies.
    """
    refuse(args, REFUSALS)
