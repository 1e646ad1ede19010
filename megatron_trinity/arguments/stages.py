"""The stages of the learning rate: how long the last one is by default, and what cannot be."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_trinity.arguments.refusal import Refusal

DECAY_SHARE = 0.2
"""Of the schedule, the last stage of WSD where its length is not given.

The report does not say where its decay begins. A fifth is what WSD needs in the published
comparison to end where a cosine over the whole run does (Hägele et al., 2024, arXiv:2405.18392).
"""


def unit_of(args: Namespace) -> str:
    """What the length of training is counted in, as the arguments end: `iters` or `samples`."""
    return "samples" if args.train_samples else "iters"


def settle_stages(args: Namespace) -> None:
    """Set the end of the schedule and the length of its last stage, in place, where not given."""
    unit = unit_of(args)
    length = getattr(args, f"train_{unit}")
    if getattr(args, f"lr_decay_{unit}") is None:
        setattr(args, f"lr_decay_{unit}", length)
    if not length or args.lr_decay_style != "WSD" or _decay(args) is not None:
        return
    stage = min(max(round(DECAY_SHARE * _end(args)), 1), _end(args) - _warm_up(args))
    setattr(args, f"lr_wsd_decay_{unit}", max(stage, 0))  # a warm-up that leaves none is refused


def stage_notes(args: Namespace) -> Iterator[str]:
    """What of the schedule will not be as it was asked for."""
    unit = {"iters": "iterations", "samples": "samples"}[unit_of(args)]
    length, end, decay = getattr(args, f"train_{unit_of(args)}"), _end(args), _decay(args)
    start = args.lr_restart_iters or 0 if unit == "iterations" else args.lr_restart_samples
    if args.skip_train:
        return
    if start + end > length:
        yield (
            f"the schedule of the learning rate ends after {start + end} {unit}, the run after "
            f"{length}: the rate does not reach its minimum"
        )
    stable = end - _warm_up(args)
    if args.lr_decay_style == "WSD" and decay is not None and decay > stable:
        yield (
            f"the last stage of the learning rate takes {decay} {unit}, the schedule leaves "
            f"{stable} behind the warm-up: the rate falls at once to where it would be by then"
        )


def _end(args: Namespace) -> int:
    return int(getattr(args, f"lr_decay_{unit_of(args)}") or 0)


def _decay(args: Namespace) -> int | None:
    decay: int | None = getattr(args, f"lr_wsd_decay_{unit_of(args)}")
    return decay


def _warm_up(args: Namespace) -> int:
    if args.lr_warmup_fraction is not None:
        return int(args.lr_warmup_fraction * _end(args))
    return int(getattr(args, f"lr_warmup_{unit_of(args)}"))


def _of_unit(unit: str, tokens: str) -> tuple[Refusal, ...]:
    """The refusals of lengths in a unit; `tokens` names it where they come from tokens."""
    return (
        Refusal(
            f"schedule-{unit}",
            lambda a: _trains(a, unit) and _end(a) < 1,
            f"the schedule of the learning rate is over before it begins: {{--lr-decay-{unit}}} "
            f"has to be 1 or more, and {{--lr-restart-{tokens}}} before the end of training; "
            "change one of them",
        ),
        Refusal(
            f"warm-up-{unit}",
            lambda a: _trains(a, unit) and not 0 <= getattr(a, f"lr_warmup_{unit}") < _end(a),
            f"{{--lr-warmup-{unit}=}} of a schedule of {{lr_decay_{unit}|so many}} leaves nothing "
            f"behind the warm-up; give a shorter {{--lr-warmup-{tokens}}}, or train longer",
        ),
        Refusal(
            f"decay-{unit}",
            lambda a: _trains(a, unit) and (_decay(a) or 0) < 0,
            f"{{--lr-wsd-decay-{unit}=}}: use 0 (no decay) or more, or leave it out",
        ),
    )


def _trains(args: Namespace, unit: str) -> bool:
    return unit_of(args) == unit and not args.skip_train


def _wrong_unit(args: Namespace) -> bool:
    other = {"iters": "samples", "samples": "iters"}[unit_of(args)]
    return getattr(args, f"lr_wsd_decay_{other}") is not None


STAGE_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "no-length",
        lambda a: not a.skip_train and (getattr(a, f"train_{unit_of(a)}") or 0) < 1,
        "no length of training; give {--train-iters} or {--train-tokens}, 1 or more",
    ),
    *_of_unit("iters", "iters"),
    *_of_unit("samples", "tokens"),
    Refusal(
        "warm-up-fraction",
        lambda a: a.lr_warmup_fraction is not None and not 0 <= a.lr_warmup_fraction < 1,
        "{--lr-warmup-fraction=} leaves nothing behind the warm-up; use 0 or more, and less than 1",
    ),
    Refusal(
        "decay-unit",
        _wrong_unit,
        "{--lr-wsd-decay-iters} goes with {--train-iters}, {--lr-wsd-decay-samples} with "
        "{--train-samples}; use the one that counts as the length of training does",
    ),
    Refusal(
        "no-rate",
        lambda a: not a.skip_train and a.lr is None,
        "no learning rate; give {--lr}, or a {--preset} that has one",
    ),
    Refusal(
        "rate-order",
        lambda a: (
            not a.skip_train and not (0 <= a.min_lr <= a.lr and 0 <= a.lr_warmup_init <= a.lr)
        ),
        "{--lr=} is the peak: it cannot be below {--min-lr=} or {--lr-warmup-init=}, nor they "
        "below 0; change one of them",
    ),
    Refusal(
        "weight-decay",
        lambda a: a.weight_decay_incr_style == "constant" and not a.weight_decay >= 0,
        "{--weight-decay=}: use 0 or more",
    ),
    Refusal(
        "weight-decay-ramp",
        lambda a: (
            a.weight_decay_incr_style != "constant"
            and not 0 <= (a.start_weight_decay or 0) <= (a.end_weight_decay or 0)
        ),
        "{--weight-decay-incr-style=} needs {--start-weight-decay}, 0 or more, and an "
        "{--end-weight-decay} that is not below it; give both",
    ),
)
"""Of what Megatron asserts when it has built the model."""
