"""What `--load` and `--pretrained-checkpoint` name: a run's directory with something in it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_trinity.checkpoint.hf.directory import hugging_face_hint
from megatron_trinity.checkpoint.iterations import RELEASE, number_of
from megatron_trinity.checkpoint.whole.candidates import is_empty, is_iteration
from megatron_trinity.errors import UsageError


def goes_on_in_save(args: Namespace) -> bool:
    """Whether the run loads from where it saves: the first of its starts finds nothing there."""
    return bool(args.load and args.save) and Path(args.load).resolve() == Path(args.save).resolve()


def refuse_iterations(args: Namespace) -> None:
    """Refuse the directory of an iteration, in which Megatron would look for iterations.

    Raises:
        UsageError: one is given; says how to name that iteration.
    """
    for name in ("load", "pretrained_checkpoint"):
        path = Path(getattr(args, name) or "")
        if is_iteration(path):
            flag = "--" + name.replace("_", "-")
            step = "" if path.name == RELEASE else f" --ckpt-step {number_of(path)}"
            raise UsageError(
                f"{flag} {path} is one iteration of a run; give {flag} {path.parent}{step}"
            )


def refuse_nothing(args: Namespace, name: str) -> None:
    """Refuse to train from random weights where others were asked for.

    Args:
        name: of the argument, `load` or `pretrained_checkpoint`.

    Raises:
        UsageError: its directory has no checkpoint.
    """
    if (given := getattr(args, name)) is None or not is_empty(directory := Path(given)):
        return
    if hint := hugging_face_hint(directory):
        raise UsageError(hint)
    flag = "--" + name.replace("_", "-")
    found = "holds no checkpoint" if directory.exists() else "is not there"
    raise UsageError(
        f"{flag} {given} {found}; give the directory of a run, or leave it out to start from new "
        "weights (a new run may have one directory for --load and --save)"
    )
