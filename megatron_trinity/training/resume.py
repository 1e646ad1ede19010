"""Before a run resumes: is there a checkpoint, can it be read, and is it of this model?"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.training.utils import warn_rank_0

from megatron_trinity.checkpoint.torch_dist import RELEASE, TRACKER, TorchDistCheckpoint
from megatron_trinity.errors import UsageError

SHAPE = (
    "num_layers",
    "num_dense_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "num_shared_experts",
    "vocab_size",
)
"""Arguments that two runs must share for one to load the other's weights."""


def check_checkpoint(args: Namespace) -> None:
    """Refuse to load a checkpoint that is not whole, or of another model.

    A `--load` directory without any checkpoint is the start of a new run, as in Megatron.

    Raises:
        UsageError: the checkpoint is of another model, or has the state of another optimizer; names
            what differs.
        TrinityError: it cannot be read.
    """
    if args.load is None or args.ckpt_format != "torch_dist":
        return
    directory = Path(args.load)
    if args.ckpt_step is not None:
        directory /= f"iter_{args.ckpt_step:07d}"
    elif not (directory / TRACKER).is_file():
        return
    checkpoint = TorchDistCheckpoint(directory)
    saved = checkpoint.args
    differences = [
        f"--{name.replace('_', '-')} is {getattr(saved, name)} there and {getattr(args, name)} here"
        for name in SHAPE
        if getattr(saved, name) != getattr(args, name)
    ]
    if differences:
        raise UsageError(
            f"the checkpoint under {args.load} is of another model: {'; '.join(differences)}; "
            "give the preset of that run, or another --load"
        )
    if not (args.finetune or args.no_load_optim or checkpoint.path.name == RELEASE):
        if not checkpoint.has_optimizer:
            raise UsageError(
                f"the checkpoint under {args.load} has no state of an optimizer; give "
                "--no-load-optim to start without, or --finetune"
            )
        there, here = _optimizer(saved), _optimizer(args)
        if there != here:
            raise UsageError(
                f"the checkpoint under {args.load} has the state of {there}, this run needs that "
                f"of {here}; give the flags of that run, or --no-load-optim to start without state"
            )
    if args.load_balancing == "smebu" and not checkpoint.has_momentum:
        warn_rank_0(
            f"the checkpoint under {args.load} has no momentum of SMEBU; it starts from zero"
        )


def _optimizer(args: Namespace) -> str:
    """What decides which state each parameter has, in words."""
    if args.optimizer != "muon":
        return f"--optimizer {args.optimizer}"
    if not hasattr(args, "router_optimizer"):
        return "megatron-core's Muon"
    return f"--optimizer muon --router-optimizer {args.router_optimizer}"
