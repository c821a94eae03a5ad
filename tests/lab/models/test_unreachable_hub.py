# SPDX-License-Identifier: Apache-2.0
"""Variables of a proxy that httpx cannot read are like a Hub that cannot be reached: a fall-back, or one line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from trl import ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.evaluation import datasets
from m3po_lab.models.loading import load_model
from m3po_lab.pretraining import tasks
from m3po_lab.pretraining.data import documents, load_tokenizer
from m3po_lab.problems.data_sources import GSM8K, hub_rows


@pytest.fixture(params=["ALL_PROXY=socks5://localhost:1", "HTTPS_PROXY=foo://x", "NO_PROXY=[::1"])
def unreadable_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name, _, value = request.param.partition("=")
    monkeypatch.setenv(name, value)
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    close_session()  # the client reads the variables when it is made
    yield
    close_session()


@pytest.mark.usefixtures("unreadable_proxy")
def test_an_evaluation_falls_back_to_generated_problems() -> None:
    names, why = datasets.choose([], 0)
    assert names == ["gsm_symbolic", "problems"] and "the Hub cannot be reached (" in why


READERS: dict[str, Callable[[Path], object]] = {
    "problems": lambda folder: hub_rows(GSM8K, "main", "train"),
    "a model": lambda folder: load_model(ModelConfig(model_name_or_path="owner/model")),
    "a tokenizer": lambda folder: load_tokenizer("owner/model"),
    "text": lambda folder: next(documents("owner/text", None)),
    "a task": lambda folder: tasks.load_tasks({"arc_easy": tasks.write_task("arc_easy", None, folder)}, local=False),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.usefixtures("unreadable_proxy")
def test_whatever_else_comes_from_the_hub_is_one_line(reader: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        READERS[reader](tmp_path)
    assert "\n" not in str(found.value)
