# SPDX-License-Identifier: Apache-2.0
"""Evaluation by lm-eval: prompts are the training's, greedy is plain generation, groups stay whole, nothing leaks."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers.m3po import ThinkingSettings
from trl import ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.evaluation import decoding, evaluate
from m3po_lab.evaluation.model import EvaluatedModel
from m3po_lab.evaluation.settings import EvalSettings, demo_settings
from m3po_lab.models.loading import load_model
from m3po_lab.problems.data import chat_prompt, load_problems

TASKS = {path.stem: path for path in evaluate.TASK_FOLDER.glob("[!_]*.yaml")}
MATH = {"problem": "Half of one?", "solution": "It is $\\frac12$.", "answer": "\\frac{1}{2}", "level": 1}
STEM = {"question": "Two?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 1}
ARC = {"id": "x", "question": "Two?", "choices": {"text": ["1", "3", "2"], "label": ["1", "2", "3"]}, "answerKey": "3"}
LETTERED = "Question: Two?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4"


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[Any, Any]:
    """The tiny model with larger weights, so that what it writes depends on what it reads."""
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(tiny_model), dtype="float32"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10.0 if weight.dim() > 1 else 1.0)
    return model, tokenizer


@pytest.fixture
def settings() -> EvalSettings:
    return EvalSettings(
        dataset="reasoning-gym:chain_sum",
        dataset_config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        num_eval_problems=5,
        eval_seed=5,
        system_prompt="0 1 2",
        prompt_template="What is {expression} ?",
        worked_example={"question": "What is 1 + 1 ?", "answer": "#### 2"},
        chat_template_kwargs=None,
        answer_start="####",
        max_completion_length=5,
        batch_size=4,
        precision="no",
    )


def rows(folder: Path, row: dict[str, Any], count: int = 1) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return str(file)


def messages(task: Any) -> list[dict[str, str]]:
    """The conversation that lm-eval makes of a task's first problem."""
    seen: list[Any] = []

    def template(history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        seen.append(history)
        return ""

    task.fewshot_context(
        task.eval_docs[0],
        num_fewshot=task.get_config("num_fewshot"),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=template,
    )
    return seen[0]


def test_every_task_file_has_a_version_and_its_own_name() -> None:
    assert sorted(TASKS) == [
        "arc_challenge", "gsm8k", "gsm8k_8shot", "gsm_symbolic", "gsm_symbolic_8shot", "math500", "mmlu_stem",
        "problems",
    ]  # fmt: skip
    for name, path in TASKS.items():
        content = yaml.load(path.read_text().replace("!function ", ""), Loader=yaml.SafeLoader)
        assert content["task"] == name
        assert isinstance(content["metadata"]["version"], float)


@pytest.mark.parametrize(
    ("name", "row", "prompt", "reference", "version"),
    [
        ("gsm8k", {"question": "Two?", "answer": "1+1=2\n#### 1,002"}, "Two?", "1002", 1.1),
        ("math500", MATH, "Half of one?", "\\frac{1}{2}", 1.2),
        ("mmlu_stem", STEM, LETTERED, "B", 1.1),
        ("arc_challenge", ARC, "Question: Two?\nOptions:\nA. 1\nB. 3\nC. 2", "C", 1.1),
    ],
)
def test_task_reads_rows_in_the_format_of_its_dataset(
    name: str, row: dict[str, Any], prompt: str, reference: str, version: float, tmp_path: Path
) -> None:
    """The system turn is the papers', with the marker of the checkpoint; the user turn is the question."""
    task = evaluate.load_task(name, data=rows(tmp_path, row), marker="@@@@")
    system, user = messages(task)
    assert system["content"].startswith("A conversation between User and Assistant. The user asks a question, and the")
    assert system["content"].endswith("after the @@@@ tag, i.e., {reasoning process} @@@@ {answer}.")
    assert (user["content"], task.eval_docs[0]["reference"]) == (prompt, reference)
    right = task.process_results(task.eval_docs[0], [[f"so\n@@@@ {reference}"]])
    assert (right["strict_match"], right["well_formed"], task.VERSION) == (1.0, 1.0, version)


def test_eight_examples_come_before_the_problem_and_are_not_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(11)))
    task = evaluate.load_task("gsm8k_8shot", data=str(file), marker="@@@@")
    turns = messages(task)
    assert [turn["content"] for turn in turns[::2]] == [f"{n}?" for n in range(9)]
    assert [turn["content"] for turn in turns[1::2]] == [f"@@@@ {n}" for n in range(8)]
    assert len(task.eval_docs) == 3
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(UserError, match="8 problems, none of them left beside 8 examples"):
        evaluate.load_task("gsm8k_8shot", data=str(file))


def test_generated_problems_are_fixed_and_apart_from_their_examples() -> None:
    first, again = (evaluate.load_task("gsm_symbolic").eval_docs["question"] for _ in range(2))
    assert list(first) == list(again)
    assert len(set(first)) == 200
    shown = evaluate.load_task("gsm_symbolic_8shot")
    assert list(shown.eval_docs["question"]) == list(first)
    turns = messages(shown)
    assert len(turns) == 17
    assert all("\n#### " in turn["content"] for turn in turns[1::2])
    assert {turn["content"] for turn in turns[:-1:2]}.isdisjoint(first)


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
@pytest.mark.parametrize("example", [None, {"question": "1 + 1", "answer": "1 + 1 = 2.\n#### 2"}])
def test_held_out_problems_are_asked_as_in_training(
    settings: EvalSettings, system_prompt: str | None, example: dict[str, str] | None
) -> None:
    changed = EvalSettings(**{**asdict(settings), "system_prompt": system_prompt, "worked_example": example})
    task = evaluate.problems_task(changed)
    _, held_out = load_problems(changed.problems)
    assert messages(task) == chat_prompt(held_out[0], changed.problems)
    assert list(task.eval_docs["reference"]) == [problem.answer for problem in held_out]


def test_problems_without_a_run_are_the_demo_s() -> None:
    assert list(evaluate.load_task("problems").eval_docs) == list(evaluate.problems_task(demo_settings()).eval_docs)
    assert len(evaluate.load_task("problems").eval_docs) == 400


def test_the_chat_template_gets_what_training_gives_it(tiny: tuple[Any, Any], settings: EvalSettings) -> None:
    """As TRL renders a rollout's prompt (`chat_template_kwargs` of GRPOConfig)."""
    model, tokenizer = tiny
    asked = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    asked.chat_template = "{{ thinking }}" + tokenizer.chat_template
    given = EvalSettings(**{**asdict(settings), "chat_template_kwargs": {"thinking": "0 1 0 1"}})
    task = evaluate.problems_task(given)
    how = decoding.Decoding(4, chat_template_kwargs=given.chat_template_kwargs)
    results = evaluate.run_tasks(model, asked, [task], how, "test")
    wanted = asked.apply_chat_template(messages(task), tokenize=False, add_generation_prompt=True, thinking="0 1 0 1")
    assert wanted.startswith("0 1 0 1")
    assert results["samples"]["problems"][0]["arguments"][0][0] == wanted
    answered = evaluate.answer_problems(model, asked, given, "test")
    assert [row.completion for row in answered] == [row["resps"][0][0] for row in results["samples"]["problems"]]
    assert answered != evaluate.answer_problems(model, tokenizer, settings, "test")


def test_greedy_completions_are_those_of_plain_generation_one_by_one(
    tiny: tuple[Any, Any], settings: EvalSettings
) -> None:
    """Left padding, batches of other lengths, the order of the results, the last batch with a rest."""
    model, tokenizer = tiny
    answered = evaluate.answer_problems(model, tokenizer, settings, "test")
    _, held_out = load_problems(settings.problems)
    assert len({row.completion for row in answered}) > 2
    for problem, row in zip(held_out, answered, strict=True):
        text = tokenizer.apply_chat_template(
            chat_prompt(problem, settings.problems), tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.completion


def test_what_the_prompts_of_a_batch_begin_with_is_read_in_one_row(
    tiny: tuple[Any, Any], settings: EvalSettings
) -> None:
    """That the completions stay the same is the test above."""
    shapes: list[tuple[int, int]] = []
    hook = tiny[0].model.register_forward_pre_hook(
        lambda module, given, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    evaluate.answer_problems(*tiny, settings, "test")
    hook.remove()
    assert [shape for shape in shapes if shape[0] == 1 and shape[1] > 1][0][1] >= 16
    assert max(length for rows, length in shapes if rows > 1) < 16


def test_evaluation_leaves_the_model_s_mode_and_the_random_generators_alone(
    tiny: tuple[Any, Any], settings: EvalSettings
) -> None:
    """A training goes on after it, and a resumed one skips it."""
    model, tokenizer = tiny
    model.train()
    model.generation_config.repetition_penalty = 1.3
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    punished = evaluate.answer_problems(model, tokenizer, settings, "test")
    model.generation_config.repetition_penalty = 1.0
    assert punished == evaluate.answer_problems(model, tokenizer, settings, "test")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert model.training
    model.eval()
    evaluate.answer_problems(model, tokenizer, settings, "test")
    assert not model.training


def sampled(tiny: tuple[Any, Any], settings: EvalSettings, paths: decoding.Paths) -> list[list[str]]:
    how = decoding.Decoding(10, paths=paths)
    results = evaluate.run_tasks(*tiny, [evaluate.problems_task(settings)], how, "test")
    return [sample["resps"][0] for sample in results["samples"]["problems"]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch, tiny: tuple[Any, Any]) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """The prompts and the rollout state of every call of generate."""
    seen: list[tuple[torch.Tensor, Any]] = []
    model, generate = tiny[0], tiny[0].generate

    def recording(**arguments: Any) -> torch.Tensor:
        seen.append((arguments["input_ids"], arguments.get("m3po")))
        assert (arguments["temperature"], arguments["top_k"], arguments["top_p"]) == (0.9, 0, 1.0)
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", recording)
    yield seen


def test_paths_of_a_problem_are_one_group_in_one_batch(
    tiny: tuple[Any, Any], settings: EvalSettings, batches: list[tuple[torch.Tensor, Any]]
) -> None:
    cross = ThinkingSettings(cross_path_lambda=0.5, cross_path_phase="all")
    together = sampled(tiny, settings, decoding.Paths(4, 0.9, cross))
    assert [len(group) for group in together] == [4] * 5
    assert [len(prompts) for prompts, _ in batches] == [8, 8, 4]
    for prompts, state in batches:
        groups = prompts.unflatten(0, (-1, 4))
        assert (groups == groups[:, :1]).all()
        assert state.group_ids.tolist() == [row // 4 for row in range(len(prompts))]
        assert state.settings == cross
        assert (state.bag_weights > 0).sum(-1).max() > 1, "no path listened to its peers"


def test_lambda_zero_samples_what_independent_paths_do(
    tiny: tuple[Any, Any], settings: EvalSettings, batches: list[tuple[torch.Tensor, Any]]
) -> None:
    alone = sampled(tiny, settings, decoding.Paths(4, 0.9, None))
    assert all(state is None for _, state in batches)
    assert alone == sampled(tiny, settings, decoding.Paths(4, 0.9, ThinkingSettings(cross_path_lambda=0.0)))
    assert alone != sampled(
        tiny, settings, decoding.Paths(4, 0.9, ThinkingSettings(cross_path_lambda=0.5, cross_path_phase="all"))
    )
    assert max(len(set(group)) for group in alone) > 1


def test_seed_of_the_paths_decides_and_nothing_else_does(tiny: tuple[Any, Any], settings: EvalSettings) -> None:
    torch.manual_seed(1)
    first = sampled(tiny, settings, decoding.Paths(4, 0.9, None, seed=1))
    torch.manual_seed(2)
    assert first == sampled(tiny, settings, decoding.Paths(4, 0.9, None, seed=1))
    assert first != sampled(tiny, settings, decoding.Paths(4, 0.9, None, seed=2))


def test_tasks_share_no_batch(tiny: tuple[Any, Any]) -> None:
    """In bf16 a completion can depend on its batch; a task's numbers must not depend on what is evaluated beside it."""
    lm = EvaluatedModel(*tiny, decoding.Decoding(2), "test")
    prompts = {"one": ["aaaa", "a", "aaa"], "two": ["aa", "aaaaa"]}
    requests = [SimpleNamespace(task_name=task, args=(text, {})) for task in prompts for text in prompts[task]]
    assert lm.batches(requests) == [[1, 2], [0], [3, 4]]


def test_batch_that_splits_a_group_is_refused(tiny: tuple[Any, Any]) -> None:
    paths = decoding.Paths(2, 1.0, ThinkingSettings())
    assert paths.state(torch.tensor([[1], [1], [2], [2]]), tiny[1]) is not None
    for split in ([[1], [2], [2], [3]], [[1], [1], [2]]):
        with pytest.raises(ValueError, match="not made of whole groups of 2 paths"):
            paths.state(torch.tensor(split), tiny[1])


def test_prompt_or_completion_that_does_not_fit_is_refused(tiny: tuple[Any, Any], settings: EvalSettings) -> None:
    """lm-eval would cut the prompt's beginning away, with a warning."""
    long = EvalSettings(**{**asdict(settings), "system_prompt": "0 " * 120})
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens, and the model reads 128"):
        evaluate.answer_problems(*tiny, long, "test")
    long = EvalSettings(**{**asdict(settings), "max_completion_length": 128})
    with pytest.raises(UserError, match="completions of up to 128 tokens, and the model reads 128"):
        evaluate.answer_problems(*tiny, long, "test")


def test_refused_chat_template_is_not_worked_around(
    tiny: tuple[Any, Any], settings: EvalSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval would drop the system turn."""
    refusing = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}"
    monkeypatch.setattr(tiny[1], "chat_template", refusing)
    with pytest.raises(UserError, match="chat template refuses this prompt: no system role"):
        evaluate.answer_problems(*tiny, settings, "test")
