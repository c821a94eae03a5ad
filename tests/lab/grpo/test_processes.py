# SPDX-License-Identifier: Apache-2.0
"""Several processes: the configs of accelerate, a run of two processes from start to report, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from m3po_lab import launch
from m3po_lab.core import processes
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json
from m3po_lab.grpo.checkpoints import checkpoints, missing_part
from m3po_lab.train import main

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs" / "accelerate").rglob("*.yaml"))
CPU2 = "configs/accelerate/cpu2.yaml"


def test_the_configs_of_accelerate_are_found() -> None:
    """A search that finds too few would let the next test pass on nothing."""
    assert [path.stem for path in CONFIGS] == ["cpu2", "ddp", "fsdp2", "zero3"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_a_config_and_torchrun_would_start_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ClusterConfig` refuses keys that it does not know; keys of an engine are flags of `accelerate launch`."""
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    monkeypatch.setenv(processes.VARIABLE, str(file))
    assert processes.launch_config() == (file, config)
    arguments = vars(processes.launch_arguments(file, ["configs/demo.yaml", "--seed", "1"]))
    assert arguments["training_script_args"] == ["configs/demo.yaml", "--seed", "1"]
    assert {*config.fsdp_config, *config.deepspeed_config} <= set(arguments)


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], env={**env, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of an uninterrupted run of two processes in mode m3po, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    done = start(["m3po_lab.launch", *words_of(tiny_config, folder)], **{processes.VARIABLE: CPU2})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def words_of(config: Path, folder: Path) -> list[str]:
    return [str(config), "--mode", "m3po", "--per_device_eval_batch_size", "2", "--output_dir", str(folder)]


def test_two_processes_write_one_report(whole: tuple[Path, str], finished_run: Path) -> None:
    folder, printed = whole
    summary = read_json(folder / "summary.json") or {}
    assert (summary["distribution"], summary["num_processes"], summary["steps"]) == ("multi_cpu", 2, 6)
    assert summary["command"].startswith(f"ACCELERATE_CONFIG={CPU2} bash scripts/train_grpo.sh ")
    assert summary["rollout_logp_diff_max"] < 1e-4
    assert [printed.count(text) for text in ("mode m3po (", "accuracy, form right", "train more")] == [1, 1, 1]
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [missing_part(path) for path in checkpoints(folder)] == [None] * 3
    for part in [*checkpoints(folder), folder / "final"]:
        assert read_json(part / "evaluation.json") and (read_json(part / "m3po.json") or {})["mode"] == "m3po"
    assert not list(folder.rglob("*.tmp"))


def test_two_processes_share_the_evaluation_and_answer_as_one_does(whole: tuple[Path, str], finished_run: Path) -> None:
    """Three batches of two: the second process has none of its own in the second round."""
    shared, alone = (read_json(folder / "baseline.json") or {} for folder in (whole[0], finished_run))
    assert len(shared["answered"]) == 6 and shared["answered"] == alone["answered"]


def test_two_processes_go_on_as_if_never_stopped(whole: tuple[Path, str], tiny_config: Path, tmp_path: Path) -> None:
    """Both parts in one start of the processes, which takes most of the time."""
    folder = tmp_path / "parts"
    words = words_of(tiny_config, folder)
    program = tmp_path / "parts.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom m3po_lab.train import main\n"
        f"code = main({[*words, '--max_steps', '2']})\n"
        f"Path({str(folder / 'checkpoint-4')!r}).mkdir(exist_ok=True)  # as a kill leaves it\n"
        f"sys.exit(code or main({[*words, '--resume_from_checkpoint', 'true']}))\n"
    )
    done = start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from the start into" in done.stdout and "from checkpoint-2 into" in done.stdout
    first, second = (load_file(path / "final" / "model.safetensors") for path in (whole[0], folder))
    assert [name for name in first if not first[name].equal(second[name])] == []


def test_one_process_where_the_config_asks_for_two_is_refused(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(processes.VARIABLE, CPU2)
    assert main(words_of(tiny_config, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: ACCELERATE_CONFIG={CPU2} asks for num_processes: 2, and there is 1; start the run")
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.check_joined(SimpleNamespace(world_size=2))
    with pytest.raises(UserError, match="2 processes were started and 1 take part in the run: --use_cpu false"):
        processes.check_joined(SimpleNamespace(world_size=1))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "does not exist. Give the path of a YAML file; the project has configs/accelerate/cpu2.yaml, "),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "has distributed_type: MULTI_CPU, of which"),
        ({"distributed_type": "MULTI_GPU"}, "does not say how many processes to start; set num_processes in it."),
        ({"distributed_type": "SEVERAL", "num_processes": 2}, "is not a config file of accelerate: 'SEVERAL'"),
        ({"mode": "m3po"}, "is not a config file of accelerate: A `distributed_type` must be specified"),
        (["a list"], "is not a config file of accelerate: "),
    ],
)
def test_a_config_that_cannot_be_started_is_one_line(
    content: object, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.yaml"
    if content is not None:
        file.write_text(yaml.safe_dump(content))
    monkeypatch.setenv(processes.VARIABLE, str(file))
    assert launch.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and text in said and said.count("\n") == 1, said


def engine(kind: str, **plugin: object) -> SimpleNamespace:
    """An accelerator as `check_engine` sees it."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin) if plugin else None)
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), state=state)


GOOD = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "StateDictType.FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fsdp_version": 1}, "fsdp_version: 1 is not supported; set 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: true .*set false"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: SHARDED_STATE_DICT .*set FULL_STATE_DICT"),
    ],
)
def test_fsdp_that_would_end_without_a_model_is_refused(changes: dict[str, object], text: str) -> None:
    processes.check_engine(engine("FSDP", **GOOD))
    with pytest.raises(UserError, match=text):
        processes.check_engine(engine("FSDP", **{**GOOD, **changes}))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_accelerate_leaves_out_on_cpus_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    processes.check_engine(engine(name))
    with pytest.raises(UserError, match=f"distributed_type: {name} needs GPUs"):
        processes.check_engine(engine("MULTI_CPU"))


def test_the_exit_code_of_the_first_process_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert [launch.say_end("process 1", code) for code in (2, 130)] == [2, 130]
    assert capsys.readouterr().err == ""
    assert [launch.say_end("process 1", code) for code in (1, -9)] == [1, 137]
    assert "process 1 was killed by signal 9" in capsys.readouterr().err
