"""What no tool takes for a checkpoint of Trinity."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
from megatron_trinity.errors import TrinityError
from megatron_trinity.model.architecture import FIXED
from tests.checkpoints import model_args, model_tensors, write_checkpoint


@pytest.mark.parametrize("name", FIXED)
def test_a_model_that_afmoe_is_not_is_refused(tmp_path: Path, name: str) -> None:
    args = model_args()
    assert vars(args)[name] == FIXED[name]
    TorchDistCheckpoint(write_checkpoint(tmp_path / "run", model_tensors(), args))
    setattr(args, name, "another value")
    path = write_checkpoint(tmp_path / "other", model_tensors(), args)
    with pytest.raises(TrinityError) as refused:
        TorchDistCheckpoint(path)
    assert f"it was trained with {name} another value, and AfMoE has {FIXED[name]}" in str(
        refused.value
    )
