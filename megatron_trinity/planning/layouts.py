"""The recommended layouts of the presets: one table, which docs/scale.md prints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trinity.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """Megatron's flags for a preset on a number of ranks.

    Attributes:
        preset: its name.
        world_size: ranks, one a GPU.
        flags: words of the command line, beside `--preset`.
    """

    preset: str
    world_size: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.preset} on {self.world_size}"


SHARDED = ("--use-distributed-optimizer",)
EXPERTS_IN_A_NODE = ("--expert-model-parallel-size", "8")
RECOMPUTE = (
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
)
# 8 ranks with two chunks each. The LM head weighs as much as 2.5 layers and stands with one; the
# six dense layers are a little lighter than the others; one chunk has to do with three layers.
LARGE_PIPELINE = (
    "--pipeline-model-parallel-size",
    "8",
    "--pipeline-model-parallel-layout",
    "Et*4|(t*4|)*13t*3|tL",
)

RECOMMENDED: tuple[Layout, ...] = (
    Layout("nano", 16, (*EXPERTS_IN_A_NODE, *SHARDED)),
    Layout("nano", 64, (*EXPERTS_IN_A_NODE, *SHARDED)),
    Layout("nano", 512, (*EXPERTS_IN_A_NODE, *SHARDED)),
    Layout("mini", 64, (*EXPERTS_IN_A_NODE, *SHARDED, *RECOMPUTE)),
    Layout("mini", 512, (*EXPERTS_IN_A_NODE, *SHARDED, *RECOMPUTE)),
    Layout("large", 512, (*LARGE_PIPELINE, *EXPERTS_IN_A_NODE, *SHARDED, *RECOMPUTE)),
    Layout("large", 2048, (*LARGE_PIPELINE, *EXPERTS_IN_A_NODE, *SHARDED, *RECOMPUTE)),
)


def recommended(preset: str, world_size: int) -> Layout:
    """The row of the table for a preset on `world_size` ranks.

    Raises:
        UsageError: there is none.
    """
    for layout in RECOMMENDED:
        if (layout.preset, layout.world_size) == (preset, world_size):
            return layout
    known = ", ".join(layout.name for layout in RECOMMENDED)
    raise UsageError(
        f"no layout is recommended for {preset} on {world_size} ranks (there are: {known}); "
        "give Megatron's flags for one of your own"
    )
