"""The layouts that a search tries: flags of each, and the pipeline's cut into balanced chunks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product

from megatron_trinity.planning.flops import lm_head_flops, pairs_of_layers, stage_flops
from megatron_trinity.planning.sizes import ModelSizes

TP, PP, CP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
)
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
LAYOUT, MICRO = "--pipeline-model-parallel-layout", "--micro-batch-size"
RECOMPUTE = "--recompute-granularity"
ALWAYS = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
PIPELINE_FLAGS = (
    LAYOUT,
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
)
RECOMPUTES: dict[str, tuple[str, ...]] = {
    "none": (),
    "MoE layers": (RECOMPUTE, "selective", "--recompute-modules", "moe"),
    "MoE layers, norms": (RECOMPUTE, "selective", "--recompute-modules", "moe", "layernorm"),
    "every layer": (
        *(RECOMPUTE, "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
}
SIZES = {TP: (1, 2, 4, 8), PP: (1, 2, 4, 8, 16), CP: (1, 2, 4, 8)}
EXPERT_SIZES = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (1, 2)
TOKENS_OF_A_RANK = 8192
"""Of a sequence; a shorter one is not split over context-parallel ranks."""


@dataclass(frozen=True)
class Candidate:
    """Attributes:
    tp, pp, chunks, cp, ep: sizes of the layout; chunks a pipeline rank.
    micro_batch: sequences.
    recompute: one of `RECOMPUTES`, or None for what is given.
    """

    tp: int
    pp: int
    chunks: int
    cp: int
    ep: int
    micro_batch: int
    recompute: str | None

    def words(self, base: Namespace, given: Sequence[str]) -> list[str]:
        """Flags of the trainer, without those that are given or change nothing."""
        words = [word for word in ALWAYS if word not in given]
        if self.tp > 1:
            words += [TP, str(self.tp), "--sequence-parallel", ETP, "1"]
        if self.pp > 1:
            words += [PP, str(self.pp)]
            if not any(flag in given for flag in PIPELINE_FLAGS):
                words += [LAYOUT, pipeline(base, self.pp * self.chunks)]
        if self.cp > 1:
            words += [CP, str(self.cp)]
        if self.ep > 1:
            words += [EP, str(self.ep)]
        if self.micro_batch != base.micro_batch_size:
            words += [MICRO, str(self.micro_batch)]
        if self.recompute is not None:
            words += RECOMPUTES[self.recompute]
        return without(words, given)

    def set_in(self, base: Namespace) -> Namespace:
        """`base` in this layout, as parsed arguments have it; for comparing alone."""
        args = Namespace(**vars(base))
        args.tensor_model_parallel_size, args.sequence_parallel = self.tp, self.tp > 1
        args.pipeline_model_parallel_size = self.pp
        args.context_parallel_size, args.expert_model_parallel_size = self.cp, self.ep
        args.expert_tensor_parallel_size = 1
        args.micro_batch_size = self.micro_batch
        args.data_parallel_size = args.world_size // (self.tp * self.pp * self.cp)
        args.virtual_pipeline_model_parallel_size = self.chunks if self.chunks > 1 else None
        args.pipeline_model_parallel_layout = None
        if self.pp > 1:
            args.pipeline_model_parallel_layout = pipeline(base, self.pp * self.chunks)
        if self.recompute is not None:
            words = RECOMPUTES[self.recompute]
            args.recompute_granularity = words[1] if words else None
            args.recompute_modules = list(words[3:]) if "selective" in words else None
            args.recompute_method = "uniform" if "full" in words else None
            args.recompute_num_layers = 1 if "full" in words else None
        args.overlap_grad_reduce = args.overlap_param_gather = True
        sharded = args.optimizer == "muon"
        args.use_layer_wise_distributed_optimizer = sharded
        args.use_distributed_optimizer = not sharded
        return args


def without(words: Sequence[str], given: Sequence[str]) -> list[str]:
    """`words` but for flags that are given, with their values."""
    kept: list[str] = []
    leaves_out = False
    for word in words:
        if word.startswith("--"):
            leaves_out = word in given
        if not leaves_out:
            kept.append(word)
    return kept


def candidates(base: Namespace, given: Sequence[str], node: int) -> Iterator[Candidate]:
    """All that divide, of those sizes that are not given.

    Args: base: parsed arguments with the given flags; given: their words; node: GPUs of a node.
    """
    fixed = {
        TP: base.tensor_model_parallel_size,
        PP: base.pipeline_model_parallel_size,
        CP: base.context_parallel_size,
    }
    sizes = [(fixed[flag],) if flag in given else SIZES[flag] for flag in SIZES]
    experts = (base.expert_model_parallel_size,) if EP in given else EXPERT_SIZES
    has_layout = any(flag in given for flag in PIPELINE_FLAGS)
    chunks = (base.virtual_pipeline_model_parallel_size or 1,) if has_layout else CHUNKS
    micro = (base.micro_batch_size,) if MICRO in given else {1, base.micro_batch_size}
    recompute: Sequence[str | None] = (None,) if RECOMPUTE in given else tuple(RECOMPUTES)
    for tp, pp, cp, ep, per_rank, batch, again in product(
        *sizes, experts, chunks, sorted(micro), recompute
    ):
        candidate = Candidate(tp, pp, per_rank, cp, ep, batch, again)
        if _divides(base, candidate, node, CP in given):
            yield candidate


def _divides(base: Namespace, c: Candidate, node: int, cp_given: bool) -> bool:
    model = c.tp * c.pp * c.cp
    if base.world_size % model or c.tp > node or (c.pp == 1 and c.chunks > 1):
        return False
    data = base.world_size // model
    of_stage = base.world_size // c.pp
    if base.global_batch_size % (c.micro_batch * data):
        return False
    number = base.global_batch_size // (c.micro_batch * data)
    if number < c.pp or (c.chunks > 1 and number % c.pp):
        return False
    if base.num_experts % c.ep or of_stage % c.ep or of_stage // c.ep < 1:
        return False
    if c.pp * c.chunks > base.num_layers + 2:
        return False
    groups = base.num_query_groups
    if (groups % c.tp and c.tp % groups) or base.num_attention_heads % c.tp:
        return False
    if c.cp > 1 and not cp_given and base.seq_length // c.cp < TOKENS_OF_A_RANK:
        return False
    return base.seq_length % (2 * c.cp * c.tp) == 0


def pipeline(base: Namespace, number: int) -> str:
    """Megatron's word for layers in `number` chunks, the largest as small as can be, by FLOPs."""
    return _pipeline(ModelSizes.from_args(base), base.seq_length, number)


@cache
def _pipeline(sizes: ModelSizes, length: int, number: int) -> str:
    pairs = pairs_of_layers(sizes, [length])
    costs = [stage_flops(sizes, [kind], False, length, *pairs) for kind in sizes.layer_kinds()]
    head = lm_head_flops(sizes, length)
    low, high = max([*costs, head]), sum(costs) + head
    while high - low > low // 1000:
        middle = (low + high) // 2
        if len(_filled(costs, head, middle)) <= number:
            high = middle
        else:
            low = middle
    chunks = _filled(costs, head, high)
    # Where fewer do, the largest are halved until there are as many; the last has the head.
    while len(chunks) < number:
        most = max(range(len(chunks)), key=lambda n: chunks[n])
        half = chunks[most] // 2
        chunks[most : most + 1] = [chunks[most] - half, half]
    words = ["t" * layers for layers in chunks]
    words[0], words[-1] = "E" + words[0], words[-1] + "L"
    return "|".join(_short(word) for word in words)


def _filled(costs: Sequence[int], head: int, most: int) -> list[int]:
    """Layers of each chunk, filled from the back up to a cost."""
    chunks, cost = [0], head
    for of_layer in reversed(costs):
        if cost + of_layer > most:
            chunks.append(0)
            cost = 0
        chunks[-1] += 1
        cost += of_layer
    return chunks[::-1]


def _short(word: str) -> str:
    """Runs of a letter as `t*4`."""
    runs = [(letter, len(list(run))) for letter, run in groupby(word)]
    return "".join(letter if number == 1 else f"{letter}*{number}" for letter, number in runs)
