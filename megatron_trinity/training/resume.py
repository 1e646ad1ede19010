"""Before a run resumes: is there a checkpoint, can it be read, and is it of this model?"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.training.utils import warn_rank_0

from megatron_trinity.checkpoint.iterations import RELEASE, newest_saved, number_of
from megatron_trinity.checkpoint.rank_files.checkpoint import RankCheckpoint, rank_files
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
from megatron_trinity.checkpoint.whole.candidates import examine, is_empty
from megatron_trinity.data.fingerprint import difference
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.training.load_paths import (
    goes_on_in_save,
    refuse_iterations,
    refuse_nothing,
)

SHOWN = 3
"""How many checkpoints an error names."""

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

COMPUTED = (
    "sliding_window",
    "global_attn_every_n_layers",
    "moe_router_topk",
    "moe_router_topk_scaling_factor",
    "mup_enabled",
    "rotary_base",
    "layernorm_epsilon",
)
"""Arguments that decide what a model of these sizes computes."""

LENGTH = ("seq_length",)
"""What an extension of the context changes."""

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Arguments that they must share as well where each rank has a file."""


def check_checkpoint(args: Namespace) -> Path | None:
    """Refuse to load what is not whole as far as sizes say, or is of another model.

    Where `--load` and `--save` are one directory, it may be without any: a new run starts there.

    Returns:
        the iteration that the run will load unless its checksums differ, or None.

    Raises:
        UsageError: nothing is there to load, or one iteration in place of a run. Or the checkpoint
            is of another model, or has the state of another optimizer; names what differs. Or
            `--save` has iterations that a later start would load in its place.
        TrinityError: there are checkpoints, and none can be loaded. Or `--save` cannot be written.
    """
    refuse_iterations(args)
    if not goes_on_in_save(args):
        refuse_nothing(args, "load")
    skipped: list[str] = []
    chosen = None
    for path, fault in candidates(args):
        fault = fault or unusable(args, path)
        if fault is None:
            chosen = path
            break
        skipped.append(f"{path}: {fault}")
    if chosen is None:
        refuse_skipped(args, skipped)
        refuse_nothing(args, "pretrained_checkpoint")
        if args.exit_on_missing_checkpoint:
            refuse_nothing(args, "load")
    if args.save and not args.skip_train:
        check_writable(Path(args.save))
        _check_nothing_newer(args, chosen)
    return chosen


def candidates(args: Namespace) -> Iterator[tuple[Path, str | None]]:
    """What the run may load, and what is wrong with it or None; see `examine`.

    Nothing where no checkpoint is: a run that was killed in its first save starts anew.
    """
    for directory in (args.load, args.pretrained_checkpoint):
        named = args.ckpt_step is not None
        if directory is not None and (named or not is_empty(Path(directory))):
            return examine(Path(directory), args.ckpt_step)
    return iter(())


def refuse_skipped(args: Namespace, skipped: Sequence[str]) -> None:
    """Refuse to start anew where there are checkpoints, all of which were skipped.

    Raises:
        TrinityError: in one line, what is wrong with the first of them.
    """
    if not skipped:
        return
    if args.ckpt_step is not None:
        raise TrinityError(
            f"{skipped[0]}; it was named with --ckpt-step: name another one, or leave it out to "
            "load the newest that is whole"
        )
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    raise TrinityError(
        f"no checkpoint under {args.load or args.pretrained_checkpoint} is whole: "
        f"{'; '.join(skipped[:SHOWN])}{more}; restore one, or give another --load (one that was "
        "saved without a manifest is loaded when --ckpt-step names it)"
    )


def unusable(args: Namespace, path: Path) -> str | None:
    """What keeps an iteration from being read, or None.

    Raises:
        UsageError: it is of another model, optimizer, format or layout; names what differs.
    """
    there = "torch" if rank_files(path) else "torch_dist"
    if there != args.ckpt_format:
        _refuse_format(args, path, there)
    try:
        checkpoint = (RankCheckpoint if there == "torch" else TorchDistCheckpoint)(path)
    except TrinityError as error:
        return str(error).removeprefix(f"{path} ")
    _check_is_of_this_run(args, checkpoint)
    return None


def start_of(args: Namespace, chosen: Path | None) -> int:
    """The iteration that a run begins at, with the checkpoint that it has chosen."""
    return 0 if chosen is None or _starts_anew(args, chosen) else number_of(chosen)


def _starts_anew(args: Namespace, path: Path) -> bool:
    """Whether the run takes weights alone from what it loads, and begins at iteration 0."""
    return bool(args.finetune or args.load is None or Path(args.load) != path.parent)


def _refuse_format(args: Namespace, path: Path, there: str) -> None:
    """Refuse what is not in the format of the run, but where Megatron converts it."""
    if there == "torch":
        if args.auto_detect_ckpt_format:
            return
        remedy = "give --auto-detect-ckpt-format to load it and save in torch_dist"
    else:
        remedy = "leave out --ckpt-format, or convert it with tools/reshard.py --format torch"
    raise UsageError(
        f"the checkpoint under {path.parent} is in --ckpt-format {there}, and this run has "
        f"{args.ckpt_format}; {remedy}"
    )


def _check_is_of_this_run(
    args: Namespace, checkpoint: TorchDistCheckpoint | RankCheckpoint
) -> None:
    path = checkpoint.path
    saved = checkpoint.args
    if differences := _differences(saved, args, (*SHAPE, *COMPUTED)):
        raise UsageError(
            f"the checkpoint under {path.parent} is of another model: {differences}; give the "
            "preset of that run, or another --load"
        )
    of_no_run = path.name == RELEASE
    if not (_starts_anew(args, path) or of_no_run or args.extend_context) and (
        differences := _differences(saved, args, LENGTH)
    ):
        raise UsageError(
            f"the checkpoint under {path.parent} is of another length of sequences: {differences}; "
            "give that length, --extend-context to go on with another, or --finetune to start anew "
            "from the weights"
        )
    if not (_starts_anew(args, path) or of_no_run or args.accept_changed_data):
        _check_data(args, saved, path)
    if isinstance(checkpoint, RankCheckpoint) and (
        differences := _differences(saved, args, LAYOUT)
    ):
        raise UsageError(
            f"the checkpoint under {path.parent} has a file for each rank of another layout: "
            f"{differences}; give the layout of that run, and save in --ckpt-format torch_dist "
            "with --auto-detect-ckpt-format: any layout loads that"
        )
    if isinstance(checkpoint, RankCheckpoint) and _backend(saved) != _backend(args):
        raise UsageError(
            f"the checkpoint under {path.parent} has a file for each rank with the names that "
            f"tensors have with {_backend(saved)}, and this run has {_backend(args)}; give the "
            "flags of that run, and save in --ckpt-format torch_dist with "
            "--auto-detect-ckpt-format: either loads that"
        )
    if not (_starts_anew(args, path) or args.no_load_optim or path.name == RELEASE):
        if not checkpoint.has_optimizer:
            raise UsageError(
                f"the checkpoint under {path.parent} has no state of an optimizer; give "
                "--no-load-optim to start without, or --finetune"
            )
        there, here = _optimizer(saved), _optimizer(args)
        if there != here:
            raise UsageError(
                f"the checkpoint under {path.parent} has the state of {there}, this run needs that "
                f"of {here}; give the flags of that run, or --no-load-optim to start without state"
            )
    if args.load_balancing == "smebu" and not checkpoint.has_momentum:
        warn_rank_0(
            f"the checkpoint under {path.parent} has no momentum of SMEBU; it starts from zero"
        )


def _check_data(args: Namespace, saved: Namespace, path: Path) -> None:
    here, there = getattr(args, "data_fingerprint", None), getattr(saved, "data_fingerprint", None)
    if here is None:
        return
    if there is None:
        warn_rank_0(f"nothing says which data the checkpoint under {path.parent} was trained on")
    elif (changed := difference(there, here)) is not None:
        raise UsageError(
            f"the checkpoint under {path.parent} is of a run that reads other data: {changed}; "
            "give the data and the seed of that run, --accept-changed-data to go on with these "
            "from the same number of samples, or --finetune to start anew from the weights"
        )


def _backend(args: Namespace) -> str:
    """The flags that decide what a rank calls its tensors."""
    grouped = args.transformer_impl == "transformer_engine" and args.moe_grouped_gemm
    return f"--transformer-impl {args.transformer_impl}{' --moe-grouped-gemm' if grouped else ''}"


def _differences(saved: Namespace, args: Namespace, names: Sequence[str]) -> str:
    """Arguments that are not alike, in words."""
    return "; ".join(
        f"{_flag(name)} is {getattr(saved, name)} there and {getattr(args, name)} here"
        for name in names
        if _meant(saved, name) != _meant(args, name)
    )


def _flag(name: str) -> str:
    return {"layernorm_epsilon": "--norm-epsilon"}.get(name, f"--{name.replace('_', '-')}")


def _meant(args: Namespace, name: str) -> object:
    value = getattr(args, name)
    return 1.0 if value is None and name == "moe_router_topk_scaling_factor" else value


def check_writable(save: Path) -> None:
    """Say now, and not at the first save, that there can be none.

    Raises:
        TrinityError: in one line, what cannot be written to.
    """
    there = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise TrinityError(f"--save {save} cannot be written: {there} is not a writable directory")


def _check_nothing_newer(args: Namespace, chosen: Path | None) -> None:
    """Refuse to write older iterations beside newer ones of another run."""
    start = start_of(args, chosen)
    goes_on = chosen is not None and not _starts_anew(args, chosen)
    if goes_on and args.ckpt_step is None and goes_on_in_save(args):
        return  # whatever is newer there was skipped
    newest = newest_saved(Path(args.save))
    if newest is not None and number_of(newest) > start:
        raise UsageError(
            f"--save {args.save} has {newest.name} already, and this run starts at iteration "
            f"{start}: later starts would load that one; move it away, or give another --save"
        )


def _optimizer(args: Namespace) -> str:
    """What decides which state each parameter has, in words."""
    if args.optimizer != "muon":
        return f"--optimizer {args.optimizer}"
    if not hasattr(args, "router_optimizer"):
        return "megatron-core's Muon"
    return f"--optimizer muon --router-optimizer {args.router_optimizer}"
