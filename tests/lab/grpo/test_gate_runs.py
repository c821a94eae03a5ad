# SPDX-License-Identifier: Apache-2.0
"""Runs with a learnable gating function, from start to evaluation and export: full model and adapter.

The gate of the full model reads the vocabulary, that of the adapter the embedding matrix of its base model. λ is so
large, to the end of a completion, that what the gate does is seen in what is sampled.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from m3po_lab import eval_gsm8k, export_model
from m3po_lab.command_line import idle_flags
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.grpo.checkpoints import missing_module
from m3po_lab.models.loading import load_model
from m3po_lab.train import main

LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj")
OPTIONS = {"full": {"rank": 4}, "adapter": {"rank": 4, "project_embeddings": True}}
KINDS = {"full": (), "adapter": LORA}
STRUCTURE = {kind: {"project_embeddings": False, **options} for kind, options in OPTIONS.items()}
LOUD = ("--cross_path_lambda", "0.9", "--cross_path_phase", "all")
RATES = ("--learning_rate", "0.003", "--gating_learning_rate", "0.05")
SHORT = ("--dataset", "problems", "--batch_size", "6")
PARAMETERS = ("m3po_gating.U", "m3po_gating.V")
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def words(kind: str, **changes: str) -> list[str]:
    given = {"mode": "m3po", "gating_type": "luong", "gating_config": json.dumps(OPTIONS[kind]), "max_steps": "4"}
    flags = [word for name, value in (given | changes).items() for word in (f"--{name}", value)]
    return [*flags, *LOUD, *RATES, *KINDS[kind]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread only waits for the first with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(kind: str, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / kind
    assert main([str(tiny_config), *words(kind), "--output_dir", str(folder)]) == 0
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def gate_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the weights have of a gate, by its name on the base model."""
    return {name[name.index("m3po_") :]: value for name, value in weights_of(folder).items() if "m3po_" in name}


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy of a checkpoint whose weights are what `change` makes of them."""
    copy = Path(shutil.copytree(folder, out / folder.name))
    file = next(copy.glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return copy


def without(name: str) -> Change:
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(name)}


def greedy(folder: Path) -> torch.Tensor:
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))
    with torch.no_grad():
        return model.eval()(torch.arange(2, 22).reshape(2, 10)).logits


def evaluated(folder: Path, out: Path, *more: str) -> list[list[str]]:
    assert eval_gsm8k.main([str(folder), *SHORT, *more, "--output_dir", str(out)]) == 0
    return [json.loads(line)["completions"] for line in (out / "problems.jsonl").read_text().splitlines()]


def test_checkpoint_carries_the_trained_gate_and_says_what_it_is(kind: str, run: Path) -> None:
    first, last = gate_of(run / "checkpoint-2"), gate_of(run / "final")
    names = {*PARAMETERS, *(("m3po_gating.whitening", "m3po_gating.token_scale") if kind == "adapter" else ())}
    assert first.keys() == last.keys() == names and all(value.dtype == torch.float32 for value in last.values())
    assert all(torch.equal(first[name], value) != (name in PARAMETERS) for name, value in last.items())
    if kind == "adapter":
        assert (last["m3po_gating.whitening"] - torch.eye(32)).abs().max() > 0.1
    numbers = read_json(run / "final" / "m3po.json") or {}
    told = {"gating_type": "luong", "gating_config": STRUCTURE[kind], "gating_training": "embeddings"}
    assert {name: value for name, value in numbers.items() if name.startswith("gating")} == told
    config = read_json(run / "final" / "config.json") or {}
    stored = {"m3po_gating_enabled": True, "m3po_gating_type": "luong", "m3po_gating_config": STRUCTURE[kind]}
    assert {key: value for key, value in config.items() if "gating" in key} == (stored if kind == "full" else {})


def test_resumed_run_ends_where_the_uninterrupted_one_does(
    kind: str, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    torch.manual_seed(12345)
    given = [*words(kind), "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    assert main([str(tiny_config), *given]) == 0
    uninterrupted, resumed = weights_of(run / "final"), weights_of(folder / "final")
    assert uninterrupted.keys() == resumed.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], uninterrupted[name])] == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gating_config", '{"rank": 8, "project_embeddings": true}', "was trained with {'"),
        ("gating_type", "bahdanau", "was trained with luong"),
        ("gating_training", "logits", "was trained with embeddings"),
    ],
)
def test_resuming_with_another_gate_is_refused(
    kind: str, name: str, value: str, said: str, run: Path, tiny_config: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    changes = {name: value} | ({"gating_config": "{}"} if name == "gating_type" else {})
    given = [*words(kind, **changes), "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    capsys.readouterr()
    assert main([str(tiny_config), *given]) == 2
    error = capsys.readouterr().err
    assert f"--{name} " in error and said in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_checkpoint_is_evaluated_as_one_plain_path_and_as_a_group_with_its_trained_gate(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    evaluated(run / "final", tmp_path / "greedy")
    said = capsys.readouterr().out
    assert "gating_type=luong" in said and "evaluated plain, one path" in said
    results = read_json(tmp_path / "greedy" / "results.json") or {}
    assert results["agreement"]["same_completion"] == results["agreement"]["problems"] == 6
    evaluated(run / "final", tmp_path / "group", "--num_paths", "4")
    assert "4 paths of each problem as a cross-path group" in capsys.readouterr().out
    assert "majority_vote,all" in (read_json(tmp_path / "group" / "results.json") or {})["results"]["problems"]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--gating_type", "bahdanau", "with gating_type luong"), ("--cross_path_lambda", "0.1", "cross_path_lambda 0.9")],
)
def test_evaluation_with_another_number_is_refused(
    flag: str, value: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert eval_gsm8k.main([str(run / "final"), *SHORT, flag, value, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_run_goes_on_from_a_trained_gate(kind: str, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    more = ["--model_name_or_path", str(run / "final"), "--gating_warmup_steps", "2", "--max_steps", "2"]
    own = idle_flags.without(words(kind), ["use_peft", *idle_flags.LORA.split()])  # an adapter keeps its own
    assert main([str(tiny_config), *own, *more, "--output_dir", str(tmp_path / "more")]) == 0
    before, after = weights_of(run / "final"), weights_of(tmp_path / "more" / "final")
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name[name.index("m3po_") :] if "m3po_" in name else name for name in moved} == {*PARAMETERS}


# Export


def test_exported_model_keeps_its_gate_and_decodes_its_groups_with_it(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, out = run / "final", tmp_path / "out" / "final"
    out.parent.mkdir()
    assert export_model.main([str(final), str(out), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "a checkpoint with a learnable gating function" in said and "stock vLLM cannot serve it" in said
    config, numbers = (read_json(out / name) or {} for name in ("config.json", "m3po.json"))
    assert config["m3po_gating_config"] == numbers["gating_config"] == STRUCTURE[kind]
    trained, written = gate_of(final), gate_of(out)
    assert trained.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in trained.items())
    torch.testing.assert_close(greedy(out), greedy(final), atol=1e-4, rtol=0)  # merging adds in another order

    def lively(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        larger = {"model.embed_tokens.weight": 50.0, "lm_head.weight": 15.0}
        return weights | {name: scale * weights[name] for name, scale in larger.items()}

    def turned(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return lively({name: -value if name.endswith("gating.U") else value for name, value in weights.items()})

    folders = [changed(out, tmp_path / change.__name__, change) for change in (lively, turned)]
    groups = [evaluated(folder, folder.parent / "group", "--num_paths", "4") for folder in folders]
    assert groups[0] != groups[1], "the trained gate is not used"
    assert torch.equal(*map(greedy, folders)), "a single path reads the gate"


def test_gate_of_an_exported_model_stays_float32(run: Path, tmp_path: Path) -> None:
    assert export_model.main([str(run / "final"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert all(value.dtype == torch.float32 for value in gate_of(tmp_path / "out").values())
    assert weights_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).model.m3po_gating
    assert torch.equal(kept.U, gate_of(run / "final")["m3po_gating.U"])


def test_exported_model_without_its_gate_is_an_ordinary_one(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, out = run / "final", tmp_path / "out"
    assert export_model.main([str(final), str(out), "--gating", "off"]) == 0
    said = capsys.readouterr().out
    assert "an ordinary checkpoint" in said and "stock vLLM can serve it" in said
    for name in ("config.json", "generation_config.json"):
        assert "gating" not in (out / name).read_text()
    assert weights_of(out).keys() == weights_of(tiny_model).keys()
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(plain.model, "m3po_gating") and not plain.config.m3po_gating_enabled
    torch.testing.assert_close(greedy(out), greedy(final), atol=1e-4, rtol=0)
    assert evaluated(out, tmp_path / "plain") == evaluated(final, tmp_path / "trained")


# Damage


@pytest.mark.parametrize("name", PARAMETERS)
def test_checkpoint_that_lacks_a_parameter_of_its_gate_is_refused(
    kind: str, name: str, run: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = changed(run / "final", tmp_path, without(name))
    with pytest.raises(UserError, match=name):
        load_model(ModelConfig(model_name_or_path=str(final), dtype="float32"))
    cut = changed(run / "checkpoint-2", tmp_path / "run", without(name))
    assert missing_module(cut, [*weights_of(cut)]) == name
    assert missing_module(run / "checkpoint-2", [*weights_of(run / "checkpoint-2")]) is None
    capsys.readouterr()
    given = [*words(kind), "--output_dir", str(cut.parent), "--resume_from_checkpoint", str(cut)]
    assert main([str(tiny_config), *given]) == 2
    error = capsys.readouterr().err
    assert f"cannot be resumed: {name} is missing" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["adapter"], indirect=True)
def test_adapter_that_does_not_name_its_gate_is_refused(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "final", tmp_path / "final"))
    adapter = read_json(folder / "adapter_config.json") or {}
    assert adapter["modules_to_save"] == ["m3po_gating"]
    write_json(folder / "adapter_config.json", adapter | {"modules_to_save": None})
    with pytest.raises(UserError, match="m3po_gating.*does not name a learnable gating function"):
        load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))


@pytest.mark.parametrize("kind", ["full"], indirect=True)  # an adapter's gate is made of its m3po.json
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gating_config": {"rank": 8}}, "its m3po.json says rank 8 and its model has 4"),
        ({"gating_type": "baseline", "gating_config": {}}, "its m3po.json says gating_type baseline and its model has"),
    ],
)
def test_a_model_with_another_gate_than_its_m3po_json_says_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    copy = Path(shutil.copytree(run / "final", tmp_path / "final"))
    numbers = read_json(copy / "m3po.json") or {}
    write_json(copy / "m3po.json", numbers | change)
    assert eval_gsm8k.main([str(copy), *SHORT, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["full"], indirect=True)
def test_a_group_whose_gate_was_left_out_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_model.main([str(run / "final"), str(tmp_path / "plain"), "--gating", "off"]) == 0
    given = [str(tmp_path / "plain"), *SHORT, "--num_paths", "4", "--output_dir", str(tmp_path / "out")]
    assert eval_gsm8k.main(given) == 2
    error = capsys.readouterr().err
    assert "has not the gating function that its group interacts through (luong)" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["adapter"], indirect=True)
def test_an_adapter_needs_its_m3po_json_and_all_that_its_gate_reads(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "final", tmp_path / "bare"))
    (copy / "m3po.json").unlink()
    with pytest.raises(UserError, match="its m3po.json does not say gating_type"):
        load_model(ModelConfig(model_name_or_path=str(copy), dtype="float32"))
    lacking = changed(run / "final", tmp_path, without("whitening"))
    with pytest.raises(UserError, match="its weights lack m3po_gating.whitening"):
        load_model(ModelConfig(model_name_or_path=str(lacking), dtype="float32"))
