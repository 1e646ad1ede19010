"""The machine that a command line is for: what is set on it ahead of its start, and told."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from itertools import groupby

import torch

from megatron_trinity.arguments.environment import ORDERED_QUEUES, Setting, missing, settings
from megatron_trinity.arguments.installed import chosen
from megatron_trinity.arguments.precision import precision_notes
from megatron_trinity.upstream.installed import find_installed


def prepare_machine(args: Namespace) -> None:
    """Set the environment variables that arguments ask for, where they are not set.

    Raises:
        UsageError: one of them is set otherwise.
    """
    given = dict(os.environ)
    if torch.cuda.is_available() and _is_split(args):
        # Ahead of the question for what it depends on, since that starts CUDA, which reads it.
        os.environ.setdefault(ORDERED_QUEUES.name, ORDERED_QUEUES.value)
    variables = missing(_settings(args), given)
    if ORDERED_QUEUES.name not in given | variables:
        os.environ.pop(ORDERED_QUEUES.name, None)
    os.environ.update(variables)


def machine_notes(args: Namespace) -> Iterator[str]:
    """What the run starts with on a GPU, and why."""
    if torch.cuda.is_available():
        yield chosen(args, find_installed())
        for why, wanted in groupby(_settings(args), lambda setting: setting.why):
            values = " ".join(f"{setting.name}={os.environ[setting.name]}" for setting in wanted)
            yield f"environment: {values}, for {why}"
    yield from precision_notes(args)


def _settings(args: Namespace) -> tuple[Setting, ...]:
    ask = torch.cuda.is_available() and _is_split(args)
    return settings(args, torch.cuda.get_device_capability()[0] if ask else None)


def _is_split(args: Namespace) -> bool:
    return bool(args.tensor_model_parallel_size * args.context_parallel_size > 1)
