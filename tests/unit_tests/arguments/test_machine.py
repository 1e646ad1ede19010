"""What is set on a machine by the time that CUDA starts."""

from __future__ import annotations

import os
from argparse import Namespace

import pytest
import torch

from megatron_trinity.arguments.machine import prepare_machine

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("major", "tensor", "given", "at_start", "after"),
    [
        (9, 2, None, ["1"], "1"),
        (10, 2, None, ["1"], None),
        (10, 2, "8", ["8"], "8"),
        (9, 1, None, [], None),
        (9, 1, "8", [], "8"),
    ],
)
def test_the_order_of_queues_is_there_when_cuda_starts(
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    tensor: int,
    given: str | None,
    at_start: list[str],
    after: str | None,
) -> None:
    seen = []

    def capability(device: object = None) -> tuple[int, int]:
        seen.append(os.environ[NAME])
        return major, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    prepare_machine(
        Namespace(
            tensor_model_parallel_size=tensor, context_parallel_size=1, deterministic_mode=False
        )
    )
    assert seen == at_start
    assert os.environ.get(NAME) == after
