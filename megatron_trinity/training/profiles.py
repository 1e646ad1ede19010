"""Which steps PyTorch's profiler sees when a run goes on from a checkpoint."""

from __future__ import annotations

from argparse import Namespace

from megatron_trinity.errors import UsageError


def check_profile(args: Namespace, start: int) -> None:
    """Refuse a profile that Megatron would cut off or never write, in a run that resumes.

    Megatron counts the steps of `--profile-step-start` and `--profile-step-end` from where the
    process starts, but ends the profile at an iteration of the run. In the middle of the
    steps that is the end of the process as well, by a segmentation fault of the profiler.

    Args:
        start: the iteration that the run begins at.

    Raises:
        UsageError: the profile would not be whole.
    """
    if not (args.profile and args.use_pytorch_profiler) or start == 0:
        return
    end = args.profile_step_end
    if end > start:
        raise UsageError(
            f"--profile-step-end {end}: the run goes on at iteration {start}, and PyTorch's "
            f"profiler counts steps from there; use {start} or less"
        )
    if args.train_iters is not None and start + end > args.train_iters:
        raise UsageError(
            f"--profile-step-end {end} counts from iteration {start}, where the run goes on, and "
            f"is behind its end at {args.train_iters}; use {args.train_iters - start} or less"
        )
