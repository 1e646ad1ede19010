"""The entry point: arguments, model, data and Megatron's training loop, put together."""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.global_vars import get_tensorboard_writer, set_global_variables
from megatron.training.training import pretrain as megatron_pretrain
from megatron.training.utils import print_rank_0

from megatron_trinity.arguments.data import data_notes
from megatron_trinity.arguments.machine import machine_notes
from megatron_trinity.arguments.parse import parse_arguments
from megatron_trinity.arguments.stages import stage_notes
from megatron_trinity.data.datasets import dataset_provider
from megatron_trinity.data.run_data import run_data
from megatron_trinity.data.sources import check_data, check_manifests
from megatron_trinity.errors import StepError, UsageError
from megatron_trinity.model.config import model_config_from_args
from megatron_trinity.reporting.console import print_rows
from megatron_trinity.training.balance import announce_balance
from megatron_trinity.training.checkpoints import WholeCheckpoints
from megatron_trinity.training.data_given import note_data
from megatron_trinity.training.flops import StepFlops
from megatron_trinity.training.following import following
from megatron_trinity.training.forward_step import forward_step
from megatron_trinity.training.held_save import held_save
from megatron_trinity.training.journal import Journal
from megatron_trinity.training.launch_store import launch_store
from megatron_trinity.training.leaving import Leaving
from megatron_trinity.training.load_paths import goes_on_in_save
from megatron_trinity.training.micro_batches import MicroBatchRecord
from megatron_trinity.training.observer import StepObserver
from megatron_trinity.training.opening import opening
from megatron_trinity.training.optimizer import container_from_args, set_up_optimizer
from megatron_trinity.training.own_time import OwnTime
from megatron_trinity.training.profiles import check_profile
from megatron_trinity.training.progress_file import check_progress
from megatron_trinity.training.resume import check_checkpoint, start_of
from megatron_trinity.training.slow_ranks import SlowRanks
from megatron_trinity.training.spikes import SKIPPED, noted
from megatron_trinity.training.stop import Stop, stopping
from megatron_trinity.training.vocabulary import check_tokenizer_path, settle_vocabulary
from megatron_trinity.training.watch import Watch
from megatron_trinity.training.weights_and_biases import telling_wandb
from megatron_trinity.upstream.assertions import refusing
from megatron_trinity.upstream.checkpoint_hooks import set_checkpoint_hooks
from megatron_trinity.upstream.flops import set_flop_counter
from megatron_trinity.upstream.output import megatron_held_back, show_megatron
from megatron_trinity.upstream.training_hooks import set_training_hooks


def pretrain(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        TrinityError: what was asked for cannot work; in one line.
        Stopped: the run was told to stop, or another rank is gone.
        SystemExit: with code 0, behind `--exit-interval`.
    """
    with stopping() as stop:
        _pretrain(argv, stop)


def _pretrain(argv: Sequence[str] | None, stop: Stop) -> None:
    with megatron_held_back():
        args = parse_arguments(argv)
        show_megatron(args)
        stop.within = args.exit_within
        stop.also(args.exit_signal)
        check_launch()
        journal = Journal(args, argv)
        with journal.kept():
            _train(args, stop, journal)


def _train(args: Namespace, stop: Stop, journal: Journal) -> None:
    for note in (*machine_notes(args), *data_notes(args)):
        print_rank_0(note)
    for note in stage_notes(args):
        print_rank_0(f"WARNING: {note}")
    described = check_data(args)
    check_tokenizer_path(args)
    with telling_wandb(args), refusing("the run cannot be set up"):
        set_global_variables(args)
    settle_vocabulary(args)
    check_manifests(args, described)
    data = run_data(args, described)
    note_data(args, data)
    store = launch_store(args.distributed_timeout_minutes)
    with following(stop, store), held_save(args, store) as held, finished_saves():
        checked = check_checkpoint(args)
        start = start_of(args, checked)
        check_profile(args, start)
        check_progress(args)
        leave_out_noted(args)
        if args.rank == 0:
            print_rows("Trinity", opening(args, data, start))
        record, flops = MicroBatchRecord(), StepFlops(args)
        set_flop_counter(flops)
        leaving, watch, slow = Leaving(args, stop), Watch(args, store), SlowRanks(args)
        observer = StepObserver(args, record, flops, held, data, leaving, watch, slow, journal)
        set_training_hooks(observer)
        set_checkpoint_hooks(WholeCheckpoints(args, checked, held, data))
        set_up_optimizer(args)
        with refusing("the model cannot be configured"):
            model_config = model_config_from_args(args)
        # An evaluation alone is behind the iteration that was loaded; training counts on by itself.
        args.curr_iteration = start - 1
        model_config.pre_wrap_hooks.append(partial(announce_balance, args))
        step = partial(forward_step, record=record, flops=flops)
        with written_scalars(), watch.watching(), leaving.with_its_code(), slow.own.until_the_end():
            megatron_pretrain(
                container_from_args(args, model_config),
                without_interruption(dataset_provider(data), stop),
                ModelType.encoder_or_decoder,
                timing_reading(step, slow.own) if args.straggler_interval else step,
                store=store,
            )


def leave_out_noted(args: Namespace) -> None:
    """Skip the steps whose data has led to a spike, as the run that met it has noted."""
    steps = noted(Path(args.save)) if args.save and goes_on_in_save(args) else []
    if steps:
        args.iterations_to_skip = sorted({*args.iterations_to_skip, *steps})
        print_rank_0(f"> the data of {len(steps)} iterations is left out, see {SKIPPED}: {steps}")


def without_interruption[**P, T](function: Callable[P, T], stop: Stop) -> Callable[P, T]:
    """`function`, which writes index files that a later start would read: it finishes them."""

    @functools.wraps(function)
    def finished(*args: P.args, **kwargs: P.kwargs) -> T:
        with stop.deferred():
            return function(*args, **kwargs)

    return finished


def timing_reading(step: Callable[..., Any], own: OwnTime) -> Callable[..., Any]:
    """`step`, whose samples count as read in the own time of a rank."""

    def timed(data_iterator: Any, *args: Any) -> Any:
        return step(own.reading(data_iterator), *args)

    return timed


@contextmanager
def written_scalars() -> Iterator[None]:
    """Write to the end what TensorBoard is given: the thread that does it dies with the process."""
    try:
        yield
    finally:
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.flush()


@contextmanager
def finished_saves() -> Iterator[None]:
    """Finish the save in the background where a step ends the run: it is of one before it."""
    try:
        yield
    except StepError:  # on every rank
        maybe_finalize_async_save(blocking=True, terminate=True)
        raise


def check_launch() -> None:
    """Refuse to start without a launcher, which tells every rank where the others are.

    Raises:
        UsageError: the launcher's environment variables are missing.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise UsageError(
            f"{missing[0]} is not set; start with torchrun --nproc-per-node N pretrain_trinity.py"
        )
