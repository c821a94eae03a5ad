# SPDX-License-Identifier: Apache-2.0
"""Model files that are cut short, pointers of Git LFS or something else are one line, whichever command reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from m3po_lab.core.errors import UserError, failures_said
from m3po_lab.models import embedded
from m3po_lab.models import loading as models
from m3po_lab.models.model_files import check_model_files
from m3po_lab.pretraining.data import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
Change = Callable[[Path], object]


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def put(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def make_folder(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def number(name: str, **values: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(place: Path) -> None:
    models.load_model(ModelConfig(model_name_or_path=str(place)))


LOADERS = {
    "a training or eval_gsm8k": load,
    "eval_mhc and report_mhc": lambda place: models.load_base_model(str(place)),
    "a tokenizer": lambda place: load_tokenizer(str(place)),
}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_pointer_of_git_lfs_is_named_with_its_mend(loader: str, name: str, model: Path) -> None:
    put(name, POINTER)(model)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS and not the file itself: run .*git lfs pull"):
        LOADERS[loader](model)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            cut("model.safetensors"),
            "model.safetensors is cut short or no safetensors file .*: copy or download it again",
        ),
        (put("model.safetensors", ""), "model.safetensors is cut short"),
        (make_folder("model.safetensors"), "model.safetensors is a folder, where a file is wanted"),
        (cut("config.json"), "config.json is cut short or no JSON file .*: copy or download it again"),
        (put("config.json", "[]"), "config.json is not a JSON object"),
        (cut("tokenizer.json"), "tokenizer.json is cut short"),
        (put("tokenizer.json", "3"), "tokenizer.json is not a JSON object"),
        (put("tokenizer.json", "{}"), "cannot be loaded from this folder .*KeyError: 'added_tokens'"),
        (cut("generation_config.json"), "generation_config.json is cut short"),
        (put("model.safetensors.index.json", POINTER), "index.json is a pointer of Git LFS"),
        (put("chat_template.jinja", POINTER), "chat_template.jinja is a pointer of Git LFS"),
        (number("config.json", model_type="nope"), "model type `nope`"),
        (number("config.json", hidden_size="x"), "hidden_size"),
        (number("config.json", num_attention_heads=0), "cannot be loaded from this folder"),
        (number("config.json", dtype="x"), "cannot be loaded from this folder"),
        (number("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "optimum"),
    ],
)
def test_a_file_of_a_model_that_is_not_what_it_should_be_is_one_line(change: Change, why: str, model: Path) -> None:
    change(model)
    with pytest.raises(UserError, match=why) as found:
        load(model)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (cut("adapter_model.safetensors"), "adapter_model.safetensors is cut short"),
        (put("adapter_model.safetensors", POINTER), "adapter_model.safetensors is a pointer"),
        (cut("adapter_config.json"), "adapter_config.json is cut short"),
        (put("adapter_config.json", POINTER), "adapter_config.json is a pointer"),
        (number("adapter_config.json", peft_type="ZZ"), "KeyError: 'ZZ'"),
        (put("m3po.json", POINTER), "m3po.json is a pointer"),
    ],
)
def test_a_file_of_an_adapter_that_is_not_what_it_should_be_is_one_line(
    change: Change, why: str, adapter: Path
) -> None:
    change(adapter)
    with pytest.raises(UserError, match=why):
        load(adapter)


@pytest.mark.parametrize(
    ("length", "why"), [(0, "cannot mmap an empty file"), (5, "unpack"), (100000, "unpack"), (3000000, "reshape")]
)
def test_a_gguf_file_that_is_cut_short_is_one_line(length: int, why: str, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    with embedded.embedded_gguf().open("rb") as whole:
        file.write_bytes(whole.read(length))
    with pytest.raises(UserError, match=f"cut.gguf cannot be read as GGUF, copy or download it again: .*{why}"):
        load(file)
    file.write_text(POINTER)
    with pytest.raises(UserError, match="cut.gguf is a pointer of Git LFS"):
        load(file)


def test_whole_files_and_those_that_no_loader_reads_are_let_pass(model: Path, adapter: Path) -> None:
    put("training_log.json", "[1")(model)
    check_model_files(model)
    check_model_files(adapter)
    check_model_files(Path("owner/model"))


def test_a_full_memory_is_no_fault_of_the_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", full)
    with (
        pytest.raises(UserError, match="the memory is used up .*lower --batch_size"),
        failures_said(None, "--batch_size"),
    ):
        load(model)


def test_an_attention_without_its_package_is_one_line(model: Path) -> None:
    config = ModelConfig(model_name_or_path=str(model), attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="cannot be loaded from this folder .*FlashAttention2"):
        models.load_model(config)
