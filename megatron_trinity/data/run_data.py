"""The data of a run: what it trains on, what it evaluates on, and how to know them again."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass

from megatron_trinity.data.description import Description
from megatron_trinity.data.evaluation import EvaluationSamples
from megatron_trinity.data.fingerprint import Fingerprint, fingerprint_of
from megatron_trinity.data.plan import Plan
from megatron_trinity.data.sources import tokenizer_sha256


@dataclass(frozen=True)
class RunData:
    """All that a run reads, opened, but not read.

    Attributes:
        plan: what it trains on; None where it only evaluates.
        validation, test: what it evaluates on.
        fingerprint: of what it trains on; None but on rank 0, which compares and saves it. It
            reads all over the files, and thousands of ranks would do so on one file system.
    """

    plan: Plan | None
    validation: tuple[EvaluationSamples, ...]
    test: tuple[EvaluationSamples, ...]
    fingerprint: Fingerprint | None

    def bytes_per_token(self, of_set: str, of_test: bool) -> float | None:
        """Of an evaluation set, by its name; None where its manifests do not say."""
        given = self.test if of_test else self.validation
        sets = [one for one in given if one.name == of_set]
        return sets[0].bytes_per_token if sets else None


def run_data(args: Namespace, described: Description) -> RunData | None:
    """What is described, or None for mock data.

    Raises:
        UsageError: the data does not last as long as the run, or a source has no tokens.
    """
    if args.mock_data:
        return None
    plan = None
    if not args.skip_train:
        plan = Plan(described, args.seq_length, args.seed)
        plan.check_length(_length(args))
    fingerprint = None
    if os.environ.get("RANK", "0") == "0":
        fingerprint = fingerprint_of(described, args.seed, tokenizer_sha256(args))
    return RunData(
        plan,
        _evaluated(args, described, test=False),
        _evaluated(args, described, test=True),
        fingerprint,
    )


def _length(args: Namespace) -> int:
    """Samples of the run, with a batch that has its full size from the start."""
    return int(args.train_samples or args.train_iters * args.global_batch_size)


def _evaluated(args: Namespace, data: Description, test: bool) -> tuple[EvaluationSamples, ...]:
    batch = args.eval_global_batch_size
    limit = args.eval_iters * batch
    sets = data.test if test else data.validation
    return tuple(
        EvaluationSamples(one, args.seq_length, batch, limit) for one in sets if args.eval_iters
    )
