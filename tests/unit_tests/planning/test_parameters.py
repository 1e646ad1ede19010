"""Parameter counts against the published ones, and bytes against a count by hand."""

from __future__ import annotations

import pytest

from megatron_trinity.planning.parameters import (
    active_parameters,
    total_parameters,
    training_state_bytes,
)
from tests.unit_tests.planning.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_published_numbers(name: str) -> None:
    preset = PRESETS[name]
    assert total_parameters(preset.sizes) == preset.total
    assert active_parameters(preset.sizes) == preset.active
    # Embedding and LM head have a row more for each row of padding.
    padded = total_parameters(preset.sizes, preset.sizes.vocab_size + 512)
    assert padded - preset.total == 2 * 512 * preset.sizes.hidden_size


def test_training_state() -> None:
    # 100 parameters in bf16 with fp32 gradients; a fifth and a half of them with optimizer state,
    # and a second moment of ten.
    assert training_state_bytes(60, 40, 5, 2, adamw=10) == 600 + 8 * (12 + 20) + 4 * 2
    assert training_state_bytes(7, 0, 2, 2, adamw=0, gradient_bytes=2) == 28 + 8 * 4
