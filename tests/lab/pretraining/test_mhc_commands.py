# SPDX-License-Identifier: Apache-2.0
"""The commands on hyper-connections: gates a layer and sublayer, and what a short context has read of its prompts."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.m3po.hyper_connections.routing_gate import as_gate

from m3po_lab.core.errors import UserError
from m3po_lab.pretraining.context import examples_read, prompts_read, rows
from m3po_lab.pretraining.routing_gates import gates_of, read_gates

DELIMITER = "\n\n"


def model(layers: int = 2, enabled: bool = True) -> Any:
    return SimpleNamespace(config=SimpleNamespace(mhc_enabled=enabled, num_hidden_layers=layers))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", [[0.5, 0.5], [0.5, 0.5]]),
        ("0.25,1", [[0.25, 0.25], [1, 1]]),
        ("0,0.25,0.5,1", [[0, 0.25], [0.5, 1]]),
    ],
)
def test_gate_is_one_number_or_one_a_layer_or_one_a_sublayer(text: str, values: list[list[float]]) -> None:
    assert as_gate(gates_of(model(), text, "final"), 2)[0].tolist() == values


@pytest.mark.parametrize(
    ("text", "of", "why"),
    [
        ("2", model(), "must be in .0, 1."),
        ("0.5,-1", model(), "must be in .0, 1."),
        ("half", model(), "give numbers separated by commas"),
        ("0.5,", model(), "give numbers separated by commas"),
        ("0.1,0.2,0.3", model(), "has 3 numbers: final has 2 layers; give 1, 2, or 4"),
        ("0.5", model(enabled=False), "final has no hyper-connections"),
    ],
)
def test_wrong_gate_is_one_line(text: str, of: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        gates_of(of, text, "final")
    if "numbers:" not in why and "hyper" not in why:
        with pytest.raises(UserError, match=why):
            read_gates(text)


def fake_task(kind: str, requests: list[tuple[str, ...]], shots: int = 0) -> Any:
    """What is read of lm-eval's task: a stand-in, the real one is in test_pretrain."""
    config = SimpleNamespace(num_fewshot=shots, fewshot_delimiter=DELIMITER)
    return SimpleNamespace(
        OUTPUT_TYPE=kind, config=config, instances=[SimpleNamespace(args=request) for request in requests]
    )


LM = SimpleNamespace(  # a token a character
    max_length=40,
    max_gen_toks=20,
    tok_encode=list,
    tokenizer=SimpleNamespace(decode="".join),
)


def test_examples_that_a_short_context_has_lost_are_counted() -> None:
    """Eight were shown, a table would say 8-shot: here one prompt fits whole, of the other the last one is left."""
    short, long = "a\n\nb\n\nQ?", "aaaaaaaaaaaaaaaaaaaa\n\nbbbb\n\nQ?"
    assert len(short) <= 20 < len(long)
    found = prompts_read(fake_task("generate_until", [(short, "x"), (long, "x")], shots=2), LM)
    assert found == {"cut": 0.5, "examples": 1.5}
    results = {"model": {"gsm8k_8shot": {"prompts_read": found}}, "baseline": {"gsm8k_8shot": {}}}
    assert rows(results, "gsm8k_8shot", 2) == [
        ("gsm8k_8shot, prompts cut at their beginning", ["50%", "0%"]),
        ("gsm8k_8shot, examples read of 2", ["1.5", "2.0"]),
    ]


@pytest.mark.parametrize(("text", "examples"), [("e\n\nQ?", 0), ("e\n\ne\n\nQ?", 1), ("?", 0), ("\n\nQ?", 0)])
def test_example_that_is_cut_is_not_counted(text: str, examples: int) -> None:
    assert examples_read(text, 8, DELIMITER, False) == examples


def test_choices_are_cut_with_their_answer_and_text_is_not_cut() -> None:
    assert prompts_read(fake_task("multiple_choice", [("a" * 36, "bbbbb"), ("a" * 37, "bbbbb")]), LM) == {"cut": 0.5}
    assert prompts_read(fake_task("loglikelihood_rolling", [("a" * 99,)]), LM) == {}
    assert rows({"model": {"arc_easy": {"prompts_read": {"cut": 0.0}}}}, "arc_easy", 0) == []
