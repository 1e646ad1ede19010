"""The machine that a command line is for: what is set on it ahead of its start, and told."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from itertools import groupby

import torch

from megatron_trinity.arguments.environment import Setting, missing, settings
from megatron_trinity.arguments.installed import chosen
from megatron_trinity.upstream.installed import find_installed


def prepare_machine(args: Namespace) -> None:
    """Set the environment variables that arguments ask for, where they are not set.

    Raises:
        UsageError: one of them is set otherwise.
    """
    os.environ.update(missing(_settings(args), os.environ))


def machine_notes(args: Namespace) -> Iterator[str]:
    """What the run starts with on a GPU, and why."""
    if torch.cuda.is_available():
        yield chosen(args, find_installed())
        for why, wanted in groupby(_settings(args), lambda setting: setting.why):
            values = " ".join(f"{setting.name}={os.environ[setting.name]}" for setting in wanted)
            yield f"environment: {values}, for {why}"


def _settings(args: Namespace) -> tuple[Setting, ...]:
    split = args.tensor_model_parallel_size * args.context_parallel_size > 1
    # Not asked where nobody needs to know, since it makes torch start CUDA.
    capability = (
        torch.cuda.get_device_capability()[0] if split and torch.cuda.is_available() else None
    )
    return settings(args, capability)
