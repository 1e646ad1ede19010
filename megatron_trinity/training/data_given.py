"""What each source of data has given so far, and what an evaluation says, in the log."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.training.utils import print_rank_0

from megatron_trinity.data.plan import Given, Plan
from megatron_trinity.data.run_data import RunData

SHOWN = 8
"""Sources in a line of the log; those that have given most."""

WRITTEN = 64
"""Sources with curves of their own."""


def note_data(args: Namespace, data: RunData | None) -> None:
    """Let a checkpoint keep with its arguments what decides the order, and say what to know.

    `args.padded_rows` says whether rows of the training data may end in padding.
    """
    args.padded_rows = data is not None and data.plan is not None and data.plan.padded
    if data is None or data.plan is None:
        return
    args.data_fingerprint = data.fingerprint
    for note in data.plan.notes():
        print_rank_0(f"WARNING: {note}")


def given_values(plan: Plan, samples: int) -> dict[str, dict[str, Any]]:
    """What each source has given to the first `samples` of the run, as a checkpoint keeps it."""
    return {
        one.name: {"tokens": one.tokens, "documents": one.documents, "epochs": one.epochs}
        for one in plan.given(samples)
    }


def data_line(iteration: int, given: Sequence[Given]) -> str:
    """One line with the sources that have given most."""
    most = sorted(given, key=lambda one: -one.tokens)
    fields = [
        f"{one.name}: {one.tokens} tokens, {one.documents} documents, {one.epochs:.4g} epochs"
        for one in most[:SHOWN]
    ]
    if len(most) > SHOWN:
        rest = sum(one.tokens for one in most[SHOWN:])
        fields.append(f"{len(most) - SHOWN} more: {rest} tokens")
    return f" data      {iteration:8d} | {' | '.join(fields)} |"


def scalars(given: Sequence[Given]) -> dict[str, float]:
    """Curves of the first sources, by name."""
    values: dict[str, float] = {}
    for one in given[:WRITTEN]:
        values[f"data tokens {one.name}"] = one.tokens
        values[f"data documents {one.name}"] = one.documents
        values[f"data epochs {one.name}"] = one.epochs
    return values


def evaluation_values(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Perplexity a token of a loss in nats, and bits a byte where it is known what a token is."""
    values = {"perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        values["bits per byte"] = loss / math.log(2) / bytes_per_token
    return values


def evaluation_line(of_set: str, values: Mapping[str, float]) -> str:
    """One line above Megatron's with the loss."""
    fields = [f"{name}: {value:.6g}" for name, value in values.items()]
    if "bits per byte" not in values:
        fields.append("bits per byte: unknown, since no manifest counts the bytes")
    return f" evaluated {of_set or 'data'} | {' | '.join(fields)} |"
