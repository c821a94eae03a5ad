# SPDX-License-Identifier: Apache-2.0
"""Problems of the Hub's datasets, on rows in their formats: the Hub itself cannot be reached where the tests run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from m3po_lab.core.errors import UserError
from m3po_lab.evaluation import scores as eval_scores
from m3po_lab.evaluation import tasks as eval_tasks
from m3po_lab.evaluation.settings import demo_settings
from m3po_lab.problems import data, data_sources
from m3po_lab.problems.arguments import ProblemArguments
from m3po_lab.problems.rewards import is_correct

GSM8K_ROWS = [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n:,}"} for n in range(1000, 1006)]
MMLU_ROWS = [
    {"question": f"Which is {n}?", "subject": "", "choices": [str(n + k) for k in range(4)], "answer": n % 4}
    for n in range(1, 5)
]


def arc_row(question: str, texts: list[str], labels: str, key: str) -> dict[str, Any]:
    return {"id": question, "question": question, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}


ARC_ROWS = [
    arc_row("Hot?", ["ice", "fire", "sea"], "ABC", "B"),
    arc_row("Wet?", ["ash", "bed", "car", "sea"], "1234", "4"),
    arc_row("Far?", ["a", "b", "c", "d", "sun"], "ABCDE", "E"),
]


def math_row(subject: str, solution: str) -> dict[str, str]:
    return {"problem": f"Solve this, in {subject}.", "level": "Level 5", "type": subject, "solution": solution}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """`load_dataset` on the rows above; returns what was asked for."""
    asked: list[tuple[str, str | None, str]] = []

    def load(path: str, name: str | None, split: str) -> Dataset:
        asked.append((path, name, split))
        rows: dict[str, list[dict[str, Any]]] = {
            "openai/gsm8k": GSM8K_ROWS,
            "cais/mmlu": MMLU_ROWS,
            "allenai/ai2_arc": ARC_ROWS,
            "EleutherAI/hendrycks_math": [
                math_row(f"{name} {n}", f"So $\\boxed{{\\frac{{{n}}}{{7}}}}$.") for n in (1, 2)
            ]
            + [math_row(f"{name} 3", "It is $3$.")],
        }
        return Dataset.from_list(rows[path])

    monkeypatch.setattr(data_sources, "load_dataset", load)
    return asked


def loaded(dataset: str, held_out: int) -> list[data_sources.Problem]:
    train, test = data.load_problems(ProblemArguments(dataset=dataset, num_eval_problems=held_out))
    assert len(test) == held_out
    assert {problem.question for problem in train}.isdisjoint(problem.question for problem in test)
    return sorted(train + test, key=lambda problem: problem.question)


def test_math_has_all_seven_subjects_of_the_train_split_and_no_row_without_a_box(hub: list[Any]) -> None:
    problems = loaded("EleutherAI/hendrycks_math", 5)
    assert hub == [("EleutherAI/hendrycks_math", subject, "train") for subject in data_sources.MATH_SUBJECTS]
    assert len(problems) == 7 * 2
    assert {problem.answer for problem in problems} == {"\\frac{1}{7}", "\\frac{2}{7}"}
    assert is_correct("so\n#### \\frac17", "\\frac{1}{7}", "####", problems[0].kind)
    assert not is_correct("so\n#### \\frac27", "\\frac{1}{7}", "####", problems[0].kind)


def test_mmlu_arc_is_both_training_sets_with_letters_as_answers(hub: list[Any]) -> None:
    problems = loaded("mmlu_arc", 3)
    assert hub == [("cais/mmlu", "all", "auxiliary_train"), ("allenai/ai2_arc", "ARC-Challenge", "train")]
    answers = {problem.question: problem.answer for problem in problems}
    assert len(answers) == 7
    assert answers["Question: Which is 1?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4"] == "B"
    assert answers["Question: Wet?\nOptions:\nA. ash\nB. bed\nC. car\nD. sea"] == "D", "labels 1 to 4"
    assert answers["Question: Far?\nOptions:\nA. a\nB. b\nC. c\nD. d\nE. sun"] == "E", "five choices"
    assert all(is_correct(f"#### ({problem.answer})", problem.answer, "####", problem.kind) for problem in problems)


@pytest.mark.parametrize(("task", "rows"), [(eval_tasks.mmlu_stem, MMLU_ROWS), (eval_tasks.arc_challenge, ARC_ROWS)])
def test_multiple_choice_is_asked_in_training_as_in_the_evaluation(
    task: Any, rows: list[Any], hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_tasks, "hub_rows", lambda *given: rows)
    script = ProblemArguments(dataset="mmlu_arc", num_eval_problems=1)
    trained = {data.user_turn(problem, script): problem for problem in loaded("mmlu_arc", 1)}
    for document in task()["test"]:
        problem = trained[document["prompt"]]
        assert (problem.answer, problem.kind) == (document["reference"], document["kind"])


@pytest.mark.parametrize(
    ("solution", "content"),
    [
        ("$\\boxed{3}$", "3"),
        ("First $\\boxed{3}$, then $\\boxed{ \\frac{1}{2^{n+1}} }$.", "\\frac{1}{2^{n+1}}"),
        ("\\boxed{\\left\\{ 1, \\frac{2}{3} \\right\\}} {by} {all}", "\\left\\{ 1, \\frac{2}{3} \\right\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\text{two\nlines}}", "\\text{two\nlines}"),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed 5", None),
        ("no box", None),
        ("", None),
    ],
)
def test_content_of_the_last_box(solution: str, content: str | None) -> None:
    assert data_sources.boxed(solution) == content


@pytest.mark.parametrize("solution", ["no box", "\\boxed{ }"])
def test_problem_of_math_without_an_answer_is_none(solution: str) -> None:
    assert data_sources.math_problem(math_row("algebra", solution)) is None


@pytest.mark.parametrize(("dataset", "kind"), [("openai/gsm8k", "number"), ("mmlu_arc", "letter")])
def test_rows_of_a_training_and_of_its_report_carry_the_kind_of_answer(dataset: str, kind: str, hub: list[Any]) -> None:
    settings = replace(
        demo_settings(),
        dataset=dataset,
        dataset_config=None,
        num_eval_problems=2,
        prompt_template="{question}",
    )
    train, _ = data.load_problems(settings.problems)
    assert set(data.training_rows(train, settings.problems, 3)["kind"]) == {kind}
    reported = eval_tasks.problems(asdict(settings))["test"]
    assert reported["kind"] == [kind] * 2
    right = [eval_scores.scores(row, [[f"#### {row['reference']}"]])["strict_match"] for row in reported]
    assert right == [1.0, 1.0]


@pytest.mark.parametrize("dataset", ["openai/gsm8k", "EleutherAI/hendrycks_math", "mmlu_arc"])
@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("Couldn't find cache")])
def test_dataset_that_cannot_be_had_is_one_clear_line(
    dataset: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any, **options: Any) -> Dataset:
        raise error

    monkeypatch.setattr(data_sources, "load_dataset", load)
    with pytest.raises(UserError, match="from the Hub .*without a network give --dataset a local .jsonl") as raised:
        data.load_problems(ProblemArguments(dataset=dataset))
    assert "\n" not in str(raised.value)


def problems_file(folder: Path, answers: list[str]) -> Path:
    file = folder / "problems.jsonl"
    rows = [{"question": f"No. {number}?", "answer": answer} for number, answer in enumerate(answers)]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_jsonl_line_without_a_marked_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="problems.jsonl, line 2: .*#### <number>"):
        data_sources.read_jsonl(problems_file(tmp_path, ["#### 1", "no marker"]))


@pytest.mark.parametrize("read", [data_sources.read_jsonl, lambda file: eval_tasks.gsm8k(data=str(file))])
def test_first_references_that_cannot_be_compared_whole_are_named_with_their_lines(read: Any, tmp_path: Path) -> None:
    """In training as in the evaluation: of 3 and 4 one number would be compared, yes could never be rewarded."""
    answers = ["#### 1", "#### 10:30", "#### 2 1/2", "#### 3 and 4", "#### 72\nSource: page 14", "#### yes", "#### -5"]
    with pytest.raises(UserError) as raised:
        read(problems_file(tmp_path, answers))
    assert "line 2 ('10:30'), line 4 ('3 and 4'), line 5 ('72\\nSource: page 14') and 1 more:" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_reference_of_every_split_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training problem whose answer is no number could never be rewarded, a held-out one never be right."""
    for place in ("training", "held-out"):
        splits = {"training": [data_sources.Problem("a", "1")], "held-out": [data_sources.Problem("b", "2")]}
        splits[place].append(data_sources.Problem("c", "yes"))
        monkeypatch.setattr(data, "_split", lambda problems, script, both=splits: (both["training"], both["held-out"]))
        with pytest.raises(UserError, match=f"{place} problem 2 .'yes'.*a reference must be one number"):
            data.load_problems(ProblemArguments(dataset=str(problems_file(tmp_path, ["#### 1"]))))


@pytest.mark.parametrize("task", [eval_tasks.math500, eval_tasks.mmlu_stem, eval_tasks.arc_challenge])
def test_local_row_of_another_format_is_named(task: Any, tmp_path: Path) -> None:
    file = problems_file(tmp_path, ["#### 1"])
    with pytest.raises(UserError, match="problems.jsonl, line 1: it is no row of .*; its keys are answer, question"):
        task(data=str(file))
