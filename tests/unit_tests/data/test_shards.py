"""Shards of several machines, merged, are byte for byte what one machine makes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_trinity.data.encode import Encoded
from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
from megatron_trinity.data.shards import Shard, merge_shards
from megatron_trinity.data.token_files import SplitWriter, write_index
from megatron_trinity.errors import TrinityError, UsageError


@pytest.fixture
def job(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> PrepareRequest:
    (corpus / "blank.txt").write_text(" ")
    lines = [json.dumps({"text": f"line {i}"}) for i in range(50)]
    (corpus / "part1" / "x.jsonl").write_text("\n".join([*lines, "", "{"]))
    (corpus / "link").symlink_to(corpus / "blank.txt")
    return PrepareRequest((str(corpus),), tokenizer_dir, tmp_path / "out" / "d", valid_fraction=0.3)


def make_shards(job: PrepareRequest, count: int) -> None:
    for number in range(1, count + 1):
        prepare_dataset(replace(job, shard=Shard(number, count), workers=1))


@pytest.mark.parametrize("count", [1, 2, 7, 42])
def test_merge_is_what_one_machine_makes(job: PrepareRequest, count: int, tmp_path: Path) -> None:
    whole, _ = prepare_dataset(job)
    other = replace(job, output=tmp_path / "other" / "d")
    make_shards(other, count)
    assert merge_shards(other.output) == whole
    for name in ("d.json", "d_train.bin", "d_train.idx", "d_valid.bin", "d_valid.idx"):
        assert (other.output.parent / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not prepare_dataset(other)[1]
    hidden = [path.name for path in other.output.parent.iterdir() if path.name.startswith(".")]
    assert hidden == []


def test_second_run_of_a_shard_does_nothing_and_another_is_refused(job: PrepareRequest) -> None:
    shard = replace(job, shard=Shard(2, 3))
    made, is_new = prepare_dataset(shard)
    assert is_new
    assert prepare_dataset(shard) == (made, False)
    with pytest.raises(TrinityError, match=r"d.shard-2-of-3 is there already.*--overwrite"):
        prepare_dataset(replace(shard, append_eod=False))
    assert prepare_dataset(replace(shard, append_eod=False, overwrite=True))[1]


def test_shards_that_do_not_fit_are_refused(job: PrepareRequest) -> None:
    with pytest.raises(TrinityError, match=r"no shards of .*--shard I/N"):
        merge_shards(job.output)
    make_shards(job, 3)
    second = Shard(2, 3).directory(job.output)
    kept = job.output.parent / "kept"
    second.rename(kept)
    with pytest.raises(TrinityError, match=r"d.shard-2-of-3 is missing, of 3 shards \(1 in all\)"):
        merge_shards(job.output)
    shutil.copytree(kept, second)
    data = bytearray((second / "train.bin").read_bytes())
    data[10] ^= 1
    (second / "train.bin").write_bytes(data)
    with pytest.raises(TrinityError, match=r"train.bin is not what its shard's manifest says"):
        merge_shards(job.output)
    (second / "train.bin").write_bytes(data[:-2])
    with pytest.raises(TrinityError, match=r"train.bin is not whole .*--overwrite"):
        merge_shards(job.output)
    prepare_dataset(replace(job, shard=Shard(2, 3), append_eod=False, overwrite=True))
    with pytest.raises(TrinityError, match=r"another request than .*\(append_eod\)"):
        merge_shards(job.output)
    shutil.rmtree(second)
    kept.rename(second)
    merge_shards(job.output)
    with pytest.raises(TrinityError, match="is there already"):
        merge_shards(job.output)
    merge_shards(job.output, overwrite=True)
    Shard(1, 3).directory(job.output).rename(Shard(1, 2).directory(job.output))
    with pytest.raises(TrinityError, match="are of 2 and of 3"):
        merge_shards(job.output)


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "a/b", "1/", "-1/3"])
def test_mistakes(text: str) -> None:
    with pytest.raises(UsageError, match="give I/N"):
        Shard.parse(text)


def test_more_shards_than_files_and_standard_input_are_refused(job: PrepareRequest) -> None:
    with pytest.raises(UsageError, match="there are 42: choose as many shards at most"):
        prepare_dataset(replace(job, shard=Shard(1, 43)))
    with pytest.raises(UsageError, match="standard input cannot be divided"):
        prepare_dataset(replace(job, sources=("-",), shard=Shard(1, 2)))


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_written_files_are_megatrons(vocab_size: int, tmp_path: Path) -> None:
    """Reference: megatron-core's own writer."""
    random = np.random.default_rng(0)
    lengths = [1, 5, 300, 2, 1]
    writer = SplitWriter(tmp_path / "train", vocab_size)
    builder = IndexedDatasetBuilder(f"{tmp_path}/peer.bin", dtype=writer.dtype.type)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for part in (lengths[:2], lengths[2:]):
        documents = [random.integers(0, vocab_size, n).astype(writer.dtype) for n in part]
        ids = np.concatenate(documents)
        writer.add(Encoded(ids, np.array(part, dtype=np.int32), 7))
        np.add.at(counts, ids, 1)
        for document in documents:
            builder.add_document(document, [len(document)])
    writer.close()
    builder.finalize(f"{tmp_path}/peer.idx")
    write_index(tmp_path / "train.lengths", tmp_path / "train.idx", writer.dtype)
    for suffix in ("bin", "idx"):
        ours, peer = (tmp_path / f"{name}.{suffix}" for name in ("train", "peer"))
        assert ours.read_bytes() == peer.read_bytes()
    np.testing.assert_array_equal(writer.counts, counts)
    assert (writer.written.documents, writer.written.tokens) == (5, 309)
    assert writer.written.text_bytes == 14
