"""The questions of the local task for lm-eval."""

from __future__ import annotations

import runpy

from megatron_trinity.data.documents import Document
from tests.paths import ROOT

make_tasks = runpy.run_path(str(ROOT / "examples/evaluation/make_tasks.py"))
next_lines, CHOICES = make_tasks["next_lines"], make_tasks["CHOICES"]
LINES = [f"    value_{number} = compute({number})" if number % 3 else "" for number in range(60)]


def document(lines: list[str]) -> Document:
    text = "\n".join(lines)
    return Document("a.py", "a.py", text, len(text), is_code=True)


def test_the_answer_is_the_line_that_follows() -> None:
    found = list(next_lines(document(LINES)))
    assert len(found) == make_tasks["QUESTIONS_A_FILE"]
    for question in found:
        given = question["context"].splitlines()
        [start] = [at for at in range(60) if LINES[at : at + len(given)] == given]
        assert len(given) == make_tasks["CONTEXT_LINES"]
        assert question["choices"][question["answer"]] == LINES[start + len(given)]
        assert len(set(question["choices"])) == CHOICES
        assert {*question["choices"]} <= {*LINES} - {""}
    assert {question["answer"] for question in found} > {0}  # the right one is not always first


def test_the_same_file_gives_the_same_questions() -> None:
    assert list(next_lines(document(LINES))) == list(next_lines(document(LINES)))


def test_a_file_too_short_or_of_one_line_gives_none() -> None:
    assert list(next_lines(document(LINES[:12]))) == []
    assert list(next_lines(document(["    value = compute(1)"] * 40))) == []
