# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama with a vocabulary of some thirty words, and one finished run of it.

The vocabulary is small so that random completions hold the answer marker and digits often enough for rewards to differ:
without that every advantage is zero, no weight ever moves and a resume test proves nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from m3po_lab.models.embedded import PLAIN_CHATML
from m3po_lab.train import main

WORDS = ["<unk>", "<|im_end|>", "<|im_start|>", "####", "What", "is", "+", "-", "?", "user", "assistant", *"0123456789"]
WORDS += ["abcdef"]  # Transformers' matcher of stop strings decodes every token behind this text

# Three generation cycles of two steps each: completions buffered over steps are part of what is tested.
TINY_RUN = {
    "dataset": "reasoning-gym:chain_sum",
    "dataset_config": "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "prompt_template": "What is {expression} ?",
    "num_train_problems": 20,
    "num_eval_problems": 6,
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 9,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "num_iterations": 2,
    "max_completion_length": 6,
    "learning_rate": 0.01,
    "temperature": 1.0,
    "seed": 3,
}


# The residual gate far from its start, and learning fast, so that what it does is seen in the weights.
H3PO = ("--mode", "h3po", "--beta", "0.05", "--thought_top_k", "8", "--thinking_residual_r_min", "0.5")


@pytest.fixture
def closed_files() -> Callable[[Path], list[str]]:
    """The files below a folder that have other permissions than the umask leaves to new files."""
    wanted = 0o666 & ~os.umask(os.umask(0o022))

    def find(folder: Path) -> list[str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return [str(path.relative_to(folder)) for path in files if path.stat().st_mode & 0o777 != wanted]

    return find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random 2-layer Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=128,
        chat_template=PLAIN_CHATML,
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML of a run of the tiny model, all on the CPU."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    shared = {
        "model_name_or_path": tiny_model,
        "lr_scheduler_type": "constant",
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "dataloader_pin_memory": "false",
        "logging_steps": 1,
        "report_to": "none",
    }
    lines = [
        f"{key}: {value!r}" if isinstance(value, str) and "{" in value else f"{key}: {value}"
        for key, value in {**shared, **TINY_RUN}.items()
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def finished_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run, checkpoints at steps 2, 4 and 6."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("run") / "uninterrupted"
    assert main([str(tiny_config), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def h3po_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in mode h3po, with a reference model: its residual gate has a start that a resumed run must find."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("run") / "h3po"
    assert main([str(tiny_config), *H3PO, "--output_dir", str(folder)]) == 0
    return folder
