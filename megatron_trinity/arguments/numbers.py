"""Numbers that have a least value: sizes, intervals, counts and the like, in one table.

Megatron asserts a few of them; the others fail in the middle of the set-up, or are ignored.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from megatron_trinity.arguments.refusal import Refusal, dest_of

LEAST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use 1 or more": (
        lambda number: number >= 1,
        """--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups
        --num-experts --moe-ffn-hidden-size --seq-length --max-position-embeddings
        --make-vocab-size-divisible-by --micro-batch-size --log-interval
        --tensorboard-log-interval --distributed-timeout-minutes --hysteresis
        --dist-ckpt-workers --seed""",
    ),
    "use 1 or more, or leave it out": (
        lambda number: number >= 1,
        """--vocab-size --kv-channels --global-batch-size --eval-micro-batch-size
        --eval-global-batch-size --save-interval --save-params-interval
        --save-tokens-per-expert-interval --save-wgrads-interval --exit-interval
        --exit-duration-in-mins --log-memory-interval --train-sync-interval
        --check-weight-hash-across-dp-replicas-interval --recompute-num-layers
        --microbatch-group-size-per-virtual-pipeline-stage --ddp-num-buckets --ddp-bucket-size
        --distributed-timeout-seconds-after-init --num-layers-per-virtual-pipeline-stage
        --num-virtual-stages-per-pipeline-rank --decoder-first-pipeline-num-layers
        --decoder-last-pipeline-num-layers --document-buffer-size --document-buffers""",
    ),
    "use 0 or more": (
        lambda number: number >= 0,
        """--norm-epsilon --clip-grad --num-workers --manual-gc-interval
        --start-eval-at-iter --straggler-interval --tensorboard-queue-size
        --lr-restart-iters --ckpt-step""",
    ),
    "use more than 0": (
        lambda number: number > 0,
        """--adam-eps --rotary-base --init-method-std --loss-scale --initial-loss-scale
        --min-loss-scale --loss-scale-window""",
    ),
}
"""What to use, to whether a number is that, and the flags; one that is not given is none."""

_DESTS = {
    "--norm-epsilon": "layernorm_epsilon",
    "--microbatch-group-size-per-virtual-pipeline-stage": "microbatch_group_size_per_vp_stage",
}
"""Arguments that are not called as their flags are."""


def _refusals() -> Iterator[Refusal]:
    for words, (fits, flags) in LEAST.items():
        for flag in flags.split():
            dest = _DESTS.get(flag, dest_of(flag))
            yield Refusal(
                f"least-{flag.removeprefix('--')}",
                _is_not(dest, fits),
                f"{{{flag}}} {{{dest}|so many}}: {words}",
            )


def _is_not(dest: str, fits: Callable[[Any], bool]) -> Callable[[Namespace], bool]:
    def applies(args: Namespace) -> bool:
        number = getattr(args, dest)
        return number is not None and not fits(number)  # NaN fits nothing

    return applies


LEAST_REFUSALS = tuple(_refusals())
"""A row a flag, told before anything follows from what was given."""
