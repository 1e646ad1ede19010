"""The check of a node, with stand-ins for the driver's commands on PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess, run

import pytest

from megatron_trinity.command_line.node import disk, speed
from megatron_trinity.command_line.node.floors import read_floors
from megatron_trinity.command_line.node.kernel_log import xid_finding
from megatron_trinity.errors import UsageError
from tests.paths import ROOT

STAND_INS = ROOT / "tests/slurm/stand_ins"


def check(path: Path, *flags: str, **more: str) -> CompletedProcess[str]:
    floors = path / "floors.yaml"
    floors.write_text(
        "disk_free_gb: 0\ndevices: {H100: {number: 2, nvlinks: 18, product_tflops: 0}}\n"
    )
    words = ("--quick", "--path", str(path), "--floors", str(floors), *flags)
    given = {"PATH": f"{STAND_INS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return run(
        [sys.executable, str(ROOT / "tools/check_node.py"), *words],
        env=os.environ | given | more,
        capture_output=True,
        text=True,
    )


def test_a_good_node(tmp_path: Path) -> None:
    told = check(tmp_path, "--require-gpu")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0] == "node: devices ok 2 of 2: NVIDIA H100 80GB HBM3"
    assert "node: NVLink ok on 2 devices, of 18 links" in lines
    assert "node: Xids ok none in 24 hours" in lines
    assert "node: temperature ok 43 C, at most 87" in lines
    assert not list(tmp_path.glob(".check*"))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"BAD_NODE": "x", "SLURMD_NODENAME": "x", "XID": "79", "BAD_LINK": "1", "ROWS": "Yes"},
            [
                "bad: ECC, uncorrected: GPU 1: 3",
                "bad: ECC, remapped rows: pending or failed on GPU 1",
                "bad: NVLink: GPU 1: 17, of 18 links",
                "bad: Xids: 79 on 0000:86:00 x1",
            ],
        ),
        ({"XID": "31"}, []),
    ],
)
def test_what_is_bad_is_named(tmp_path: Path, more: dict[str, str], line: list[str]) -> None:
    told = check(tmp_path, **more)
    assert told.stderr.splitlines() == line
    assert told.returncode == bool(line)


def test_a_node_without_gpus(tmp_path: Path) -> None:
    none = {"PATH": str(tmp_path)}  # no command at all
    told = check(tmp_path, **none)
    assert told.returncode == 0
    assert "node: devices not here nvidia-smi is not installed" in told.stdout.splitlines()
    told = check(tmp_path, "--require-gpu", **none)
    assert told.returncode == 1
    assert told.stderr == "bad: devices: nvidia-smi is not installed\n"


def test_an_old_xid_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dmesg = tmp_path / "dmesg"
    dmesg.write_text("#!/bin/sh\necho '[ 10.5] NVRM: Xid (PCI:0000:3b:00): 79, gone.'\n")
    dmesg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    floors = read_floors(None)
    assert xid_finding(floors, uptime=86_000.0).words == "79 on 0000:3b:00 x1"
    assert xid_finding(floors, uptime=86_411.0).status == "ok"


def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = read_floors(None) | {"disk_free_gb": 0}
    assert [one.status for one in disk.disk_findings(tmp_path, floors)] == ["ok", "ok"]
    full = disk.disk_findings(tmp_path, floors | {"disk_free_gb": 1e9})
    assert [one.status for one in full] == ["bad", "ok"]
    [gone] = disk.disk_findings(tmp_path / "gone", floors)
    assert gone.status == "bad"
    now = disk.time.time
    monkeypatch.setattr(disk.time, "time", lambda: now() - 60)
    clock = disk.disk_findings(tmp_path, floors)[1]
    assert clock.status == "bad"
    assert clock.words.startswith(("59.", "60."))


def test_speed_is_measured_and_results_are_judged() -> None:
    tflops, right = speed.product("cpu", 64)
    assert tflops > 0
    assert right
    slow = speed._judge_products([(700.0, True), (500.0, True)], {"product_tflops": 600})
    assert (slow.status, slow.words) == ("bad", "GPU 1: 500 TFLOP/s, at least 600")
    wrong = speed._judge_products([(700.0, False)], {"product_tflops": 600})
    assert (wrong.status, wrong.words[:19]) == ("bad", "GPU 0: 700, and wro")


@pytest.mark.slow
def test_the_sum_over_ranks() -> None:
    gb_per_s, right = speed.all_reduce(2, 1 << 16, "cpu")
    assert gb_per_s > 0
    assert right


def test_a_name_that_there_is_not(tmp_path: Path) -> None:
    file = tmp_path / "floors.yaml"
    file.write_text("disk: 3\n")
    with pytest.raises(UsageError, match="no such name: disk"):
        read_floors(file)
