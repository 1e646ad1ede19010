"""Behind every optimizer step: balance the experts, and say what is worth knowing of the step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_last
from torch import Tensor

from megatron_trinity.checkpoint.whole.hold import Hold
from megatron_trinity.data.run_data import RunData
from megatron_trinity.errors import TrinityError
from megatron_trinity.moe.metrics import LoadMetrics, by_layer, load_metrics, summary
from megatron_trinity.reporting.console import StepValues
from megatron_trinity.reporting.events import alarm, note
from megatron_trinity.reporting.names import MEMORY, THROUGHPUT
from megatron_trinity.training.alarm import Alarms
from megatron_trinity.training.balance import (
    StepBalance,
    balance_experts,
    forget_counts,
    moe_layers,
)
from megatron_trinity.training.data_given import (
    data_line,
    evaluation_line,
    evaluation_values,
    scalars,
)
from megatron_trinity.training.flops import StepFlops
from megatron_trinity.training.host import on_host
from megatron_trinity.training.journal import Journal
from megatron_trinity.training.leaving import Leaving
from megatron_trinity.training.metrics import StepMetrics, tokens_per_step
from megatron_trinity.training.micro_batches import MicroBatchRecord, step_values
from megatron_trinity.training.planned import PlanCheck
from megatron_trinity.training.slow_ranks import SlowRanks, ranks_line
from megatron_trinity.training.slow_ranks import event as event_of_ranks
from megatron_trinity.training.slow_ranks import scalars as scalars_of_ranks
from megatron_trinity.training.spikes import LOSS, NORM, Spikes
from megatron_trinity.training.step_guard import StepGuard
from megatron_trinity.training.watch import Watch
from megatron_trinity.upstream.training_hooks import StepOutcome
from megatron_trinity.upstream.validation_samples import EvaluatedSet


class StepObserver:
    """The trainer's `TrainingHooks`.

    What is known of a step goes into the journal, TensorBoard and W&B. With `--verbose-log` speed,
    memory and losses go into Megatron's own log line as well. That line leaves out what is
    negative, so the values that watch balance and stability have a line of their own beneath it,
    averaged over the same steps.
    """

    def __init__(
        self,
        args: Namespace,
        record: MicroBatchRecord,
        flops: StepFlops,
        held: Hold | None = None,
        data: RunData | None = None,
        leaving: Leaving | None = None,
        watch: Watch | None = None,
        slow: SlowRanks | None = None,
        journal: Journal | None = None,
    ) -> None:
        """`record` is what the loss function writes to, `flops` what the loop asks.

        `held` is `--save` on rank 0: a run that has lost it ends with the next step. `data` is what
        the run reads. `leaving` hears behind each step whether a rank was told to stop; `watch` is
        told of each step, `journal` of all that is known of it; `slow` measures steps.
        """
        self._journal = journal
        self._layers = moe_layers(args)
        self._leaving, self._watch = leaving, watch
        self._slow = slow or SlowRanks(args)
        self._held = held
        self._data = data
        self._args = args
        self._record = record
        self._flops = flops
        self._guard = StepGuard(args)
        self._spikes = Spikes(args)
        self._speed = StepMetrics(flops_per_gpu=lambda: flops.newest / args.world_size)
        self._speeds: dict[str, float] = {}
        self._alarms = Alarms(args.alarm_window)
        self._plan = PlanCheck(args)
        self._losses: dict[str, float] = {}
        self._sequence_loss: dict[str, float] = {}
        self._interval: list[Mapping[str, float]] = []
        self._rates: Mapping[str, float] = {}
        self._all_rates: Mapping[str, float] = {}
        self._applied = False
        self._balance: tuple[LoadMetrics, Tensor, Tensor] | None = None
        self._step: dict[str, float] = {}

    def step_begins(self, optimizer: Any) -> None:
        """Tell those who watch."""
        self._spikes.begins(optimizer)
        if self._leaving is not None:
            self._leaving.step_begins()
        if self._watch is not None:
            self._watch.step_begins(self._iteration)
        if self._journal is not None and self._journal.iteration is None:
            self._journal.begins(self._iteration - 1, self._layers)
        self._slow.step_begins(self._iteration)

    def gradients_ready(self, optimizer: Any) -> None:
        """Have a step left out whose loss is a spike, for which the host waits."""
        self._slow.own.part_ends()
        if self._spikes.leaves_out:
            self._spikes.loss_known(optimizer, self._record.loss().item())

    def step_restarted(self, model: Sequence[Any]) -> None:
        """Forget what the first try has counted."""
        self._forget(model)
        self._slow.own.forget()
        self._guard.restarted(model)

    def step_ended(self, model: Sequence[Any], optimizer: Any, outcome: StepOutcome) -> None:
        """Balance the experts, gather, write, and watch; of a step that is left out, nothing.

        Raises:
            StepError: the step was not applied for what it computed, and ends the run.
            TrinityError: another run has taken over `--save`.
        """
        self._slow.own.part_ends()
        if self._held is not None:
            self._held.check(look=False)
        if self._watch is not None:
            self._watch.step_ends()
        self._rates = other_rates(optimizer.param_groups)
        self._all_rates = rates_by_optimizer(optimizer.param_groups)
        self._losses, self._balance, self._step = {}, None, {}
        self._applied = outcome.applied
        if self._guard.drops(model, outcome):
            self._forget(model)
            self._slow.own.forget()
            return
        layers = self._layers
        told = None if self._leaving is None else self._leaving.told()
        balance = balance_experts(model, layers, self._args.num_experts, outcome.applied, told)
        metrics, values = self._read(balance, outcome)
        self._tell_ranks()
        if self._args.spike_factor and outcome.norm is not None:
            loss = self._spikes.loss(self._losses.get(LOSS))
            judged = {LOSS: loss, NORM: float(outcome.norm)}
            self._spikes.ends(self._iteration, judged, outcome.applied)
        by_number = by_layer(metrics, layers)
        values |= summary(metrics)
        self._step = values
        self._interval.append(values)
        self._write({**values, **by_number, **self._rates})
        watched = {name: v for name, v in by_number.items() if name.startswith("max violation")}
        watched |= {name: v for name, v in values.items() if name == "max logit"}
        self._plan.step_ended(model, optimizer)
        for warning in self._alarms.update(self._iteration, watched):
            print_rank_last(f"WARNING: {warning}")
            alarm("climb", warning, self._iteration)

    def values(self) -> Mapping[str, float]:
        """What goes into Megatron's line; the losses too, which have been read already."""
        self._speeds = self._speed.step_ended()
        logged = dict(self._speeds)
        if not self._args.log_throughput:
            logged.pop(THROUGHPUT)
        return {**self._losses, **self._sequence_loss, **logged}

    def log_written(self, logged: Mapping[str, float]) -> None:
        """Tell of the step, and write the line beneath Megatron's, where it has written one."""
        if self._journal is not None:
            self._tell(self._journal, logged)
        self._speed.log_written()
        if self._interval and self._iteration % self._args.log_interval == 0:
            if self._args.verbose_log:
                print_rank_last(balance_line(self._iteration, self._interval, self._rates))
            self._interval.clear()
            self._tell_data()

    def saved(self, iteration: int, seconds: float) -> None:
        """Tell of a save."""
        if self._journal is not None:
            self._journal.saved(iteration, seconds)

    def ends_evaluation(self) -> bool:
        """Behind a batch of an evaluation: whether the run leaves, and this one with it."""
        if self._watch is not None:
            self._watch.alive()
        return self._leaving is not None and self._leaving.ask()

    def leaves(self, iteration: int, saved: bool, save: Callable[[], None]) -> bool:
        """Whether the run leaves behind this step; it has saved then."""
        return self._leaving is not None and self._leaving.leaves(iteration, saved, save)

    def evaluated(self, losses: Mapping[str, Tensor], of_set: EvaluatedSet, seconds: float) -> None:
        """Say what the loss means a token and a byte; refuse one that says nothing.

        Raises:
            TrinityError: a loss is not a number.
        """
        for name, value in losses.items():
            if value.isnan():
                raise TrinityError(
                    f"the {name} of the evaluation is not a number: no token of its samples "
                    "carries a loss (documents of one token, or masked as a whole?), or what the "
                    "model computes is not finite"
                )

        told = {name: float(value) for name, value in losses.items()}
        if self._data is not None and "lm loss" in losses:
            ratio = self._data.bytes_per_token(of_set.name, of_set.of_test)
            values = evaluation_values(told["lm loss"], ratio)
            if self._args.verbose_log:
                print_rank_last(evaluation_line(of_set.name, values))
            suffix = f"-{of_set.name}" if of_set.name else ""
            self._write({f"{name} validation{suffix}": v for name, v in values.items()})
            told |= values
        if self._journal is not None and told:
            self._journal.evaluated(of_set.name, of_set.of_test, seconds, told)

    def _tell(self, journal: Journal, logged: Mapping[str, float]) -> None:
        speed = self._speeds
        seconds = self._speed.seconds
        violation = None
        metrics, loads = None, None
        if self._balance is not None:
            metrics, *loads = self._balance
            if self._layers:
                worst = int(metrics.max_violation.argmax())
                violation = (float(metrics.max_violation[worst]), self._layers[worst])
        journal.step(
            StepValues(
                iteration=self._iteration,
                seconds=seconds,
                tokens=tokens_per_step(),
                loss=self._losses.get(LOSS) if self._applied else None,
                norm=logged.get("grad-norm"),
                rates=self._all_rates,
                tflops=speed[THROUGHPUT],
                memory=speed[MEMORY],
                violation=violation,
            ),
            {**logged, **self._losses, **self._sequence_loss, **speed, **self._rates, **self._step},
            self._applied,
            self._layers,
            metrics,
            None if loads is None else (loads[0], loads[1]),
        )

    def _tell_data(self) -> None:
        """Write what each source has given, beneath the line of balance."""
        if self._data is None or self._data.plan is None:
            return
        given = self._data.plan.given(self._args.consumed_train_samples)
        if self._args.verbose_log:
            print_rank_last(data_line(self._iteration, given))
        if self._journal is not None:
            self._journal.data(self._iteration, given)
        self._write(scalars(given))

    def _tell_ranks(self) -> None:
        """Name the slowest rank, where ranks are compared behind this step."""
        times = self._slow.step_read(self._iteration)
        if times is not None:
            print_rank_last(ranks_line(times))
            note(event_of_ranks(times))
            self._write(scalars_of_ranks(times), always=True)

    def _forget(self, model: Sequence[Any]) -> None:
        forget_counts(model)
        self._record.clear()
        self._flops.clear()

    @property
    def _iteration(self) -> int:
        """Number of the step that is under way, or has just ended, from 1."""
        return int(self._args.curr_iteration) + 1

    def _read(
        self, balance: StepBalance, outcome: StepOutcome
    ) -> tuple[LoadMetrics, dict[str, float]]:
        """All that the host has to know of the step, for which it waits once."""
        rows = self._record.gathered()
        lost = (balance.sequence_losses,) if self._args.seq_aux_loss_coeff else ()
        counts, bias, *read = on_host(
            [
                balance.counts,
                balance.bias,
                *(() if balance.told is None else (balance.told,)),
                *outcome.losses.values(),
                *(() if rows is None else (rows,)),
                *lost,
            ]
        )
        if self._leaving is not None:
            self._leaving.heard(read.pop(0).tolist())
        metrics = load_metrics(counts, bias)
        self._balance = metrics, counts, bias
        losses = zip(outcome.losses, read, strict=False)
        self._losses = {name: float(value) for name, value in losses}
        if self._args.seq_aux_loss_coeff:
            total = self._args.seq_aux_loss_coeff * float(read.pop().sum())
            self._sequence_loss = {"sequence loss": total / get_current_global_batch_size()}
        values = {} if rows is None else step_values(read[-1])
        return metrics, values

    def _write(self, values: Mapping[str, float], always: bool = False) -> None:
        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
        due = always or self._iteration % self._args.tensorboard_log_interval == 0
        if tensorboard and due:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, self._iteration)
        if wandb:
            wandb.log(dict(values), self._iteration)


def other_rates(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Learning rates by optimizer, but for the one that is in Megatron's line."""
    return {
        f"{group['kind']} learning rate": float(group["lr"])
        for group in param_groups
        if "kind" in group and not group["default_config"]
    }


def rates_by_optimizer(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All of them, that in Megatron's line first."""
    ordered = sorted(param_groups, key=lambda group: not group["default_config"])
    return {str(group.get("kind", "adam")): float(group["lr"]) for group in ordered}


def balance_line(
    iteration: int,
    steps: Sequence[Mapping[str, float]],
    newest: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """One line with the mean of each value over those of `steps` that have it, then `newest`."""
    by_name: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.items():
            by_name.setdefault(name, []).append(value)
    values = {name: fmean(of_name) for name, of_name in by_name.items()} | dict(newest)
    fields = " | ".join(f"{name}: {value:.4g}" for name, value in values.items())
    return f" balance   {iteration:8d} | {fields} |"
