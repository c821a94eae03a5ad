# SPDX-License-Identifier: Apache-2.0
"""Pretraining with and without hyper-connections: the text, bits per byte, the pair, its report; lm-eval offline."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import NanoChatForCausalLM

from m3po_lab import eval_mhc, pretrain, pretrain_pair, report_mhc
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json
from m3po_lab.pretraining import arguments, evaluation
from m3po_lab.pretraining import data as pretrain_data
from m3po_lab.pretraining import report as pretrain_report
from m3po_lab.pretraining.measures import nats_of_rows
from m3po_lab.pretraining.model import make_model
from m3po_lab.pretraining.tasks import FILES

TINY = ["--depth", "2", "--model_dim", "32", "--num_heads", "2", "--max_seq_len", "32", "--validation_rows", "4"]
TINY += ["--max_steps", "6", "--save_steps", "3", "--eval_steps", "3", "--warmup_steps", "1", "--report_to", "none"]
TINY += ["--per_device_train_batch_size", "4"]
# A few made-up rows in the formats of the four tasks and of a text.
FIXTURES = Path(__file__).parents[2] / "fixtures" / "lm_eval"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = [" ".join(f"{(7 * i + j) % 31} plus {j}" for j in range(12)) + " é" for i in range(120)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in words), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def pair(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison over one seed, whose runs are made in this process."""
    folder = tmp_path_factory.mktemp("pairs")
    words = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--output_dir", str(folder)]

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "m3po_lab.pretrain"]
        return subprocess.CompletedProcess(command, pretrain.main(command[3:]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m3po_lab.experiments.runs.subprocess", SimpleNamespace(run=run))
        assert pretrain_pair.main(words) == 0
    return folder


def test_a_byte_is_a_token_and_back() -> None:
    tokenizer = pretrain_data.byte_tokenizer()
    sample = "naïve 你好\n\t x = 1"
    ids = tokenizer(sample)["input_ids"]
    assert len(ids) == len(sample.encode()) and tokenizer.decode(ids) == sample
    counted = pretrain_data.bytes_of_tokens(tokenizer)
    assert counted[[tokenizer.bos_token_id, tokenizer.eos_token_id]].tolist() == [0, 0] and counted.sum() == 256


def test_rows_are_the_text_in_order_and_no_document_is_in_both(text: str) -> None:
    tokenizer = pretrain_data.byte_tokenizer()
    training, held_out = pretrain_data.load_text(text, None, tokenizer, 32, 4, 10**6)
    assert isinstance(training, pretrain_data.Rows) and training.rows.shape[1] == 32 and len(held_out) == 4
    whole = list(pretrain_data.documents(text, None))
    told = tokenizer.decode(training.rows.flatten(), skip_special_tokens=True)
    kept = "".join(line for index, line in enumerate(whole) if index % pretrain_data.HELD_OUT)
    assert kept.startswith(told) and len(kept.encode()) - len(told.encode()) < 32
    assert tokenizer.decode(held_out.rows[0], skip_special_tokens=True) == whole[0][: len(whole[0])][:31]
    found = training[0]
    assert found["labels"][0] == pretrain_data.UNSCORED and torch.equal(found["labels"][1:], found["input_ids"][1:])
    assert len(pretrain_data.load_text(text, None, tokenizer, 32, 4, 5)[0]) == 5  # type: ignore[arg-type]


def test_validation_rows_are_spread_over_all_documents_and_long_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first few documents may be nothing but tables: one of sympy's, a list of hashes, was most of the rows."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    for index in range(60):
        numbers = range(index * 10**6, index * 10**6 + (pretrain_data.LONGEST if index % 2 else 64))
        (folder / f"part{index}.py").write_text(" ".join(map(str, numbers)))
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = pretrain_data.byte_tokenizer()
    apart = [text for i, text in enumerate(pretrain_data.documents("python:some_package", None)) if i % 20 == 0]
    assert len(apart) == 3 and max(map(len, apart)) == pretrain_data.LONGEST
    _, held_out = pretrain_data.load_text("python:some_package", None, tokenizer, 32, 12, 4)
    whole = list(pretrain_data.rows(apart, tokenizer, 32))
    assert len(whole) > 100 and len(held_out) == 12
    assert all(torch.equal(row, whole[i * len(whole) // 12]) for i, row in enumerate(held_out.rows))


@pytest.mark.parametrize(
    ("dataset", "why"),
    [("python:nosuchpackage", "no package nosuchpackage"), ("nosuch.jsonl", "does not exist")],
)
def test_a_text_that_is_not_there_is_one_line(dataset: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        next(pretrain_data.documents(dataset, None))


def test_too_few_validation_rows_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--validation_rows 999"):
        pretrain_data.load_text(text, None, pretrain_data.byte_tokenizer(), 32, 999, 10)


def test_bits_per_byte_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    labels[0, 3] = labels[2, 6] = pretrain_data.UNSCORED
    wanted = torch.zeros(3, dtype=torch.float64)
    for row in range(3):
        for at in range(1, 7):
            if labels[row, at] >= 0:
                wanted[row] -= logits[row, at - 1].double().log_softmax(-1)[labels[row, at]]
    assert torch.allclose(nats_of_rows(logits, labels).double(), wanted, atol=1e-5)


def test_both_models_begin_as_the_same_one_and_as_nanochat(text: str, tmp_path: Path) -> None:
    words = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--output_dir", str(tmp_path)]
    tokenizer, logits = pretrain_data.byte_tokenizer(), []
    ids = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(1))
    for enabled in ("false", "true"):
        for start in ("true", "false"):
            script = arguments.parse([*words, "--mhc_enabled", enabled, "--nanochat_init", start]).script
            torch.manual_seed(5)
            model = make_model(script, 320, tokenizer).eval()
            logits.append(model(input_ids=ids).logits)
            zero = model.model.layers[0].mlp.fc2.weight.abs().max().item() == 0
            assert zero == (start == "true") and model.lm_head.weight.std().item() == pytest.approx(
                0.001 if start == "true" else 0.02, rel=0.1
            )
    assert torch.allclose(logits[0], logits[2], atol=1e-6) and torch.allclose(logits[1], logits[3], atol=1e-5)


def test_a_pair_trains_and_reports(pair: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = (pair / "report.md").read_text()
    assert "One pair cannot tell a difference from chance" in report and "gate effect" in report
    for name in ("curves.png", "routing.png"):
        assert (pair / name).stat().st_size > 5000
    own, plain = (read_json(pair / f"{variant}-seed0" / "result.json") for variant in ("mhc", "baseline"))
    assert own is not None and plain is not None
    assert own["curve"][0][0] == 3 and own["curve"][-1][1] == own["bits_per_byte"] < math.log2(320)
    assert own["mhc_parameters"] == own["parameters"] - plain["parameters"] > 0 and plain["report"] is None
    steps = [step for step, _ in own["curve"]]
    assert steps == [3, 6]  # the last evaluation is in it once
    first = own["first_matrices"]["0.attn"]
    assert first[0][0] == pytest.approx(math.e**5 / (math.e**5 + 3), abs=1e-5) and first != own["matrices"]["0.attn"]
    assert all(abs(sum(row) - 1) < 0.05 for matrix in own["matrices"].values() for row in matrix)
    # The same command again does nothing but the report.
    words = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--output_dir", str(pair)]
    (pair / "report.md").unlink()
    assert pretrain_pair.main(words) == 0
    assert capsys.readouterr().out.count("done before") == 2 and (pair / "report.md").read_text() == report
    for flag, value, before in (("max_steps", "9", "6"), ("learning_rate", "0.001", "0.006"), ("depth", "1", "2")):
        assert pretrain_pair.main([*words, f"--{flag}", value]) == 2
        line = f"--{flag} {value}: {pair / 'baseline-seed0'} has a run with {before}; set that, or give another"
        assert line in capsys.readouterr().err


def test_several_pairs_are_compared_by_their_differences(pair: Path, tmp_path: Path) -> None:
    places = []
    for seed, gain in enumerate((0.10, 0.12, 0.11)):
        for variant in ("baseline", "mhc"):
            result: Any = read_json(pair / f"{variant}-seed0" / "result.json")
            result |= {"seed": seed, "bits_per_byte": 2.0 + seed - gain * (variant == "mhc")}
            places.append(tmp_path / f"{variant}-{seed}")
            places[-1].mkdir()
            if variant == "mhc":
                result["first_matrices"]["1.mlp"][0][3] += 0.25 * seed
            (places[-1] / "result.json").write_text(json.dumps(result))
    text = pretrain_report.write_report(places, tmp_path)
    assert "the starts of two seeds are at most 5.0e-01 apart" in text
    # mean -0.11, s = 0.01, t(0.975, 2) = 4.3027: half an interval of 0.0248
    assert "Mean difference -0.1100 bits per byte, 95 % interval -0.1348 to -0.0852: mHC and baseline differ" in text


def test_runs_that_differ_in_more_are_not_compared(pair: Path, tmp_path: Path) -> None:
    result: Any = read_json(pair / "mhc-seed0" / "result.json")
    for flag in ("model_dim", "learning_rate"):
        other = {**result, "flags": {**result["flags"], flag: 64}}
        (tmp_path / "result.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=f"differ in {flag}"):
            pretrain_report.load_results([pair / "baseline-seed0", tmp_path])
    del result["flags"]  # of before results had them
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert set(pretrain_report.load_results([pair / "baseline-seed0", tmp_path])["mhc"]) == {0}


@pytest.mark.parametrize("words", [["--learning_rate", "1e-3"], ["--seed", "1"], ["--num_heads", "4"]])
def test_a_stopped_run_of_other_flags_is_not_gone_on_with(
    words: list[str], pair: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pair / "baseline-seed0", tmp_path / "run"))
    given = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--output_dir", str(folder), *words]
    assert pretrain.main(given) == 2  # finished
    (folder / "result.json").unlink()
    assert pretrain.main(given) == 2
    error = capsys.readouterr().err
    assert error.count(f"{words[0]} {float(words[1]):g}: {folder} has a run with") == 2 and error.count("\n") == 2


def test_the_text_counts_by_what_it_says(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "another"}\n')
    assert pretrain_pair.main(["configs/mhc_small.yaml", "--dataset", str(file), *TINY, "--output_dir", str(pair)]) == 2
    assert f"--dataset {file} (sha256 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--mhc_enabled", "true"], "--mhc_enabled and --seed are what"),
        (["--nosuch", "1"], "Unknown argument --nosuch"),
        (["--max_steps", "-1"], "--max_steps -1: it must be at least 1"),
        (["--mhc_num_streams", "5", "--mhc_residual", "birkhoff"], "mhc_residual='birkhoff'"),
    ],
)
def test_a_wrong_flag_is_one_line(
    words: list[str], why: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--output_dir", str(tmp_path), *words]
    assert pretrain_pair.main(given) == 2
    printed = capfd.readouterr()
    assert why in printed.err and "run 1 of" not in printed.out


def test_a_stopped_run_goes_on_and_ends_as_the_whole_one(
    text: str, pair: Path, tmp_path: Path, closed_files: Callable[[Path], list[str]]
) -> None:
    words = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--mhc_enabled", "true", "--output_dir", str(tmp_path)]
    words += ["--save_total_limit", "2"]
    assert pretrain.main(words) == 0
    (tmp_path / "result.json").unlink()
    for folder in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / folder)
    assert pretrain.main(words) == 0
    result = read_json(tmp_path / "result.json")
    assert result is not None and result["steps_timed"] == 3  # the first three were not trained again
    assert closed_files(tmp_path) == []
    whole = NanoChatForCausalLM.from_pretrained(pair / "mhc-seed0" / "final").state_dict()
    found = NanoChatForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_two_processes_train_as_one(text: str, pair: Path, tmp_path: Path) -> None:
    """DDP (gloo): half of each batch in each process. Sums in another order differ by units of float32."""
    words = ["configs/mhc_small.yaml", "--dataset", text, *TINY, "--per_device_train_batch_size", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "m3po_lab.pretrain", *words, "--mhc_enabled", "true", "--output_dir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mhc, seed 0:") == 1
    one, both = (read_json(folder / "result.json") for folder in (pair / "mhc-seed0", tmp_path))
    assert one is not None and both is not None and both["tokens_per_step"] == one["tokens_per_step"]
    for (step, alone), (at, found) in zip(one["curve"], both["curve"], strict=True):
        assert step == at and found == pytest.approx(alone, abs=1e-4)
    whole = NanoChatForCausalLM.from_pretrained(pair / "mhc-seed0" / "final").state_dict()
    for name, value in NanoChatForCausalLM.from_pretrained(tmp_path / "final").state_dict().items():
        torch.testing.assert_close(value, whole[name], atol=1e-3, rtol=0, msg=name)


def test_a_checkpoint_is_reported_on_with_its_gradients_and_verdicts(
    pair: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(pair / "mhc-seed0" / "final"), "--dataset", text, "--output_dir", str(tmp_path)]
    assert report_mhc.main([*words, "--gate", "0,0.5,1,1"]) == 0
    printed = capsys.readouterr().out
    assert "Routing gate 0,0.5,1,1 against 1: " in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| 0.", "| 1."))]
    assert [row[0] for row in rows] == ["| 0.attn", "| 0.mlp", "| 1.attn", "| 1.mlp"]
    heads = printed.splitlines()[0].split(" | ")
    assert all(float(row[heads.index("b, post")]) > 0 for row in rows) and len(rows[0]) == len(heads) == 13
    assert "WARNING: gate has no effect" in printed  # six steps
    assert (tmp_path / "report.md").read_text().strip() in printed and (tmp_path / "routing.png").stat().st_size > 5000
    monkeypatch.setattr("m3po_lab.evaluation.folder.PROJECT_ROOT", tmp_path)
    shutil.copytree(pair / "mhc-seed0" / "final", tmp_path / "mhc-seed0" / "final")
    for folder in (words[0], str(tmp_path / "mhc-seed0" / "final")):
        assert report_mhc.main([folder, *words[1:3]]) == 0
    assert len(list((tmp_path / "evals").glob("mhc-seed0-final-routing-*"))) == 2
    capsys.readouterr()
    for wrong, why in (
        ([str(pair / "baseline-seed0" / "final")], "has no hyper-connections"),
        ([words[0], "--dataset", "python:nosuch"], "no package nosuch is installed"),
    ):
        assert report_mhc.main(wrong) == 2
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mhc_small", "mhc_d12"])
def test_the_projects_files_parse_and_a_missing_one_names_them(name: str) -> None:
    run = arguments.parse([f"configs/{name}.yaml", "--use_cpu", "true", "--bf16", "false"])
    assert run.script.depth in (4, 12) and run.variant == "baseline"
    with pytest.raises(UserError, match=rf"nope.yaml does not exist.*{name}.yaml") as found:
        arguments.parse(["configs/nope.yaml"])
    assert "demo" not in str(found.value)


def test_lm_eval_runs_all_tasks_offline_beside_the_baseline_at_a_gate(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    places = [str(pair / f"{variant}-seed0" / "final") for variant in ("mhc", "baseline")]
    words = [places[0], "--baseline", places[1], "--gate", "0,0.5,1,0", "--data", str(FIXTURES), "--limit", "2"]
    assert eval_mhc.main([*words, "--output_dir", str(tmp_path)]) == 0
    found: Any = read_json(tmp_path / "results.json")
    for name in ("model", "baseline"):
        assert list(found["results"][name]) == list(FILES)
        assert 0 < found["results"][name]["bits_per_byte"]["bits_per_byte,none"] < 20
        assert found["decoding"][name]["seconds_per_token"] > 0
        read = found["results"][name]["gsm8k_8shot"]["prompts_read"]
        assert read["cut"] == 1.0 and read["examples"] < 8, "the context is short"
    printed = capsys.readouterr().out
    assert "ms per decoded token" in printed
    assert f"| gsm8k_8shot, examples read of 8 | {read['examples']:.1f} | {read['examples']:.1f} |" in printed


def test_a_stopped_evaluation_goes_on_behind_the_tasks_that_are_done(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    plain = str(pair / "baseline-seed0" / "final")
    words = [plain, "--data", str(FIXTURES), "--limit", "2", "--tasks", "arc_easy", "hellaswag"]
    words += ["--output_dir", str(tmp_path)]
    with monkeypatch.context() as patched:  # Ctrl-C in the second task
        whole = evaluation.simple_evaluate
        calls: list[Any] = []

        def stopped(*given: Any, **more: Any) -> Any:
            calls.append(more["tasks"])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return whole(*given, **more)

        patched.setattr(evaluation, "simple_evaluate", stopped)
        assert eval_mhc.main(words) == 130
    assert "goes on behind the tasks that are done" in capsys.readouterr().err
    key, *parts = map(json.loads, (tmp_path / "model.partial.jsonl").read_text().splitlines())
    assert [name for name, _ in parts] == ["arc_easy"]
    parts[0][1]["acc_norm,none"] = 0.125  # to know it again
    (tmp_path / "model.partial.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [key, *parts]))
    assert eval_mhc.main([*words[:-4], "hellaswag", "arc_easy", *words[-2:]]) == 0
    assert "arc_easy: done before" in capsys.readouterr().out and not list(tmp_path.glob("*.partial.jsonl"))
    found: Any = read_json(tmp_path / "results.json")
    assert list(found["results"]["model"]) == ["hellaswag", "arc_easy"]
    assert found["results"]["model"]["arc_easy"]["acc_norm,none"] == 0.125
    # What is there of another limit or model is neither taken nor written over.
    before = (tmp_path / "results.json").read_text()
    words[words.index("--limit") + 1] = "3"
    for given in (words, [str(pair / "mhc-seed0" / "final"), *words[1:]]):
        assert eval_mhc.main(given) == 2
        assert f"--output_dir {tmp_path} has an evaluation with another " in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == before


def test_what_the_evaluation_lacks_is_one_line(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, own = (str(pair / f"{variant}-seed0" / "final") for variant in ("baseline", "mhc"))
    for words, why in (
        ([plain, "--gate", "0.5"], "has no hyper-connections"),
        ([own, "--gate", "2"], "must be in [0, 1]"),
        ([str(tmp_path)], "is not a model folder"),
        ([own, "--data", str(tmp_path)], "has no gsm8k_train.jsonl, which gsm8k needs"),
    ):
        assert eval_mhc.main(words) == 2
        printed = capsys.readouterr().err
        assert why in printed and len(printed.strip().splitlines()) == 1
