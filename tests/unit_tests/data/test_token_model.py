"""Tokenizers by every name that they go by."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
from megatron_trinity.data.token_model import load_tokenizer
from megatron_trinity.errors import TrinityError, UsageError
from tests.paths import ROOT
from tests.unit_tests.data.conftest import WORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "document 0: 0123456789"] * 20),
        model_writer=written,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize("named", ["file", "directory"])
def test_sentencepiece(named: str, model: Path, corpus: Path, tmp_path: Path) -> None:
    (corpus / "a.txt").write_text("the </s> router <s>")
    tokenizer = model if named == "file" else model.parent
    job = PrepareRequest((str(corpus),), tokenizer, tmp_path / "d", valid_fraction=0.0)
    made, _ = prepare_dataset(job)
    assert made["tokenizer"] == {"vocab_size": 60, "eod_id": 2}
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = reference.encode("the </s> router <s>")
    assert not {1, 2} & set(expected)  # names of control symbols are text
    dataset = IndexedDataset(str(tmp_path / "d_train"))
    assert dataset[0].tolist() == [*expected, 2]
    assert dataset[1].tolist() == [*reference.encode((corpus / "part0/00.txt").read_text()), 2]
    assert dataset[0].dtype == np.uint16


def test_process_that_prepares_imports_no_torch(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Nor Megatron, half a gigabyte and a word on CUDA; Arrow only where it is asked for."""
    (tmp_path / "a.txt").write_text("the router")
    code = """if True:
    import sys
    from pathlib import Path
    from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
    source, tokenizer, output = map(Path, sys.argv[1:])
    prepare_dataset(PrepareRequest((str(source),), tokenizer, output, valid_fraction=0.0))
    print({"torch", "megatron", "transformers", "pyarrow", "fsspec"} & set(sys.modules))
    """
    paths = [str(tmp_path / "a.txt"), str(tokenizer_dir), str(tmp_path / "out" / "d")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_file_of_a_tokenizer_is_that_of_its_directory(tokenizer_dir: Path) -> None:
    assert load_tokenizer(tokenizer_dir / "tokenizer.json") == load_tokenizer(tokenizer_dir)


def test_name_in_the_hubs_cache(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the cache: a branch names a commit, whose snapshot is a directory."""
    import huggingface_hub.constants

    root = tmp_path / "models--some--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tokenizer_dir, root / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer(Path("some/model")) == load_tokenizer(tokenizer_dir)
    with pytest.raises(UsageError, match=r"some/other is no directory.*hf download some/other"):
        load_tokenizer(Path("some/other"))


def test_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nothing")
    with pytest.raises(TrinityError, match=r"x\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
