"""The data of a command line: what is missing, empty or of another tokenizer is found at start."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.data import fingerprint
from megatron_trinity.data.corpus import Corpus, Part
from megatron_trinity.data.description import Description, PlannedPhase, Source, read_description
from megatron_trinity.data.length_bias import LengthBias
from megatron_trinity.data.manifest import sha256_of_file
from megatron_trinity.data.packings import PACKINGS
from megatron_trinity.data.plan import Plan
from megatron_trinity.data.rows import RowPacking, greedy
from megatron_trinity.data.run_data import run_data
from megatron_trinity.data.sources import SPLITS, check_data, check_manifests, describe
from megatron_trinity.errors import TrinityError, UsageError
from tests.trainer import write_dataset


def arguments(**given: Any) -> Namespace:
    names = ("data", "data_path", "train_data_path", "valid_data_path", "test_data_path", "split")
    files = ("data_args_path", "per_split_data_args_path")
    packing = ("packing", "document_buffer_size", "document_buffers")
    rest = {"mock_data": False, "skip_train": False, "eval_iters": 1, "vocab_size": 160}
    tokenizer = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    return Namespace(**{**dict.fromkeys((*names, *files, *packing)), **rest, **tokenizer, **given})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "all_train"
    write_dataset(prefix, documents=10)
    return str(prefix)


@pytest.mark.parametrize(
    ("given", "splits"),
    [
        ({"data_path": ["a"], "split": "98,2,0"}, {"train", "valid"}),
        ({"data_path": ["a"], "split": "100"}, {"train"}),
        ({"data_path": ["1", "a", "2", "b"], "split": "969,30,1"}, {"train", "valid", "test"}),
        ({"train_data_path": ["a"]}, {"train"}),
        ({"train_data_path": ["a"], "test_data_path": ["b"]}, {"train", "test"}),
        ({"valid_data_path": ["a"]}, {"valid"}),
    ],
)
def test_which_splits_have_data(given: dict[str, Any], splits: set[str]) -> None:
    described = describe(arguments(**given))
    of_split = (described.sources, described.validation, described.test)
    assert {name for name, found in zip(SPLITS, of_split, strict=True) if found} == splits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "no data: give --data, or --train-data-path"),
        ({"valid_data_path": ["{data}"]}, "no training data"),
        ({"data_path": ["{data}"], "split": "0,100,0"}, "no training data"),
        ({"data_path": ["{data}"], "split": "99,1,0"}, "none of the 10 documents of {data} for"),
        ({"data_path": ["{data}"], "split": "969,30,1"}, "--split 969,30,1 leaves none"),
        ({"train_data_path": ["0", "{data}", "1", "b"]}, "{data} has a weight of 0 in its blend"),
        ({"data_path": ["1", "b", "-2", "{data}"], "split": "1"}, "{data} has a weight of -2"),
        ({"train_data_path": ["nan", "{data}"]}, "{data} has a weight of nan"),
        (
            {"train_data_path": ["{data}", "0.7", "b", "0.3"]},
            "0.7 is no path among the data, but a number",
        ),
        (
            {"data_path": ["0.7", "0.3"], "split": "1"},
            "0.3 is no path among the data, but a number",
        ),
    ],
)
def test_what_has_no_data_is_refused(data: str, given: dict[str, Any], says: str) -> None:
    filled = {
        name: [word.replace("{data}", data) for word in value]
        if isinstance(value, list)
        else (value.replace("{data}", data) if isinstance(value, str) else value)
        for name, value in given.items()
    }
    with pytest.raises(TrinityError) as refused:
        check_data(arguments(**filled))
    assert says.replace("{data}", data) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", ["sources", "validation"])
@pytest.mark.parametrize("what", ["no file", "a directory", "nothing but zeros"])
def test_one_source_that_is_missing_is_named(
    data: str, tmp_path: Path, place: str, what: str
) -> None:
    """Among others that are there, on a blend's side and on that of validation."""
    path = tmp_path / "gone"
    if what == "a directory":
        Path(f"{path}.idx").mkdir()
        Path(f"{path}.bin").mkdir()
    elif what == "nothing but zeros":
        Path(f"{path}.idx").write_bytes(bytes(100))
        Path(f"{path}.bin").write_bytes(bytes(100))
    content: dict[str, Any] = {"sources": {"web": {"path": data}}}
    content.setdefault(place, {})["code"] = {"path": [data, str(path)]}
    (tmp_path / "data.yaml").write_text(json.dumps(content))
    with pytest.raises(TrinityError) as refused:
        check_data(arguments(data=str(tmp_path / "data.yaml")))
    assert f"{path}.idx" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_validation_data_is_said(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_data(arguments(train_data_path=[data], valid_data_path=[data]))
    check_data(arguments(data_path=[data], split="60,40,0"))
    check_data(arguments(train_data_path=[data], eval_iters=0))
    assert capsys.readouterr().out == ""
    for given in ({"train_data_path": [data]}, {"data_path": [data], "split": "100,0,0"}):
        check_data(arguments(**given))
        assert "no validation data" in capsys.readouterr().out


@pytest.fixture
def tokenizer(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}


def manifest(prefix: Path, **request: str) -> None:
    made = {"request": request, "splits": {"train": {"max_token_id": 150}}}
    Path(f"{prefix}.json").write_text(json.dumps(made))


def test_the_tokenizer_of_the_data(
    tmp_path: Path, tokenizer: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(train_data_path=[str(tmp_path / "own_train")], **tokenizer)
    manifest(tmp_path / "own", tokenizer_sha256=sha256_of_file(tmp_path / "tokenizer.json"))
    check_manifests(args, describe(args))
    assert capsys.readouterr().out == ""
    manifest(tmp_path / "own", tokenizer_sha256="0" * 64)
    with pytest.raises(UsageError, match="own_train was made with another tokenizer than"):
        check_manifests(args, describe(args))


def test_one_rank_reads_for_the_others(
    tmp_path: Path, tokenizer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests on each node, and what is in the files once a run."""
    write_dataset(tmp_path / "own_train", documents=10)
    manifest(tmp_path / "own", tokenizer_sha256="0" * 64)
    sizes = {"seq_length": 32, "seed": 1, "train_samples": 8, "eval_global_batch_size": 8}
    args = arguments(train_data_path=[str(tmp_path / "own_train")], **tokenizer, **sizes)
    described = describe(args)
    whole = run_data(args, described)
    assert whole is not None
    assert whole.fingerprint is not None
    monkeypatch.setenv("LOCAL_RANK", "3")
    check_manifests(args, described)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(fingerprint, "_content", lambda _: pytest.fail("it was read"))
    other = run_data(args, described)
    assert other is not None
    assert other.fingerprint is None


def test_what_cannot_be_compared_is_said_once(
    tmp_path: Path, tokenizer: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a_train", "b_train", "c_train")]
    args = arguments(train_data_path=paths, **tokenizer)
    check_manifests(args, describe(args))
    [line] = capsys.readouterr().out.splitlines()
    assert f"whether {paths[0]} and 2 more was made with the tokenizer" in line
    assert line.endswith("it has no manifest")
    manifest(tmp_path / "a", tokenizer_sha256="0" * 64)
    args = arguments(train_data_path=paths[:1])
    check_manifests(args, describe(args))
    assert "NullTokenizer" in capsys.readouterr().out


def test_a_token_that_the_model_has_not(tmp_path: Path) -> None:
    manifest(tmp_path / "own")
    args = arguments(train_data_path=[str(tmp_path / "own_train")], vocab_size=150)
    with pytest.raises(UsageError, match="has token 150, the model 150 tokens"):
        check_manifests(args, describe(args))


def test_flags_become_a_description(tmp_path: Path) -> None:
    described = describe(arguments(data_path=["3", "a", "1", "b", "2", "a"], split="90,10"))
    assert [source.name for source in described.sources] == ["a", "b"]
    [phase] = described.phases
    assert phase.weights == {"a": 5.0, "b": 1.0}  # a path that stands twice has both weights
    assert [source.parts for source in described.sources] == [
        (Part("a", 0.0, 0.9),),
        (Part("b", 0.0, 0.9),),
    ]
    [valid] = described.validation
    assert (valid.name, valid.weights) == ("", (5.0, 1.0))
    assert valid.sources[0].parts == (Part("a", 0.9, 1.0),)
    assert describe(arguments(train_data_path=["a", "b"])).phases[0].weights is None


def test_files_that_name_data(tmp_path: Path) -> None:
    (tmp_path / "paths").write_text("0.25 a\n0.75 b\n")
    described = describe(arguments(data_args_path=str(tmp_path / "paths"), split="1"))
    assert described.phases[0].weights == {"a": 0.25, "b": 0.75}
    (tmp_path / "splits").write_text(json.dumps({"train": "a b", "valid": ["c"], "test": "d"}))
    described = describe(arguments(per_split_data_args_path=str(tmp_path / "splits")))
    named = [described.sources, described.validation[0].sources, described.test[0].sources]
    assert [[source.name for source in sources] for sources in named] == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packings_of_flags(tmp_path: Path, packing: str) -> None:
    """Each is described; those that lay pieces side by side need documents kept apart."""
    write_dataset(tmp_path / "data", documents=10)
    options = {"size": 5, "buffers": 2} if packing == "document-buffer" else {}
    args = arguments(
        train_data_path=[str(tmp_path / "data")],
        eval_iters=0,
        packing=packing,
        document_buffer_size=options.get("size"),
        document_buffers=options.get("buffers"),
        dataloader_inter_document_masking=True,
    )
    (phase,) = describe(args).phases
    assert (phase.packing, phase.options) == (packing, options)
    check_data(args)
    args.dataloader_inter_document_masking = False
    if PACKINGS[packing].masking:
        with pytest.raises(UsageError, match="keeps them apart"):
            check_data(args)
    else:
        check_data(args)


def test_packings_and_lengths_of_a_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    file = tmp_path / "data.yaml"
    source = f"sources: {{a: {{path: {tmp_path / 'data'}, length_bias: {{full_at: 100}}}}}}\n"
    file.write_text(source + "phases: [{packing: {kind: document-buffer, size: 3, buffers: 2}}]\n")
    described = read_description(file)
    assert described.sources[0].length_bias == LengthBias(full_at=100)
    plan = Plan(described, 32, 1)
    corpus, pieces = plan.pieces(0)
    assert 0 < corpus.tokens < Corpus((Part(str(tmp_path / "data")),)).tokens
    assert sum(piece.length for piece in pieces) in (32, 33)
    for wrong, says in (
        ("packing: {kind: best-fit, size: 3}", "best-fit has no size"),
        ("packing: {kind: document-buffer, size: 0}", "size is 0; give a number above 0"),
        ("packing: {kind: document-buffer, size: 1.5}", "give a whole number"),
        ("packing: none", "is none of sequential"),
    ):
        file.write_text(source + f"phases: [{{{wrong}}}]\n")
        with pytest.raises(UsageError, match=says):
            read_description(file)
    file.write_text(source.replace("100", "100, floor: 0.95"))
    with pytest.raises(UsageError, match="floor has to be at most ceiling"):
        read_description(file)


def test_padded_rows_end_an_epoch_later(tmp_path: Path) -> None:
    """Rows of whole documents are more than the tokens would fill; an epoch is all of them."""
    write_dataset(tmp_path / "data")
    part = Part(str(tmp_path / "data"))
    phase = PlannedPhase(packing="greedy")
    plan = Plan(Description((Source("a", (part,), epochs=1),), (phase,)), 32, 1)
    corpus, _ = plan.pieces(0)
    rows = len(RowPacking(corpus.lengths, 32, 1, fit=greedy))
    assert rows > corpus.tokens / 32
    plan.check_length(rows)
    assert plan.given(rows)[0].epochs == 1
    assert plan.given(rows)[0].documents == corpus.documents
    with pytest.raises(UsageError, match="may be read 1 times"):
        plan.check_length(rows + 1)
