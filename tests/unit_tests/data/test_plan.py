"""The file of `--data`: what it says is read, and what makes no sense is told in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.data.description import Description, Source, read_description
from megatron_trinity.data.evaluation import EvaluationSamples, bytes_per_token
from megatron_trinity.data.fingerprint import difference, fingerprint_of
from megatron_trinity.data.plan import Plan
from megatron_trinity.errors import UsageError
from tests.trainer import write_dataset

FILE = """
sources:
  web: {path: PREFIX_web}
  code: {path: [PREFIX_code, PREFIX_web], epochs: 2}
phases:
  - {tokens: 1K, blend: {web: 0.8, code: 0.2}}
  - {tokens: {web: 3e3, code: 1000}}
  - {packing: sequential}
validation:
  web: {path: PREFIX_web, samples: 3}
  code: {path: PREFIX_code}
test: {path: PREFIX_web}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_dataset(folder / "data_web", documents=50, seed=1)
    write_dataset(folder / "data_code", documents=20, seed=2)
    return folder


def described(folder: Path, text: str = FILE) -> Description:
    path = folder / "data.yaml"
    path.write_text(text.replace("PREFIX", str(folder / "data")))
    return read_description(path)


def test_a_file_is_read(folder: Path) -> None:
    found = described(folder)
    assert [source.name for source in found.sources] == ["web", "code"]
    assert [source.epochs for source in found.sources] == [None, 2.0]
    assert [phase.tokens for phase in found.phases] == [1000, 4000, None]
    weights = [phase.weights for phase in found.phases]
    assert weights == [{"web": 0.8, "code": 0.2}, {"web": 3000.0, "code": 1000.0}, None]
    assert [(one.name, one.samples) for one in found.validation] == [("web", 3), ("code", None)]
    assert [one.name for one in found.test] == ["test"]
    assert len(found.parts()) == 2  # each dataset once


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("sources:", "source:", "the file has an unknown key source; it has sources, phases"),
        ("epochs: 2", "epoch: 2", "source code has an unknown key epoch; it has path, epochs"),
        ("epochs: 2", "epochs: 0", "source code: epochs is 0; give a number above 0"),
        ("path: PREFIX_web}", "path: 3}", "source web: path has to be the prefix of a dataset"),
        ("code: 0.2", "core: 0.2", "phase 1: core is none of the sources: web, code"),
        ("code: 0.2", "code: 0", "phase 1: the weight of code is 0; give a number above 0"),
        ("code: 0.2", "code: -1", "phase 1: the weight of code is -1"),
        ("code: 0.2", "code: 1e-30", "code has 1.25e-30 of its blend, which no run would ever"),
        ("code: 0.2", "code: .nan", "phase 1: the weight of code is nan"),
        ("code: 0.2", "web: 0.2", "web stands twice"),
        ("tokens: 1K, ", "", "phase 1 has no tokens; only the last one may leave them out"),
        ("tokens: 1K", "tokens: 1G", "phase 1: tokens is '1G'; give a number above 0, such as"),
        ("tokens: 1K", "seq_length: 4", "the length of sequences cannot change within a run"),
        ("packing: sequential", "packing: fast", "phase 3: packing fast is none of sequential"),
        ("packing: sequential", "packing: {kind: sequential, of: 2}", "sequential has no of"),
        ("samples: 3", "sample: 3", "validation web has an unknown key sample"),
        ("phases:", "phases: 3\nrest:", "the file has an unknown key rest"),
        ("sources:", "sources: [", "is not YAML"),
    ],
)
def test_what_makes_no_sense_is_one_line(folder: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        described(folder, FILE.replace(old, new, 1))
    assert says in str(refused.value)
    assert str(refused.value).startswith(f"--data {folder / 'data.yaml'}")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no.yaml cannot be read"):
        read_description(folder / "no.yaml")


def test_phases_end_with_whole_samples_and_count_what_they_give(folder: Path) -> None:
    plan = Plan(described(folder), seq_length=30, seed=1)
    assert [plan.stream.phase_of(n) for n in (33, 34, 167, 168)] == [0, 1, 1, 2]  # 34 + 134
    by_name = {one.name: one for one in plan.given(168)}
    counted = {"web": 0, "code": 0}
    for sample in range(168):
        counted[("web", "code")[plan.stream[sample][0]]] += 30
    assert {name: one.tokens for name, one in by_name.items()} == counted
    assert counted["web"] == pytest.approx(0.8 * 1020 + 0.75 * 4020, abs=200)
    web = by_name["web"]
    tokens = Plan(described(folder), 30, 1)._corpora[0].tokens
    assert web.epochs == pytest.approx(counted["web"] / tokens)
    assert web.documents == round(50 * web.epochs)


def test_weights_by_tokens_give_each_source_as_often(folder: Path) -> None:
    text = FILE.split("phases:")[0].replace(", epochs: 2", "")
    plan = Plan(described(folder, text), seq_length=8, seed=1)
    web, code = plan.given(100_000)
    assert web.epochs == pytest.approx(code.epochs, rel=0.01)


def test_data_that_do_not_last_are_refused(folder: Path) -> None:
    plan = Plan(described(folder), seq_length=8, seed=1)
    plan.check_length(200)
    with pytest.raises(UsageError, match="code may be read 2 times, which lasts for") as refused:
        plan.check_length(10**6)
    lasts = int(str(refused.value).split("lasts for ")[1].split()[0]) // 8
    plan.check_length(lasts)
    with pytest.raises(UsageError, match="code may be read 2 times"):
        plan.check_length(lasts + 10)
    ended = Plan(described(folder, FILE.replace("{packing", "{tokens: 800, packing")), 8, 1)
    ended.check_length(725)
    with pytest.raises(UsageError, match="the phases of the data end after 5800 tokens, and the"):
        ended.check_length(726)


def test_a_corpus_of_less_than_a_sequence_is_said(folder: Path) -> None:
    plan = Plan(described(folder), seq_length=100_000, seed=1)
    assert [note.split(" has ")[0] for note in plan.notes()] == ["web", "code"]
    assert Plan(described(folder), 8, 1).notes() == []


def test_changed_data_are_another_fingerprint(folder: Path) -> None:
    def of(found: Description, seed: int = 1, tokenizer: str | None = "a") -> dict[str, Any]:
        kept: dict[str, Any] = json.loads(json.dumps(fingerprint_of(found, seed, tokenizer)))
        return kept

    first = of(described(folder))
    assert difference(first, of(described(folder))) is None
    longer = FILE.replace("{packing", "{tokens: 800, packing")
    assert difference(first, of(described(folder, longer))) is None
    assert difference(first, of(described(folder), tokenizer=None)) is None
    for other, says in (
        (of(described(folder), seed=2), "--seed is 1 there and 2 here"),
        (of(described(folder), tokenizer="b"), "another tokenizer"),
        (of(described(folder, FILE.replace("0.8", "0.7"))), "phase 1 has another blend"),
        (of(described(folder, FILE.replace("1K", "2K"))), "phase 1 has another tokens"),
    ):
        assert says in str(difference(first, other))
    moved = folder / "moved"
    moved.mkdir()
    for path in folder.glob("data_*"):
        (moved / path.name).write_bytes(path.read_bytes())
    assert difference(first, of(described(moved))) is None
    content = bytearray((moved / "data_code.bin").read_bytes())
    content[7] ^= 1
    (moved / "data_code.bin").write_bytes(content)
    assert "the data of code have changed" in str(difference(first, of(described(moved))))


def test_sets_are_the_first_samples_or_one_pass(folder: Path) -> None:
    web, code = described(folder).validation
    few = EvaluationSamples(web, seq_length=8, batch=2, limit=100)
    assert (few.samples, few.iterations) == (3, 2)
    whole = EvaluationSamples(code, seq_length=8, batch=4, limit=10**6)
    corpus = whole.pieces(0)[0]
    predicted = [
        (piece.document, piece.start + n)
        for sample in range(whole.samples)
        for piece in whole.pieces(sample)[1]
        for n in range(piece.length)
    ]
    assert set(predicted) == {
        (d, n) for d, length in enumerate(corpus.lengths.tolist()) for n in range(length)
    }
    assert whole.samples == -(-(corpus.tokens - 1) // 8)
    assert EvaluationSamples(code, seq_length=8, batch=4, limit=5).samples == 5


def test_bytes_of_a_token(tmp_path: Path) -> None:
    prefix = tmp_path / "own_valid"
    assert bytes_per_token([str(prefix)]) is None
    counted = {"splits": {"valid": {"tokens": 10, "bytes": 35}}}
    (tmp_path / "own.json").write_text(json.dumps(counted))
    assert bytes_per_token([str(prefix)]) == 3.5


def test_empty_documents_alone_are_refused(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "none.bin"), multimodal=False)
    for _ in range(3):
        builder.add_document([], [0])
    builder.finalize(str(tmp_path / "none.idx"))
    found = described(tmp_path, f"sources: {{none: {{path: {tmp_path / 'none'}}}}}")
    with pytest.raises(UsageError, match="none has no tokens: its documents are all empty"):
        Plan(found, 8, 1)
    assert found.sources == (Source("none", tuple(found.parts())),)


@pytest.mark.slow
def test_ten_thousand_sources_have_their_shares(folder: Path) -> None:
    """Each a dataset of its own, by links to the files of one."""
    count = 10_000
    many = folder / "many"
    many.mkdir()
    for number in range(count):
        for end in ("idx", "bin"):
            (many / f"{number}.{end}").symlink_to(folder / f"data_code.{end}")
    weights = {str(number): 1 + number % 7 for number in range(count)}
    text = {
        "sources": {name: {"path": str(many / name)} for name in weights},
        "phases": [{"blend": weights}],
    }
    plan = Plan(described(folder, json.dumps(text)), 8, 1)
    samples, total = 100_000_000, sum(weights.values())
    for given, weight in zip(plan.given(samples), weights.values(), strict=True):
        assert abs(given.tokens / 8 - samples * weight / total) <= 2 + math.log2(samples)
    assert plan.pieces(samples)[1]
