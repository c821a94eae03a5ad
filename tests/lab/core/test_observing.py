# SPDX-License-Identifier: Apache-2.0
"""Evaluating, saving and reporting leave a model as it was: weights, what shares storage, modes, configurations."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab.models.embedding_adapters import WAYS, far_from_start, logits, with_tying
from peft import LoraConfig, get_peft_model
from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.m3po.hyper_connections.report import full_report, mean_matrices
from trl import ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.core.observe import unchanged
from m3po_lab.evaluation import evaluate
from m3po_lab.evaluation.folder import FinishedParts
from m3po_lab.evaluation.settings import EvalSettings
from m3po_lab.models.loading import load_model
from m3po_lab.pretraining import run as pretrain_run
from m3po_lab.pretraining.data import byte_tokenizer
from m3po_lab.pretraining.evaluation import evaluate as evaluate_base_model
from m3po_lab.pretraining.routing_report import measure
from m3po_lab.pretraining.tasks import load_tasks, write_task
from m3po_lab.pretraining.variants import Variant

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lm_eval"
SETTINGS = EvalSettings(
    dataset="reasoning-gym:chain_sum",
    dataset_config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    num_eval_problems=3,
    eval_seed=5,
    system_prompt=None,
    prompt_template="What is {expression} ?",
    worked_example=None,
    chat_template_kwargs=None,
    answer_start="####",
    max_completion_length=3,
    batch_size=2,
    precision="no",
)


PUT_ON = ("tie_weights", "get_matrices", "_mhc_gate")  # what an observer may put on a module for a while


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that observing must leave alone: of the model, and the random generators."""
    shared = defaultdict(list)
    for name, value in model.named_parameters(remove_duplicate=False):
        shared[value.data_ptr()].append(name)
    weights = model.state_dict()
    config = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "weights": {
            name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in weights.items()
        },
        "tied": sorted(names for names in shared.values() if len(names) > 1),
        "trained": [name for name, value in model.named_parameters() if value.requires_grad],
        "gradients": {
            name: None if value.grad is None else (id(value.grad), value.grad.sum().item())
            for name, value in model.named_parameters()
        },
        "modes": {name: module.training for name, module in model.named_modules()},
        "put on": [(name, key) for name, module in model.named_modules() for key in vars(module) if key in PUT_ON],
        "config": config.config.to_dict() | {"architectures": None, "dtype": None},  # saving notes these two
        "generation": config.generation_config.to_dict(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def as_in_training(model: Any) -> None:
    """Every second module in evaluation mode, as a user may freeze some, and a gradient at all that is trained."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for value in model.parameters():
        value.grad = torch.full_like(value, 0.5) if value.requires_grad else None


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=["full", *WAYS])
def adapted(
    request: pytest.FixtureRequest, tied: bool, tiny_model: Path, tmp_path: Path
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model whose training is under way, and its tokenizer."""
    start = with_tying(tiny_model, tmp_path / "start", tied)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(start), dtype="float32"))
    if request.param != "full":
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **WAYS[request.param]))
    far_from_start(model)
    as_in_training(model)
    return model, tokenizer


def test_an_evaluation_leaves_the_model_as_it_was(
    adapted: tuple[Any, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval ties a model's weights: an adapter that trains one of a tied pair would be evaluated as another model."""
    model, tokenizer = adapted
    wanted, during, generate = logits(model), [], model.generate

    def generating(**given: Any) -> torch.Tensor:
        during.append(logits(model))
        return generate(**given)

    monkeypatch.setattr(model, "generate", generating)
    as_in_training(model)
    before = state_of(model)
    evaluate.answer_problems(model, tokenizer, SETTINGS, "test")
    assert state_of(model) == before
    assert during and all(torch.equal(found, wanted) for found in during)


def test_an_evaluation_that_is_refused_leaves_it_as_it_was_too(tiny_model: Path) -> None:
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(tiny_model), dtype="float32"))
    as_in_training(model)
    before = state_of(model)
    too_long = EvalSettings(**{**vars(SETTINGS), "max_completion_length": 128})
    with pytest.raises(UserError, match="the model reads 128"):
        evaluate.answer_problems(model, tokenizer, too_long, "test")
    assert state_of(model) == before


INPUTS = {"input_ids": torch.arange(40).reshape(2, 20)}


@pytest.fixture
def pretraining(tmp_path: Path) -> Trainer:
    """Of a NanoChat whose hyper-connections are away from their start; looks at them after each evaluation."""
    config = NanoChatConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        mhc_enabled=True,
        mhc_gate_noise=0.5,
    )
    model, watch = NanoChatForCausalLM(config), pretrain_run.Watch(INPUTS)
    far_from_start(model)
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}] * 4
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    watch.trainer = pretrain_run.PretrainingTrainer(model, arguments, eval_dataset=rows, callbacks=[watch])
    as_in_training(model)
    return watch.trainer


def lm_eval(trainer: Trainer, folder: Path) -> None:
    tasks = load_tasks({"arc_easy": write_task("arc_easy", FIXTURES, folder)}, local=True)
    variant = Variant(trainer.model, byte_tokenizer())
    evaluate_base_model(variant, tasks, 2, FinishedParts(folder / "partial.jsonl", "test"))


OBSERVERS: dict[str, Callable[[Trainer, Path], Any]] = {
    "evaluation of a pretraining": lambda trainer, folder: trainer.evaluate(),
    "saving": lambda trainer, folder: trainer.save_model(str(folder / "final")),
    "report": lambda trainer, folder: full_report(trainer.model, INPUTS),
    "matrices": lambda trainer, folder: mean_matrices(trainer.model, INPUTS),
    "report_mhc": lambda trainer, folder: measure(trainer.model, INPUTS),
    "eval_mhc": lm_eval,
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_looking_at_hyper_connections_leaves_the_model_as_it_was(
    observer: str, pretraining: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    before = state_of(pretraining.model)
    OBSERVERS[observer](pretraining, tmp_path)
    assert state_of(pretraining.model) == before


def test_an_interrupted_observation_leaves_the_model_as_it_was(pretraining: Trainer) -> None:
    model = pretraining.model
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), unchanged(model):
        model.eval()
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyboardInterrupt
    assert state_of(model) == before
