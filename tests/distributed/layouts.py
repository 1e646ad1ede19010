"""The layouts in which one model must give one answer: one table, for tests and docs.

A layout is a set of features, each with its flags. Not every set is here: the table is chosen so
that every two features that can be combined on 8 ranks meet at least once.
"""

from __future__ import annotations

from itertools import combinations

from tests.trainer import FULL_RECOMPUTE

GLOBAL_BATCH = 16
HEADS, QUERY_GROUPS = 8, 4
MAX_RANKS = 8

# Axis -> feature -> flags. A layout has at most one feature of an axis; none is Megatron's default.
FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "tensor": {
        "TP 2 + SP": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    },
    "pipeline": {
        "PP 2": ("--pipeline-model-parallel-size", "2"),
        "PP 4": ("--pipeline-model-parallel-size", "4"),
        "VPP 2": (
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1"),
        ),
        "uneven PP": (
            *("--pipeline-model-parallel-size", "2"),
            *("--pipeline-model-parallel-layout", "Et|tttL"),
        ),
    },
    "expert": {
        "EP 2": ("--expert-model-parallel-size", "2"),
        "EP 4": ("--expert-model-parallel-size", "4"),
    },
    "expert tensor": {
        "ETP 1": ("--expert-tensor-parallel-size", "1"),
        "ETP 2": ("--expert-tensor-parallel-size", "2"),
    },
    "context": {
        "CP 2 all-gather": ("--context-parallel-size", "2", "--cp-comm-type", "all_gather"),
        "CP 4 all-gather": ("--context-parallel-size", "4", "--cp-comm-type", "all_gather"),
        "CP 2 a2a": ("--context-parallel-size", "2", "--cp-comm-type", "a2a"),
        "CP 4 a2a": ("--context-parallel-size", "4", "--cp-comm-type", "a2a"),
    },
    "data": {"DP 2": (), "DP 4": ()},
    "sharding": {
        "distributed optimizer": ("--use-distributed-optimizer",),
        "hybrid sharding": (
            *("--use-distributed-optimizer", "--num-distributed-optimizer-instances", "2"),
        ),
    },
    "micro-batch": {
        "micro-batch 1": ("--micro-batch-size", "1"),
        "micro-batch 4": ("--micro-batch-size", "4"),
    },
    "recompute": {
        "full recompute": FULL_RECOMPUTE,
        "selective recompute": (
            *("--recompute-granularity", "selective"),
            *("--recompute-modules", "core_attn", "moe", "layernorm"),
        ),
    },
    "documents": {"documents": ("--dataloader-inter-document-masking",)},
    "dispatcher": {"allgather": ("--moe-token-dispatcher-type", "allgather")},
    "optimizer": {"muon": ("--optimizer", "muon")},
}
AXES = {feature: axis for axis, features in FEATURES.items() for feature in features}

Layout = tuple[str, ...]

ALONE: tuple[Layout, ...] = (
    ("TP 2 + SP",),
    ("TP 2 + SP", "ETP 1"),
    ("PP 2",),
    ("PP 4",),
    ("VPP 2",),
    ("uneven PP",),
    ("EP 2", "DP 2"),
    ("EP 4", "DP 4"),
    ("ETP 2", "DP 2"),
    ("CP 2 all-gather",),
    ("CP 4 all-gather",),
    ("CP 2 a2a",),
    ("CP 4 a2a",),
    ("DP 2",),
    ("DP 2", "distributed optimizer"),
    ("DP 4", "hybrid sharding"),
    ("micro-batch 1",),
    ("micro-batch 4",),
    ("full recompute",),
    ("selective recompute",),
    ("documents", "micro-batch 1"),
    ("EP 2", "DP 2", "allgather"),
    ("DP 2", "distributed optimizer", "muon"),
)
"""One feature at a time, or with what it needs: what fails here says most."""

QUICK: tuple[Layout, ...] = (
    ("TP 2 + SP",),
    ("VPP 2",),
    ("EP 2", "DP 2"),
    ("CP 2 all-gather",),
    ("CP 2 a2a",),
    ("DP 2", "distributed optimizer", "muon"),
    ("full recompute",),
    ("documents", "micro-batch 1"),
)
"""Those of them that are not left to `bash tests/run.sh --all`."""

CROSSED: tuple[Layout, ...] = (
    ("TP 2 + SP", "EP 2", "ETP 1", "CP 4 all-gather"),
    (
        "TP 2 + SP",
        "VPP 2",
        "EP 2",
        "ETP 2",
        "DP 2",
        "distributed optimizer",
        "micro-batch 1",
        "selective recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "TP 2 + SP",
        "uneven PP",
        "EP 4",
        "ETP 1",
        "CP 2 a2a",
        "distributed optimizer",
        "micro-batch 4",
        "full recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "TP 2 + SP",
        "PP 2",
        "EP 2",
        "ETP 1",
        "CP 2 all-gather",
        "hybrid sharding",
        "micro-batch 1",
        "selective recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "EP 4",
        "ETP 2",
        "CP 2 all-gather",
        "DP 4",
        "distributed optimizer",
        "micro-batch 4",
        "full recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "EP 2",
        "ETP 2",
        "CP 4 a2a",
        "DP 2",
        "hybrid sharding",
        "micro-batch 4",
        "full recompute",
        "documents",
        "allgather",
    ),
    (
        "PP 2",
        "EP 2",
        "ETP 2",
        "CP 4 all-gather",
        "distributed optimizer",
        "micro-batch 4",
        "full recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "PP 4",
        "EP 2",
        "CP 2 a2a",
        "distributed optimizer",
        "micro-batch 1",
        "selective recompute",
        "documents",
        "allgather",
        "muon",
    ),
    (
        "uneven PP",
        "EP 4",
        "CP 4 a2a",
        "distributed optimizer",
        "micro-batch 1",
        "selective recompute",
        "muon",
    ),
    (
        "TP 2 + SP",
        "EP 4",
        "ETP 1",
        "CP 4 all-gather",
        "hybrid sharding",
        "micro-batch 1",
        "selective recompute",
    ),
    ("EP 2", "ETP 2", "CP 2 a2a", "DP 4", "hybrid sharding", "micro-batch 1", "full recompute"),
    ("VPP 2", "EP 4", "CP 2 all-gather", "DP 2", "micro-batch 4", "full recompute"),
    ("uneven PP", "EP 2", "DP 4", "hybrid sharding", "micro-batch 4", "selective recompute"),
    ("PP 4", "ETP 2", "DP 2", "micro-batch 4", "full recompute"),
    ("PP 2", "EP 4", "CP 2 a2a", "DP 2"),
    ("TP 2 + SP", "VPP 2", "ETP 1", "DP 2", "hybrid sharding"),
    ("uneven PP", "ETP 2", "CP 2 all-gather", "DP 2"),
    ("TP 2 + SP", "PP 4", "ETP 1"),
    ("TP 2 + SP", "ETP 1", "DP 4"),
    ("PP 4", "CP 2 all-gather", "hybrid sharding"),
    ("VPP 2", "CP 4 a2a"),
    ("VPP 2", "CP 4 all-gather"),
    ("VPP 2", "DP 4"),
    ("PP 2", "CP 4 a2a"),
    ("CP 4 all-gather", "DP 2"),
    ("VPP 2", "CP 2 a2a"),
    ("uneven PP", "CP 4 all-gather"),
    ("PP 2", "DP 4"),
)
"""With those above every two features meet."""

LAYOUTS = (*ALONE, *CROSSED)


def flags(layout: Layout) -> tuple[str, ...]:
    """The command line of a layout, on top of the run's."""
    return tuple(word for name in layout for word in FEATURES[AXES[name]][name])


def ranks_of(layout: Layout) -> int:
    """Tensor x pipeline x context x data parallel."""
    return _tensor(layout) * _pipeline(layout) * _context(layout) * _data(layout)


def is_possible(layout: Layout) -> bool:
    """Whether features can be combined as they are: one of an axis, and sizes that divide."""
    tensor, context, data = _tensor(layout), _context(layout), _data(layout)
    expert = _number(layout, "expert")
    expert_tensor = _number(layout, "expert tensor") if _has(layout, "expert tensor") else tensor
    micro_batch = _number(layout, "micro-batch") if _has(layout, "micro-batch") else 2
    micro_batches = GLOBAL_BATCH // data // micro_batch
    of_stage = tensor * context * data
    return (
        len({AXES[name] for name in layout}) == len(layout)
        and ranks_of(layout) <= MAX_RANKS
        and of_stage % (expert * expert_tensor) == 0
        and not ("ETP 1" in layout and tensor == 1)  # nothing else than no feature
        and not ("distributed optimizer" in layout and context * data == 1)
        # Each instance of the optimizer has as many ranks, of experts as well.
        and not (
            "hybrid sharding" in layout
            and (context * data % 2 or of_stage // (expert * expert_tensor) % 2)
        )
        and not ("a2a" in " ".join(layout) and QUERY_GROUPS // tensor % context)
        and not ("VPP 2" in layout and micro_batches % _pipeline(layout))
    )


def can_meet(one: str, other: str) -> bool:
    """Whether two features can be in one layout, with more ranks if they need them."""
    more = [
        name for axis in ("tensor", "expert tensor", "context", "data") for name in FEATURES[axis]
    ]
    return any(
        is_possible((one, other, *others))
        for count in range(4)
        for others in combinations(more, count)
    )


def cannot_meet() -> list[tuple[str, str, str]]:
    """Pairs of features of different axes that no layout has, and why."""
    return [
        (one, other, _obstacle((one, other)))
        for one, other in combinations(AXES, 2)
        if AXES[one] != AXES[other] and not can_meet(one, other)
    ]


def _obstacle(pair: Layout) -> str:
    if "a2a" in " ".join(pair) and _tensor(pair) * _context(pair) > QUERY_GROUPS:
        return f"more parts than the {QUERY_GROUPS} query groups of the model: refused"
    if "ETP 1" in pair:
        return "ETP 1 differs from the default only under TP 2, which the other feature rules out"
    return f"needs more than {MAX_RANKS} ranks"


def _has(layout: Layout, axis: str) -> bool:
    return any(AXES[name] == axis for name in layout)


def _number(layout: Layout, axis: str) -> int:
    """The number in the name of the layout's feature of an axis; 1 without one."""
    return next((int(name.split()[1]) for name in layout if AXES[name] == axis), 1)


def _tensor(layout: Layout) -> int:
    return _number(layout, "tensor")


def _pipeline(layout: Layout) -> int:
    return 2 if "uneven PP" in layout else _number(layout, "pipeline")


def _context(layout: Layout) -> int:
    return _number(layout, "context")


def _data(layout: Layout) -> int:
    return _number(layout, "data")
