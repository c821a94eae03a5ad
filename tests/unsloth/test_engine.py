# SPDX-License-Identifier: Apache-2.0
"""`--engine unsloth`: the same run as with TRL, from the same flags; Unsloth's own loader and trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from datasets import Dataset
from trl import get_peft_config

WORDS = (
    "use_cpu: true",
    "bf16: false",
    "dtype: float32",
    "use_peft: true",
    "lora_r: 4",
    "per_device_train_batch_size: 6",
    "num_generations: 3",
    "max_completion_length: 4",
    "gradient_checkpointing: false",
    "report_to: none",
    "save_strategy: 'no'",
    "max_steps: 1",
)
BY_UNSLOTH = {"dapo": "epsilon_high", "cispo": "epsilon_high", "dr_grpo": "scale_rewards"}


@pytest.fixture
def parsed(trainer_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`parsed(words)`: the run that they ask for, with Unsloth as the engine, on a CPU where it would be refused."""
    from m3po_lab.grpo import config
    from m3po_lab.grpo.engine import Engine

    monkeypatch.setattr(config, "check_flags", lambda engine, groups: None)
    (tmp_path / "run.yaml").write_text("\n".join(WORDS) + "\n")
    words = [str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]
    return lambda *more: config.parse_run([*words, *more], Engine("unsloth", "as asked"))


@pytest.mark.parametrize("loss_type", BY_UNSLOTH)
def test_the_arguments_are_those_of_trl(loss_type: str, parsed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from trl import GRPOConfig

    from m3po_lab.grpo.config import RunParser, trls_config

    assert GRPOConfig is not trls_config() and issubclass(GRPOConfig, trls_config())
    run = parsed("--loss_type", loss_type)
    assert type(run.training) is GRPOConfig
    told = capsys.readouterr().out
    assert f"--{BY_UNSLOTH[loss_type]} stays" in told
    words = ["--config", str(run.config_file), "--output_dir", str(run.folder), "--loss_type", loss_type]
    trls = RunParser(trls_config()).parse_args_and_config(words)[1]
    for entry in dataclasses.fields(trls):
        if entry.name != "reward_weights":
            assert getattr(run.training, entry.name) == getattr(trls, entry.name), entry.name


def test_the_loader_and_the_trainer_are_unsloths_and_the_adapter_is_pefts(
    parsed: Any, trainer_class: Any, tmp_path: Path
) -> None:
    from peft import get_peft_model

    from m3po_lab.grpo import session

    cases.model("llama", "none").save_pretrained(tmp_path / "model")
    words = cases.tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    words.pad_token = words.eos_token
    words.save_pretrained(tmp_path / "model")
    run = parsed("--model_name_or_path", str(tmp_path / "model"), "--mode", "h3po", "--aslr_enabled", "true")
    asked = dataclasses.asdict(run.training)
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "3+4="}], "reference": "7", "kind": "number"}] * 4
    )
    trainer = session.build_trainer(run, rows, session.TrainingClock("unsloth"))
    assert type(trainer) is trainer_class
    changed = {name for name, value in dataclasses.asdict(trainer.args).items() if value != asked[name]}
    assert all(name.startswith("aslr_") for name in changed), changed  # those are settled as with TRL
    base = trainer.model.get_base_model()
    assert "fast_forward" in type(base).forward.__name__ or "Fast" in type(base).forward.__qualname__
    net = cases.model("llama", "h3po-aslr")
    config: Any = get_peft_config(run.model)
    config.modules_to_save = cases.own_names(net)
    plain = {name for name, value in get_peft_model(net, config).named_parameters() if value.requires_grad}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == plain
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")
    own = [value for name, value in trainer.model.named_parameters() if "modules_to_save" in name]
    assert own and all(value.dtype == torch.float32 for value in own)
    assert trainer.processing_class.pad_token != trainer.processing_class.eos_token
    trainer.train()
    assert trainer.state.global_step == 1
