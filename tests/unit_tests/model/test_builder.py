"""The presets, built on the meta device, have the published numbers of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_trinity.errors import UsageError
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

VOCABULARY = 200192
HEAD_DIM = 128


@dataclass(frozen=True)
class Sizes:
    """A row of the report's table 1, and what it says about parameters in billions."""

    layers: int
    dense: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    experts: int
    topk: int
    expert_ffn: int
    total: tuple[str, int]
    active: tuple[str, int]
    active_without_embedding: tuple[str, int]

    def count(self, experts: int) -> int:
        """Parameters of the model if it had, or used, `experts` routed experts a layer."""
        d = self.hidden
        attention = d * HEAD_DIM * (3 * self.heads + 2 * self.groups) + 2 * HEAD_DIM
        per_layer = attention + 4 * d
        dense = 3 * d * self.ffn
        router = d * self.experts
        moe = router + (experts + 1) * 3 * d * self.expert_ffn
        blocks = self.layers * per_layer + self.dense * dense + (self.layers - self.dense) * moe
        return 2 * VOCABULARY * d + d + blocks


MODELS = {
    "nano": Sizes(
        56, 2, 1024, 3072, 8, 2, 128, 8, 256,
        ("6.12", 6_119_996_416), ("1.02", 1_023_917_056), ("0.82", 818_920_448),
    ),
    "mini": Sizes(
        32, 2, 2048, 6144, 32, 4, 128, 8, 1024,
        ("26.12", 26_123_970_560), ("3.47", 3_474_728_960), ("3.06", 3_064_735_744),
    ),
    "large": Sizes(
        60, 6, 3072, 12288, 48, 8, 256, 4, 3072,
        ("398.64", 398_635_272_192), ("13.37", 13_371_672_576), ("12.76", 12_756_682_752),
    ),
}  # fmt: skip


def count_parameters(rank: int, world_size: int, preset: str) -> tuple[int, int, int, int]:
    """Total, routed experts', input embedding's; and the entries of all expert biases."""
    from megatron_trinity.arguments.parse import parse_arguments

    args = parse_arguments(["--preset", preset, "--train-iters", "3000"])
    args.padded_vocab_size = args.vocab_size
    with torch.device("meta"):
        model = build(args)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    return (
        sum(sizes.values()),
        sum(size for name, size in sizes.items() if ".mlp.experts." in name),
        sizes["embedding.word_embeddings.weight"],
        sum(b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias")),
    )


@pytest.mark.parametrize("name", first(1, MODELS))
def test_parameter_counts(ranks: RankPools, name: str) -> None:
    sizes = MODELS[name]
    [(total, experts, embedding, biases)] = ranks.run(count_parameters, name, world_size=1)
    active = total - experts + experts * sizes.topk // sizes.experts
    assert total == sizes.count(sizes.experts) == sizes.total[1]
    assert active == sizes.count(sizes.topk) == sizes.active[1]
    assert active - embedding == sizes.active_without_embedding[1]
    assert embedding == VOCABULARY * sizes.hidden
    assert biases == (sizes.layers - sizes.dense) * sizes.experts
    for count, (printed, _) in (
        (total, sizes.total),
        (active, sizes.active),
        (active - embedding, sizes.active_without_embedding),
    ):
        assert f"{count / 1e9:.2f}" == printed


def build_with_another_implementation(rank: int, world_size: int, name: str) -> str:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    config = model_config_from_args(parse(afmoe_config()))
    config.transformer.transformer_impl = name
    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with pytest.raises(UsageError) as refused:
        TrinityModelBuilder(config).build_model(groups)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("inference_optimized", " has no Trinity layer spec"),
        ("transformer_engine", ": Transformer Engine is not installed"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(
    ranks: RankPools, name: str, reason: str
) -> None:
    [message] = ranks.run(build_with_another_implementation, name, world_size=1)
    assert message.startswith(f"--transformer-impl {name}{reason}")
    assert "\n" not in message
