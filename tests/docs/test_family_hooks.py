# SPDX-License-Identifier: Apache-2.0
"""Every family has every hook at its place: read from the patched model files, by one table of hook lines.

A hook that is missing would not be an error of its own: the model would think nothing and carry no streams.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.without_hook import hooks_of
from reference.families import FAMILIES, WITH_STREAMS
from transformers.m3po import hooks
from transformers.m3po.flags import SUPPORTED_MODEL_TYPES

from patchset import pins, series

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path("src/transformers/models")
LINES = {"transformers": 35, "unsloth": 10}  # that a family may add to an upstream
OLD = ("llama", "qwen2")  # came with the first patches, and are longer
# Class (without the family's name) and method -> calls of ours in their order, between upstream's own, which are in <>.
STREAMS = {
    "Model.__init__": ["<super>", "add_streams", "<post_init>"],
    "Model.forward": ["<embed_tokens>", "expand_streams", "<decoder_layer>", "reduce_streams", "<norm>"],
    "DecoderLayer.__init__": ["<super>", "add_hyper_connections"],
    "DecoderLayer.forward": [
        *("read_streams", "<input_layernorm>", "<self_attn>", "write_streams"),
        *("read_streams", "<post_attention_layernorm>", "<mlp>", "write_streams"),
    ],
}
HOOKS = {
    **STREAMS,
    "Model.__init__": ["<super>", "add_modules", "add_streams", "<post_init>"],
    "Model.forward": [
        *("<embed_tokens>", "mix_thinking_inputs", "pop_aslr_inputs", "expand_streams", "<decoder_layer>"),
        *("reduce_streams", "<norm>", "split_rows", "refine_states"),
    ],
    "Model.thinking_residual": ["thinking_residual"],
}
HANDED_ON = {"Model.forward": "decoder_layer", "ForCausalLM.forward": "model"}  # gets mhc_gate=mhc_gate


def upstream(name: str) -> pins.Upstream:
    return next(up for up in pins.load(ROOT) if up.name == name)


def source(family: str, kind: str = "modeling") -> str:
    checkout = upstream("transformers").checkout
    return (checkout / MODELS / family / f"{kind}_{family}.py").read_text(encoding="utf-8")


def methods(text: str, name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a family's classes, by class (without its name) and method."""
    return {
        f"{part.name.removeprefix(name)}.{method.name}": method
        for part in ast.parse(text).body
        if isinstance(part, ast.ClassDef)
        for method in part.body
        if isinstance(method, ast.FunctionDef)
    }


def calls(method: ast.FunctionDef) -> Iterator[ast.Call]:
    """In the order of the text, and of a line from within."""
    found = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    yield from sorted(found, key=lambda call: (call.end_lineno, call.end_col_offset))


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def sequence(method: ast.FunctionDef, expected: list[str]) -> list[str]:
    """The calls of a method as the table has them: of upstream's those alone that the table names."""
    plain = {name.strip("<>") for name in expected if name.startswith("<")}
    ours = {name for names in HOOKS.values() for name in names if not name.startswith("<")}
    names = [called(call) for call in calls(method)]
    return [f"<{name}>" if name in plain else name for name in names if name in plain | ours]


def expected(family: str, place: str) -> list[str]:
    table = HOOKS if family in FAMILIES else STREAMS
    if family == "nanochat" and place == "Model.forward":  # its norm is applied before the layers too
        return [table[place][0], "<norm>", *table[place][1:]]
    return table[place]


def complaints(text: str, family: str) -> list[str]:
    """Where a model file is not as the tables say."""
    table = HOOKS if family in FAMILIES else STREAMS
    found = methods(text, WITH_STREAMS[family][0])
    wrong = [place for place in table if sequence(found[place], expected(family, place)) != expected(family, place)]
    for place, into in HANDED_ON.items():
        words = [
            {word.arg: word.value for word in call.keywords} for call in calls(found[place]) if called(call) == into
        ]
        if [getattr(given.get("mhc_gate"), "id", None) for given in words] != ["mhc_gate"]:
            wrong.append(f"{place}, mhc_gate")
    return wrong


@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_a_family_has_its_hooks_in_their_order(kind: str):
    assert complaints(source(kind), kind) == []


@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_a_hook_that_is_missing_is_seen(kind: str):
    """Taken out one by one; tests/docs/without_hook.py runs the family's tests so, which takes minutes."""
    without = dict(hooks_of(source(kind), hooks.__all__))
    assert len(without) == (16 if kind in FAMILIES else 10)
    assert [name for name, text in without.items() if len(complaints(text, kind)) != 1] == []


@pytest.mark.parametrize("kind", WITH_STREAMS)
@pytest.mark.parametrize("place", HANDED_ON)
def test_a_family_takes_the_gate(kind: str, place: str):
    method = methods(source(kind), WITH_STREAMS[kind][0])[place]
    assert "mhc_gate" in [argument.arg for argument in method.args.args]


@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_a_family_declares_its_fields(kind: str):
    decorator = "with_m3po_fields" if kind in FAMILIES else "with_mhc_fields"
    tree = ast.parse(source(kind, "configuration"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config"))
    names = [node.id for node in config.decorator_list if isinstance(node, ast.Name)]
    assert names[-2:] == ["strict", decorator]


def test_the_list_of_the_tests_is_that_of_the_code() -> None:
    assert tuple(FAMILIES) == SUPPORTED_MODEL_TYPES


@pytest.mark.parametrize("name", LINES)
def test_a_family_adds_few_lines_to_an_upstream(name: str):
    """Of files that bear its name; in Unsloth the families share one file."""
    for family in set(FAMILIES) - {*OLD}:
        added = sum(
            file.added
            for patch in series.load(upstream(name))
            for file in patch.files()
            if family in Path(file.path).stem
        )
        assert added <= LINES[name], (family, added)
