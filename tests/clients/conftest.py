"""The environments of clients, which are not the project's: their versions are others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trinity.data.tokenizer import save_tokenizer, train_tokenizer
from tests.afmoe import random_tensors, write_afmoe
from tests.clients.exports import CONFIG, TEXT, export
from tests.distributed.pool import RankPools
from tests.environments import prepared


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-vllm`."""
    return prepared(request, "vllm")


@pytest.fixture(scope="session")
def clients_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-clients`."""
    return prepared(request, "clients")


@pytest.fixture(scope="session")
def exports(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has exports of one model: `fp32` and `bf16`."""
    root = tmp_path_factory.mktemp("clients")
    (root / "tokenizer").mkdir()
    save_tokenizer(train_tokenizer([TEXT] * 3, CONFIG.vocab_size), root / "tokenizer")
    write_afmoe(root / "random", CONFIG, random_tensors(CONFIG, torch.float32))
    ranks.run(export, root, world_size=1)
    return root
