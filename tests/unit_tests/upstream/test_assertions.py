"""Megatron's requirements as one line; `test_bad_input.py` has one without a message."""

from __future__ import annotations

import pytest

from megatron_trinity.errors import UsageError, root_cause
from megatron_trinity.upstream.assertions import refusing


def test_a_message_is_passed_on_in_one_line() -> None:
    with pytest.raises(UsageError) as raised, refusing("the arguments do not fit"):
        raise ValueError("two\n  lines")
    assert str(raised.value) == "the arguments do not fit: two lines"
    assert isinstance(raised.value.__cause__, ValueError)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(KeyError), refusing("no"):
        raise KeyError("x")


def test_the_root_cause_is_the_innermost_error() -> None:
    outer = RuntimeError("could not write")
    outer.__cause__ = OSError("disk\nfull")
    assert root_cause(outer) == "disk full"
    assert root_cause(KeyError()) == "KeyError"
