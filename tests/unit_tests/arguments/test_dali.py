"""`--dataloader-type dali`: Megatron is told of its own loader, and DALI has to be there."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_trinity.arguments import data
from megatron_trinity.errors import UsageError


@pytest.mark.parametrize("loader", [None, "single", "dali"])
def test_the_loader(monkeypatch: pytest.MonkeyPatch, loader: str | None) -> None:
    monkeypatch.setattr(data, "dali_is_installed", lambda: True)
    args = Namespace(dataloader_type=loader, mock_data=False)
    data.derive_data(args)
    assert args.dali == (loader == "dali")
    assert args.dataloader_type == ("single" if loader == "dali" else loader)


@pytest.mark.parametrize(
    ("installed", "mock", "says"), [(False, False, "not installed"), (True, True, "--mock-data")]
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: bool, mock: bool, says: str
) -> None:
    monkeypatch.setattr(data, "dali_is_installed", lambda: installed)
    with pytest.raises(UsageError, match=says):
        data.derive_data(Namespace(dataloader_type="dali", mock_data=mock))


@pytest.mark.parametrize(("dali", "workers", "lines"), [(True, 2, 1), (True, 0, 0), (False, 2, 0)])
def test_workers_that_dali_has_not_are_told(dali: bool, workers: int, lines: int) -> None:
    notes = data.data_notes(Namespace(dali=dali, num_workers=workers))
    assert len(notes) == lines
    assert all("--num-workers 2" in note for note in notes)
