"""Which optimizer updates which parameter: one table over canonical names."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_trinity.errors import TrinityError

Kind = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        name: of the group, stable: checkpoints and logs know it.
        pattern: what a canonical name has to match, from its start to its end.
        kind: the optimizer; None for what `--router-optimizer` says.
        gains: whether its members are norm gains, which `--no-norm-weight-decay` is about.
    """

    name: str
    pattern: str
    kind: Kind | None
    gains: bool = False


_LAYER = r"decoder\.layers\.\d+\."
RULES: tuple[Rule, ...] = (
    Rule("attention", _LAYER + r"self_attention\.linear_(qkv|proj)\.weight", "muon"),
    Rule("dense", _LAYER + r"mlp\.(shared_experts\.)?linear_fc[12]\.weight", "muon"),
    Rule("experts", _LAYER + r"mlp\.experts\.experts\.linear_fc[12]\.weight", "muon"),
    Rule("router", _LAYER + r"mlp\.router\.weight", None),
    Rule("embedding", r"embedding\.word_embeddings\.weight", "adamw"),
    Rule("output", r"output_layer\.weight", "adamw"),
    Rule("gains", r"decoder\.(.+\.)?(\w*layernorm|norm)\.weight", "adamw", gains=True),
)
"""Every parameter of a Trinity model is in exactly one. Muon is for "hidden layers", AdamW for
"embedding and output layers" (report, section 3); gains are vectors, which Muon does not know."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike.

    Attributes:
        name: of its rule.
        kind: the optimizer.
        max_lr, min_lr: peak of the learning rate and what it decays to.
        weight_decay: decoupled, times the learning rate.
    """

    name: str
    kind: Kind
    max_lr: float
    min_lr: float
    weight_decay: float


def groups_from_args(args: Namespace) -> list[Group]:
    """The groups of a run, in the order of the table."""
    rates = {"muon": (args.lr, args.min_lr), "adamw": (args.adamw_lr, args.adamw_min_lr)}
    adamw_decay = args.adamw_weight_decay
    decays = {
        "muon": args.weight_decay,
        "adamw": args.weight_decay if adamw_decay is None else adamw_decay,
    }
    groups = []
    for rule in RULES:
        kind = rule.kind or args.router_optimizer
        decay = 0.0 if rule.gains and not args.norm_weight_decay else decays[kind]
        groups.append(Group(rule.name, kind, *rates[kind], decay))
    return groups


def group_of(key: str) -> str:
    """Name of the group of a canonical name.

    Raises:
        TrinityError: it is in none, or in two.
    """
    found = [rule.name for rule in RULES if re.fullmatch(rule.pattern, key)]
    if len(found) != 1:
        where = f"in the groups {' and '.join(found)}" if found else "in no group"
        raise TrinityError(
            f"{key} is {where}: each parameter has to match one rule of "
            "megatron_trinity/optimizer/param_groups.py"
        )
    return found[0]


def summary(groups: Sequence[Group], shapes: Mapping[str, Iterable[Sequence[int]]]) -> list[str]:
    """The groups as a table of text.

    Args:
        shapes: group to the shapes of what it updates over the whole model: of Muon the matrices,
            of AdamW the tensors.
    """
    lines = ["> optimizer groups:"]
    for group in groups:
        counts: dict[str, int] = {}
        for shape in shapes.get(group.name, ()):
            text = "x".join(str(size) for size in shape)
            counts[text] = counts.get(text, 0) + 1
        sizes = ", ".join(f"{count} of {text}" for text, count in counts.items())
        lines.append(
            f">   {group.name:<9} {group.kind:<5} lr {group.max_lr:g} to {group.min_lr:g}, "
            f"weight decay {group.weight_decay:g}: {sizes or 'none'}"
        )
    return lines
