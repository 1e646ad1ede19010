"""Weights where nearly every user has them: the Hub's cache, made of links, by path and by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from megatron_trinity.checkpoint.hf.hub import Found, find_model
from megatron_trinity.errors import TrinityError, UsageError
from tests.afmoe import INDEX, random_tensors, write_afmoe
from tests.paths import ROOT
from tests.trinity import afmoe_config
from tests.unit_tests.checkpoint.hf.test_export_hf import write_tokenizer

NAME = "some-lab/Trinity-Small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OBJECTS = "__1_0.distcp"  # of a checkpoint of one file: the arguments, with the tokenizer's path
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    config = afmoe_config()
    hf = write_afmoe(tmp_path / "plain", config, random_tensors(config, torch.bfloat16), files=2)
    write_tokenizer(hf)
    return hf


def fill_cache(cache: Path, plain: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """The Hub's own layout: a snapshot of relative links into blobs, and a ref that names it."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        blob = repository / "blobs" / f"{commit}{number}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / ref).write_text(commit)
    return snapshot


class FakeHub(ThreadingHTTPServer):
    """A Hub of one model on this machine, which notes what it is asked for."""

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = files
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        files = {file.name: file for file in self.server.files.iterdir()}
        if path == f"/api/models/{NAME}/revision/main":
            self._send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name}
                for name, file in files.items()
            ]
            self._send(json.dumps(tree).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and path.rpartition("/")[2] in files:
            self._send(files[path.rpartition("/")[2]].read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: what was asked for is noted."""


@pytest.fixture
def hub(plain: Path) -> Iterator[FakeHub]:
    with FakeHub(plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(cache: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [sys.executable, "tools/import_hf.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def checkpoint_files(save: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in [*(save / "release").glob("*.distcp"), *(save / "tokenizer").iterdir()]
        if file.name != OBJECTS
    }


def test_a_snapshot_by_path_and_by_name_is_what_it_links_to(
    plain: Path, tmp_path: Path, hub: FakeHub
) -> None:
    cache = tmp_path / "cache"
    snapshot = fill_cache(cache, plain)
    for hf, save in ((plain, "plain"), (snapshot, "path"), (NAME, "name")):
        done = command(cache, hub.url, "--hf", str(hf), "--save", str(tmp_path / "out" / save))
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{NAME}: revision {COMMIT}, {snapshot}"
    assert hub.asked == []
    expected = checkpoint_files(tmp_path / "out/plain")
    assert "__0_0.distcp" in expected
    assert {"tokenizer.json", "tokenizer_config.json"} < expected.keys()
    for save in ("path", "name"):
        assert checkpoint_files(tmp_path / "out" / save) == expected
        assert not any(file.is_symlink() for file in (tmp_path / "out" / save).rglob("*"))


@pytest.mark.slow
def test_what_the_cache_lacks_is_downloaded(plain: Path, tmp_path: Path, hub: FakeHub) -> None:
    (plain / "pytorch_model.bin").write_bytes(b"the same weights once more")
    save = tmp_path / "save"
    words = ("--hf", NAME, "--save", str(save))
    done = command(tmp_path / "cache", hub.url, *words)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert (
        first == f"{NAME} is no directory, and the Hub's cache has not all of {NAME}: downloading"
    )
    assert second.startswith(f"{NAME}: revision {COMMIT}, {tmp_path / 'cache'}/")
    assert (save / "release/manifest.json").is_file()
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    hub.asked.clear()
    assert command(tmp_path / "cache", hub.url, *words, "--overwrite").returncode == 0
    assert hub.asked == []


def test_a_cache_with_a_file_too_few_is_completed(
    plain: Path, tmp_path: Path, hub: FakeHub
) -> None:
    snapshot = fill_cache(tmp_path / "cache", plain)
    file = next(snapshot.glob("model-00002*"))
    file.unlink()
    words = ("--hf", NAME, "--save", str(tmp_path / "save"))
    done = command(tmp_path / "cache", hub.url, *words)
    assert done.returncode == 0, done.stderr
    assert file.is_file()


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        (None, "it has no such model, or none that HF_TOKEN may read"),
    ],
    ids=["no network", "no such model"],
)
def test_a_name_that_is_nowhere_is_one_line(
    tmp_path: Path, hub: FakeHub, endpoint: str | None, why: str
) -> None:
    words = ("--hf", "some-lab/no-such", "--save", str(tmp_path / "save"))
    done = command(tmp_path / "cache", endpoint or hub.url, *words)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: some-lab/no-such cannot be taken from the Hugging Face Hub: ")
    assert why in line
    assert line.endswith("; check the name and the network, or give a directory")
    assert not (tmp_path / "save").exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_revision_is_taken_by_name_and_by_commit(plain: Path, cache: Path) -> None:
    newest = fill_cache(cache, plain)
    older = fill_cache(cache, plain, OLDER, ref="v1")
    assert find_model(NAME) == Found(newest, COMMIT)
    assert find_model(NAME, "v1") == find_model(NAME, OLDER) == Found(older, OLDER)
    assert find_model(str(older)) == Found(older)
    with pytest.raises(UsageError, match=r"is a directory, which has no --revision"):
        find_model(str(older), "v1")


def test_a_dry_run_downloads_nothing(plain: Path, cache: Path) -> None:
    with pytest.raises(
        TrinityError, match=rf"^{NAME} is no directory, and the Hub's cache has not"
    ):
        find_model(NAME, download=False)
    snapshot = fill_cache(cache, plain)
    assert find_model(NAME, download=False).path == snapshot
    (snapshot / INDEX).unlink()
    with pytest.raises(TrinityError, match="has not all of"):
        find_model(NAME, download=False)


@pytest.mark.parametrize("name", ["nano", "/no/such/place", "../models/nano", "a/b/c", "a b/c"])
def test_a_path_is_no_name_of_the_hub(cache: Path, name: str) -> None:
    with pytest.raises(TrinityError) as refused:
        find_model(name)
    assert (
        str(refused.value) == f"{name} is no directory, and no OWNER/NAME of the Hugging Face Hub"
    )


@pytest.mark.parametrize("leads_to", ["elsewhere", "nowhere"])
def test_a_link_is_not_written_through(plain: Path, tmp_path: Path, leads_to: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "save").mkdir()
    (tmp_path / "save/release").symlink_to(tmp_path / leads_to)
    words = ("--hf", str(plain), "--save", str(tmp_path / "save"), "--overwrite")
    done = command(tmp_path / "cache", "http://127.0.0.1:9", *words)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert f"{tmp_path}/save/release is a symbolic link, and links are not written through" in line
    assert list(elsewhere.iterdir()) == []
    assert (tmp_path / "save/release").is_symlink()
