# SPDX-License-Identifier: Apache-2.0
"""A flag that does nothing in a run is refused by name; a control may keep the numbers of its pair in its YAML."""

from pathlib import Path

import pytest

from m3po_lab import sweep
from m3po_lab.command_line.idle_flags import SWITCHES, without
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.grpo.config import parse_run
from m3po_lab.pretrain_pair import main as train_mhc
from m3po_lab.pretraining import arguments


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("use_cpu: true\nbf16: false\n")
    return file


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora_r", "8"], "--lora_r does nothing without --use_peft true: change that, or leave --lora_r out."),
        (["--lora_r", "16"], "--lora_r does nothing"),  # the default
        (["--lora-alpha=8"], "--lora_alpha does nothing"),
        (["--lora_target_modules", "q_proj", "v_proj"], "--lora_target_modules does nothing"),
        (["--use_dora", "true"], "--use_dora does nothing"),
        (["--use_rslora"], "--use_rslora does nothing"),
        (["--use_bnb_nested_quant", "true"], "--use_bnb_nested_quant does nothing without --load_in_4bit true"),
        (["--cross_path_lambda", "0.3"], "--cross_path_lambda does nothing without --mode m3po or h3po"),
        (["--mode", "none", "--cross_path_temp", "match"], "--cross_path_temp does nothing"),
        (["--mode", "hrpo", "--gating_type", "raw_dot"], "--gating_type does nothing"),
        (["--cross_path_phase", "all"], "--cross_path_phase does nothing without --mode m3po, hrpo or h3po"),
        (["--mode", "m3po", "--thinking_residual_r_min", "0.9"], "--thinking_residual_r_min does nothing"),
        (["--mode", "m3po", "--thought_top_k", "8"], "--thought_top_k does nothing"),
        (["--mode", "m3po", "--gating_learning_rate", "0.1"], "--gating_learning_rate does nothing"),
        (["--aslr_enabled", "false", "--aslr_num_paths", "2"], "--aslr_num_paths does nothing"),
    ],
)
def test_a_flag_that_does_nothing_is_refused_by_name(words: list[str], line: str, yaml: Path) -> None:
    with pytest.raises(UserError) as found:
        parse_run([str(yaml), *words])
    assert str(found.value).startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        ["--use_peft", "true", "--lora_r", "8", "--use_dora", "true"],
        ["--mode", "m3po", "--cross_path_lambda", "0.3", "--cross_path_phase", "all", "--gating_type", "raw_dot"],
        ["--mode", "m3po", "--gating_type", "luong", "--gating_learning_rate", "0.1", "--thought_top_k", "8"],
        ["--mode", "hrpo", "--thinking_residual_r_min", "0.9", "--thought_top_k", "8", "--cross_path_phase", "all"],
        ["--thinking_residual_enabled", "true", "--thinking_residual_r_min", "0.9"],
        ["--aslr_num_paths", "2"],  # the model may have ASLR
        ["--aslr_enabled", "true", "--aslr_num_paths", "2"],
    ],
)
def test_a_flag_that_does_something_is_taken(words: list[str], yaml: Path) -> None:
    parse_run([str(yaml), *words])


@pytest.mark.parametrize(
    ("text", "words", "refused"),
    [
        ("lora_r: 8\n", [], "--lora_r"),  # use_peft forgotten
        ("cross_path_lambda: 0.3\n", [], "--cross_path_lambda"),  # mode forgotten
        ("lora_r: 8\nuse_peft: true\n", [], None),
        ("lora_r: 8\nuse_peft: true\n", ["--use_peft", "false"], None),  # said so
        ("mode: none\ncross_path_lambda: 0.3\n", [], None),  # the control, its pair's numbers
        ("mode: m3po\ncross_path_lambda: 0.3\n", ["--mode", "none"], None),
        (
            "mode: m3po\ncross_path_lambda: 0.3\n",
            ["--mode", "none", "--cross_path_lambda", "0.3"],
            "--cross_path_lambda",
        ),
    ],
)
def test_a_yaml_keeps_the_numbers_of_what_it_switches_off(
    text: str, words: list[str], refused: str | None, yaml: Path
) -> None:
    yaml.write_text(yaml.read_text() + text)
    if refused is None:
        parse_run([str(yaml), *words])
        return
    with pytest.raises(UserError, match=f"^{refused} does nothing"):
        parse_run([str(yaml), *words])


def test_the_adapter_that_a_run_goes_on_from_keeps_its_rank(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="--lora_r does nothing on a LoRA adapter, which keeps its own"):
        parse_run([str(yaml), "--model_name_or_path", str(tmp_path), "--use_peft", "true", "--lora_r", "8"])


def test_a_sweep_gives_each_mode_the_flags_that_do_something_in_it(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def start(command: list[str], check: bool) -> object:
        started.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", start)
    monkeypatch.setattr("m3po_lab.experiments.sweep.comparison", lambda folders: "compared")
    words = [str(yaml), "--seeds", "0", "--output_dir", str(tmp_path / "out"), "--cross_path_lambda", "0.3"]
    assert sweep.main([*words, "--modes", "none", "m3po"]) == 0
    assert ["--cross_path_lambda" in command for command in started] == [False, True]
    assert sweep.main([*words, "--modes", "none", "hrpo"]) == 2
    assert "--cross_path_lambda does nothing in any of the modes none, hrpo" in capsys.readouterr().err
    assert len(started) == 2


def test_hyper_connections_take_flags_only_where_they_are_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = str(PROJECT_ROOT / "configs" / "mhc_small.yaml")
    with pytest.raises(UserError, match="--mhc_alpha does nothing without --mhc_enabled true"):
        arguments.parse([small, "--mhc_alpha", "0.1"])
    arguments.parse([small, "--mhc_alpha", "0.1", "--mhc_enabled", "true"])
    started = []

    def start(command: list[str], check: bool) -> object:
        started.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", start)
    monkeypatch.setattr("m3po_lab.experiments.pair.write_report", lambda places, folder: "report")
    assert train_mhc([small, "--output_dir", str(tmp_path), "--mhc_alpha", "0.1"]) == 0
    assert ["--mhc_alpha" in command for command in started] == [False, True]


def test_flags_are_taken_out_with_their_values() -> None:
    words = [
        "--seed",
        "1",
        "--lora-r",
        "8",
        "--lora_target_modules",
        "a",
        "b",
        "--beta=0",
        "--lora_alpha=3",
        "--x",
        "-1",
    ]
    assert without(words, ["lora_r", "lora_target_modules", "lora_alpha"]) == ["--seed", "1", "--beta=0", "--x", "-1"]


def test_every_flag_of_a_switch_is_one() -> None:
    from trl import GRPOConfig, ModelConfig

    known = {*GRPOConfig.__dataclass_fields__, *ModelConfig.__dataclass_fields__}
    known |= set(arguments.PretrainArguments.__dataclass_fields__)
    assert {name for switch in SWITCHES for name in (*switch.flags.split(), *switch.set_by)} <= known
    own = {
        name for name in known if name.startswith(("lora_", "gating_", "cross_path_", "thinking_residual_r", "mhc_"))
    }
    assert own - {name for switch in SWITCHES for name in switch.flags.split()} == {"mhc_enabled"}
