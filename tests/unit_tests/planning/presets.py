"""The real presets in numbers: the report's table 1, and the totals that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trinity.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Preset:
    """Attributes:
    total, active: parameters.
    attention_share: FLOPs of the core attention over those of all other products.
    """

    sizes: ModelSizes
    seq_length: int
    total: int
    active: int
    attention_share: float


def _preset(row: tuple[int, ...], seq_length: int, total: int, active: int, share: float) -> Preset:
    layers, dense, window, hidden, heads, groups, ffn, experts, topk, expert_ffn = row
    sizes = ModelSizes(
        num_layers=layers,
        num_dense_layers=dense,
        global_attn_every_n_layers=4,
        window=window,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=128,
        ffn_hidden_size=ffn,
        num_experts=experts,
        topk=topk,
        moe_ffn_hidden_size=expert_ffn,
        num_shared_experts=1,
        vocab_size=200192,
    )
    return Preset(sizes, seq_length, total, active, share)


PRESETS = {
    "nano": _preset(
        (56, 2, 2048, 1024, 8, 2, 3072, 128, 8, 256), 4096, 6_119_996_416, 1_023_917_056, 0.2332
    ),
    "mini": _preset(
        (32, 2, 2048, 2048, 32, 4, 6144, 128, 8, 1024), 4096, 26_123_970_560, 3_474_728_960, 0.1424
    ),
    "large": _preset(
        (60, 6, 4096, 3072, 48, 8, 12288, 256, 4, 3072),
        8192,
        398_635_272_192,
        13_371_672_576,
        0.1924,
    ),
}
