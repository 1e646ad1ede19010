"""Layouts that a checkpoint is rewritten for: named in a few letters, judged as training does."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_trinity.checkpoint.hf.config import flags_from_hf_config, hf_config_from_args
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.planning.fake_ranks import build_rank, parse_for_ranks

FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "cp": "--context-parallel-size",
}
STAGES = "stages"
"""Key of `--pipeline-model-parallel-layout`."""

KEYS = (*FLAGS, "dp", STAGES)

STORED = (
    "tensor_model_parallel_size",
    "tensor_parallel_num_weight_shards",
    "pipeline_model_parallel_size",
    "transformer_pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "expert_tensor_parallel_num_weight_shards",
    "context_parallel_size",
    "sequence_parallel",
    "data_parallel_size",
    "world_size",
)
"""Arguments that are the layout's."""


@dataclass(frozen=True)
class Layout:
    """A layout by its letters.

    Attributes:
        sizes: `tp`, `pp`, `vpp`, `ep`, `etp`, `cp`, `dp` as far as they are given.
        stages: as `--pipeline-model-parallel-layout`, if given.
    """

    sizes: Mapping[str, int]
    stages: str | None = None

    def size(self, name: str) -> int:
        """A parallel size; as in Megatron, that of experts' tensors is by default that of all."""
        return self.sizes.get(name, self.size("tp") if name == "etp" else 1)

    @property
    def ranks(self) -> int:
        """How many there are; without `dp` as few as the experts allow."""
        dense = self.size("tp") * self.size("cp")
        experts = self.size("ep") * self.size("etp")
        copies = self.sizes.get("dp", experts // math.gcd(dense, experts))
        return dense * copies * self.size("pp")


def parse_layout_text(text: str) -> Layout:
    """The layout that `tp=2,pp=2,ep=4` names.

    Raises:
        UsageError: a key that is none or stands twice, or a value that is no size.
    """
    given: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.strip().partition("=")
        if key not in KEYS or not equals or not value:
            raise UsageError(f"--to: {word!r} is no part of a layout; use {'=, '.join(KEYS)}=")
        if key in given:
            raise UsageError(f"--to names {key} twice")
        given[key] = value
    stages = given.pop(STAGES, None)
    for key, value in given.items():
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"--to: {key}={value} has to be 1 or more")
    return Layout({key: int(value) for key, value in given.items()}, stages)


def layout_of(args: Namespace) -> Layout:
    """The layout that a run had."""
    sizes = {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "ep": args.expert_model_parallel_size,
        "etp": args.expert_tensor_parallel_size,
        "cp": args.context_parallel_size,
        "dp": args.data_parallel_size,
    }
    stages = args.pipeline_model_parallel_layout
    if args.virtual_pipeline_model_parallel_size and stages is None:
        sizes["vpp"] = args.virtual_pipeline_model_parallel_size
    return Layout(sizes, stages)


def args_of_layout(saved: Namespace, layout: Layout) -> Namespace:
    """Arguments of the trainer for the model of `saved` in another layout.

    To be called where no process group is open, after `adapt_megatron`.

    Raises:
        TrinityError: training would refuse it, or its first rank does not build.
    """
    try:
        args = parse_for_ranks(layout.ranks, _command_line(saved, layout))
        build_rank(args, 0)  # which is when Megatron looks at `stages`
    except TrinityError as error:
        raise TrinityError(f"the model cannot have this layout: {error}") from error
    return args


def _command_line(saved: Namespace, layout: Layout) -> list[str]:
    words = {flag: str(layout.sizes[key]) for key, flag in FLAGS.items() if key in layout.sizes}
    if layout.stages is not None:
        words["--pipeline-model-parallel-layout"] = layout.stages
    words |= {
        "--seq-length": str(saved.seq_length),
        "--make-vocab-size-divisible-by": str(saved.make_vocab_size_divisible_by),
        "--load-balancing": saved.load_balancing,
        "--transformer-impl": "local",  # whose names of tensors need no GPU
        "--tokenizer-type": "NullTokenizer",
        "--micro-batch-size": "1",
        "--train-iters": "1",
        "--lr": "0",
    }
    flags = [word for pair in words.items() for word in pair]
    flags += ["--cp-comm-type", *saved.cp_comm_type] if layout.size("cp") > 1 else []
    flags += ["--sequence-parallel"] if layout.size("tp") > 1 else []
    flags += ["--bf16"] if saved.bf16 else []
    return [*flags_from_hf_config(hf_config_from_args(saved)), *flags]


def with_layout(saved: Namespace, args: Namespace) -> Namespace:
    """`saved` as if the run had been in the layout of `args`."""
    changed = copy.copy(saved)
    for name in STORED:
        setattr(changed, name, getattr(args, name))
    return changed
