"""Variables that arguments ask for, as a table."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_trinity.arguments.environment import missing, settings
from megatron_trinity.errors import UsageError

QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
DETERMINISM = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def arguments(tensor: int = 1, context: int = 1, deterministic: bool = False) -> Namespace:
    return Namespace(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        deterministic_mode=deterministic,
    )


@pytest.mark.parametrize(
    ("args", "capability", "expected"),
    [
        (arguments(), 9, {}),
        (arguments(tensor=2), 9, QUEUES),
        (arguments(context=2), 8, QUEUES),
        (arguments(tensor=2), 10, {}),
        (arguments(tensor=2), None, {}),
        (arguments(deterministic=True), 9, DETERMINISM),
        (arguments(deterministic=True, tensor=2), 9, QUEUES | DETERMINISM),
    ],
)
def test_what_is_set(args: Namespace, capability: int | None, expected: dict[str, str]) -> None:
    wanted = settings(args, capability)
    assert missing(wanted, {}) == expected
    assert missing(wanted, expected) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8"),
        ("NCCL_ALGO", "Tree"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:2"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_another_value_is_refused_with_the_line_to_type(name: str, value: str) -> None:
    wanted = settings(arguments(tensor=2, deterministic=True), 9)
    right = (QUEUES | DETERMINISM)[name]
    with pytest.raises(UsageError) as refusal:
        missing(wanted, {name: value})
    assert str(refusal.value).startswith(f"{name} is {value!r}, and ")
    assert str(refusal.value).endswith(f"needs {right}: unset {name}, or export {name}={right}")


def test_values_that_do_as_well_are_left_alone() -> None:
    wanted = settings(arguments(deterministic=True), 9)
    given = {"NCCL_ALGO": "Ring,CollnetDirect", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert missing(wanted, given) == {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
