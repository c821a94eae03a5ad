# SPDX-License-Identifier: Apache-2.0
"""The tasks on which base models are evaluated: lm-eval's own, with the data of the Hub or of local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager

from m3po_lab.core.errors import UserError, short
from m3po_lab.core.hub import HUB_ERRORS
from m3po_lab.core.observe import unchanged_random_state
from m3po_lab.core.user_files import read_json_lines

FILES = {  # task -> split: file in --data; rows in the format of the dataset on the Hub
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "gsm8k_8shot": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "hellaswag": {"validation": "hellaswag_validation.jsonl"},
    "arc_easy": {"test": "arc_easy_test.jsonl"},
    "bits_per_byte": {"validation": "text.jsonl"},
}
COLUMNS = {  # file: what the task reads of its rows
    "gsm8k_train.jsonl": ("question", "answer"),
    "gsm8k_test.jsonl": ("question", "answer"),
    "hellaswag_validation.jsonl": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "arc_easy_test.jsonl": ("question", "choices", "answerKey"),
    "text.jsonl": ("page",),
}
SHIPPED = {  # task -> lm-eval's own file, and the number of examples
    "gsm8k": ("gsm8k/gsm8k.yaml", 0),
    "gsm8k_8shot": ("gsm8k/gsm8k.yaml", 8),
    "hellaswag": ("hellaswag/hellaswag.yaml", 0),
    "arc_easy": ("arc/arc_easy.yaml", 0),
    "bits_per_byte": ("wikitext/wikitext.yaml", 0),
}


def write_task(name: str, data: Path | None, folder: Path) -> str:
    """Writes the file of a task: the one that lm-eval ships, with its dataset replaced by local files if there are any.

    Returns:
        Its path, which lm-eval takes for a task.
    """
    shipped, shots = SHIPPED[name]
    task: dict[str, Any] = {"include": str(Path(lm_eval.__file__).parent / "tasks" / shipped), "task": name}
    task |= {"num_fewshot": shots, "tag": []}
    text = ""
    if data is not None:
        files = {split: str((data / file).resolve()) for split, file in FILES[name].items()}
        task |= {"dataset_path": None, "dataset_name": None, "dataset_kwargs": {"files": files}}
        task |= {f"{split}_split": None for split in ("training", "validation", "test")}
        task |= {"training_split" if split == "train" else f"{split}_split": split for split in files}
        text = "custom_dataset: !function m3po_lab.pretraining.tasks.local_rows\n"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task) + text, encoding="utf-8")
    return str(file)


def check_rows(file: Path, columns: Sequence[str]) -> None:
    """Refuse a file of which a row lacks what its task reads, before a model is loaded.

    Raises:
        UserError: the line and what it lacks are named.
    """
    for number, row in read_json_lines(file):
        missing = [name for name in columns if name not in row]
        if missing:
            raise UserError(f"{file}, line {number}: it lacks {missing[0]!r}; a row has {', '.join(columns)}.")


def local_rows(files: dict[str, str], **metadata: Any) -> dict[str, Any]:
    """The splits of a task from JSONL files, for lm-eval.

    Raises:
        UserError: a file is not one JSON object a line.
    """
    return {split: Dataset.from_list([row for _, row in read_json_lines(Path(file))]) for split, file in files.items()}


def load_tasks(files: dict[str, str], local: bool) -> dict[str, Any]:
    """lm-eval's tasks with their data, by name; `files` has the file of each, `local` says that the data are files too.

    Raises:
        UserError: the data of one cannot be read.
    """
    manager, loaded = TaskManager(include_defaults=False), {}
    for name, file in files.items():
        try:
            with unchanged_random_state():  # lm-eval draws a task's id from Python's
                loaded[name] = manager.load([file])["tasks"][name]
        except HUB_ERRORS as error:
            what = "the files in --data" if local else "the Hub"
            mend = "mend them" if local else "give --data, a folder with its files"
            raise UserError(f"task {name} cannot be read from {what} ({short(error, 160)}): {mend}.") from error
    return loaded
