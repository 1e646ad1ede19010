"""What saving and loading do around Megatron's own work, so that a checkpoint is whole or nothing.

Every save ends with its data files, what says where in them each tensor is, the manifest, and the
pointer, in this order. Every load verifies against the manifest what it is about to read.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training.utils import print_rank_0

from megatron_trinity.checkpoint.iterations import (
    METADATA,
    has_manifest,
    iterations,
    mark_interrupted,
    number_of,
)
from megatron_trinity.checkpoint.rank_files.checkpoint import RankCheckpoint, rank_files
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint, TorchDistTensors
from megatron_trinity.checkpoint.whole.candidates import discard, superfluous, sweep
from megatron_trinity.checkpoint.whole.hold import Hold
from megatron_trinity.checkpoint.whole.manifest import faults, read_manifest, write_manifest
from megatron_trinity.data.run_data import RunData
from megatron_trinity.errors import StepError, TrinityError
from megatron_trinity.training.data_given import given_values
from megatron_trinity.training.finite import nonfinite_value
from megatron_trinity.training.load_paths import goes_on_in_save
from megatron_trinity.training.resume import candidates, refuse_skipped, start_of, unusable
from megatron_trinity.training.spikes import HISTORY
from megatron_trinity.upstream.checkpoint_failures import REMEDY, what_failed
from megatron_trinity.upstream.checkpoint_sums import take_sums
from megatron_trinity.upstream.checkpoint_tracker import TRACKER, named_by, replacing

Candidate = tuple[Path, str | None]


class WholeCheckpoints:
    """The hooks of a run whose checkpoints are whole or nothing.

    Args:
        args: of the run.
        checked: the iteration of which `check_checkpoint` has seen that it is of this run.
        held: `--save`, on rank 0.
        data: what the run reads; None for mock data.
    """

    def __init__(
        self,
        args: Namespace,
        checked: Path | None,
        held: Hold | None,
        data: RunData | None = None,
    ) -> None:
        self._args = args
        self._checked = checked
        self._held = held
        self._data = data

    def check_values(self, model: Sequence[Any], optimizer: Any, directory: Path) -> None:
        """Save nothing that is not finite.

        Raises:
            StepError: a value is not; nothing has been written.
        """
        if (found := nonfinite_value(model, optimizer)) is not None:
            raise StepError(
                f"{found} is not finite, so {directory.name} is not saved and the checkpoint "
                "before it stays the newest; start again from that one"
            )
        if self._data is not None and self._data.plan is not None:
            self._args.data_given = given_values(self._data.plan, self._args.consumed_train_samples)

    def before_save(self, directory: Path) -> None:
        """Remove what another run has left where this one is about to write."""
        self._check_held()
        try:
            mark_interrupted(directory)
            if directory.is_symlink() or directory.exists():
                discard(directory)
        except OSError as error:
            raise TrinityError(
                f"{directory} cannot be saved: {what_failed(error, str(directory.parent))}; "
                f"{REMEDY}"
            ) from error

    def before_pointer(self, directory: Path) -> None:
        """Write the manifest, from sums that the writers of the files have computed."""
        self._check_held()
        write_manifest(directory, take_sums(directory))

    def after_pointer(self, directory: Path) -> None:
        """Delete the checkpoints that are not to be kept."""
        last, every = self._args.keep_last_checkpoints, self._args.keep_every_iterations
        try:
            if last is not None or every is not None:
                for path in superfluous(directory.parent, last, every):
                    discard(path)
            sweep(directory.parent)
        except OSError as error:  # the run needs none of them
            print_rank_0(f"WARNING: an old checkpoint could not be deleted: {error}")

    def _check_held(self) -> None:
        if self._held is not None:
            self._held.check()

    def choose(self) -> Path | None:
        """The newest iteration under `--load` that is whole, or the one of `--ckpt-step`.

        Every rank reads its share of the files, and all come to the same result.

        Raises:
            TrinityError: there are checkpoints, and none of them can be loaded.
        """
        found = candidates(self._args) if dist.get_rank() == 0 else iter(())
        skipped: list[str] = []
        while (candidate := _of_rank_0(next(found, None))) is not None:
            path, fault = candidate
            fault = fault or self._fault(path)
            if fault is None and path != self._checked:
                fault = unusable(self._args, path)
            if fault is None:
                if dist.get_rank() == 0:
                    self._mend_pointer(path)
                return path
            skipped.append(f"{path}: {fault}")
            print_rank_0(f"WARNING: skipped {skipped[-1]}")
        refuse_skipped(self._args, skipped)
        if self._args.load is not None:
            for path in iterations(Path(self._args.load)):
                print_rank_0(f"WARNING: skipped {path}: its save was interrupted; nothing is lost")
        return None

    def _mend_pointer(self, chosen: Path) -> None:
        """Let the pointer of `--save` name what it has lagged behind: other programs follow it.

        A run that was killed in its last save leaves it so, and no later one has to save.
        """
        if not goes_on_in_save(self._args) or self._args.ckpt_step is not None:
            return
        pointer = chosen.parent / TRACKER
        try:
            lags = not pointer.exists() or number_of(named_by(pointer)) < number_of(chosen)
        except (OSError, ValueError):
            return  # it has been skipped with a line
        if lags:
            with replacing(pointer) as stream:
                stream.write(str(number_of(chosen)))
            print_rank_0(f"WARNING: {pointer} lagged behind {chosen.name}; it names that now")

    def loaded(self, model: Sequence[Any], optimizer: Any, directory: Path) -> None:
        """Refuse to go on from what is not finite.

        Raises:
            TrinityError: a value is not.
        """
        if (found := nonfinite_value(model, optimizer)) is not None:
            raise TrinityError(
                f"{found} is not finite in {directory}, so no training can go on from it; move it "
                "away to start from the one before, or name one with --ckpt-step"
            )
        if self._args.spike_factor and start_of(self._args, directory):
            kind = RankCheckpoint if rank_files(directory) else TorchDistCheckpoint
            setattr(self._args, HISTORY, getattr(kind(directory).args, HISTORY, {}))

    def _fault(self, path: Path) -> str | None:
        """What is wrong with an iteration, the same on every rank; each reads its share."""
        if not has_manifest(path):
            print_rank_0(f"WARNING: nothing says whether {path} is whole: it has no manifest")
        elif self._args.verify_checkpoint and (fault := _of_any_rank(_changed_file, path)):
            return fault
        # Whole files may hold what no reader takes for data, and Megatron fails at it late.
        return _of_any_rank(_unreadable_object, path)


def _of_any_rank(look: Callable[[Path, slice], str | None], path: Path) -> str | None:
    """What `look` finds in the shares of all ranks, the first of it."""
    try:
        found = look(path, slice(dist.get_rank(), None, dist.get_world_size()))
    except TrinityError as error:
        found = str(error).removeprefix(f"{path}: ")
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return next((fault for fault in everywhere if fault is not None), None)


def _changed_file(path: Path, share: slice) -> str | None:
    files = read_manifest(path)
    names = sorted(files, key=lambda name: files[name].bytes, reverse=True)[share]
    return next(faults(path, {name: files[name] for name in names}, checksums=True), None)


def _unreadable_object(path: Path, share: slice) -> str | None:
    if (path / METADATA).is_file():
        tensors = TorchDistTensors(path)
        for key in tensors.object_keys()[share]:
            tensors.object(key)
    return None


def _of_rank_0(value: Candidate | None) -> Candidate | None:
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
