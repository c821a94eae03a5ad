# SPDX-License-Identifier: Apache-2.0
"""Text for pretraining as rows of tokens: of an installed package, a reasoning-gym task, a `.jsonl` file, or the Hub.

Documents follow each other, each behind a beginning-of-sequence token, and are cut into rows of equal length. That
token is fed and never scored, as in nanochat's bits per byte.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m3po_lab.core.errors import UserError, short
from m3po_lab.core.hub import HUB_ERRORS
from m3po_lab.core.identity import named_content
from m3po_lab.core.user_files import read_json_lines, text_field
from m3po_lab.models.model_files import UNREADABLE, check_model_files, unreadable
from m3po_lab.problems.data import GYM_PREFIX
from m3po_lab.problems.plain_text import solved_problems

PYTHON = "python:"
TextConfig = dict[str, Any] | str | None  # options of a reasoning-gym task, or the configuration of a Hub dataset
BYTES = "bytes"
HELD_OUT = 20  # every twentieth document is for validation
LONGEST = 1 << 15  # characters of a file of a package; the longest are tables
UNSCORED = -100


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, behind the tokens for the beginning (0) and the end (1) of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|bos|>": 0, "<|eos|>": 1, **{char: index + 2 for index, char in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`bytes`, or a byte-level BPE tokenizer from a folder or the Hub.

    Raises:
        UserError: it cannot be loaded, or is of another kind, whose tokens are no known number of bytes.
    """
    if name == BYTES:
        return byte_tokenizer()
    check_model_files(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(f"--tokenizer {name} cannot be loaded", error) from error
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    special = set(tokenizer.all_special_tokens)
    words = (word for word in tokenizer.get_vocab() if word not in special and word not in tokenizer.get_added_vocab())
    if any(not set(word) <= alphabet for word in words):
        raise UserError(f"--tokenizer {name} is no byte-level BPE, so bits per byte are not known; take one, or bytes.")
    return tokenizer


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(V) long, the bytes that each token of a byte-level tokenizer stands for; 0 for special tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if index in special else len(word) for index, word in enumerate(words)])


def documents(dataset: str, config: TextConfig) -> Iterator[str]:
    """The documents of a dataset, in an order that is always the same; those of a reasoning-gym task have no end.

    Raises:
        UserError: the package is not installed, the file does not exist, or the Hub cannot be asked.
    """
    if dataset.startswith(PYTHON):
        name = dataset.removeprefix(PYTHON)
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"--dataset {dataset}: no package {name} is installed; give one of .venv, e.g. python:sympy."
            )
        files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
        random.Random(0).shuffle(files)  # those of a folder are alike
        for file in files:
            if text := file.read_text(encoding="utf-8", errors="replace")[:LONGEST]:
                yield text
    elif dataset.startswith(GYM_PREFIX):
        yield from solved_problems(dataset, config if isinstance(config, dict) else None, HELD_OUT)
    elif dataset.endswith(".jsonl"):
        if not Path(dataset).is_file():
            raise UserError(f"--dataset {dataset} does not exist; its lines are JSON objects with a key 'text'.")
        for number, row in read_json_lines(Path(dataset)):
            yield text_field(Path(dataset), number, row, "text")
    else:
        from datasets import load_dataset

        assert not isinstance(config, dict), config

        try:
            rows_of_hub = load_dataset(dataset, config, split="train", streaming=True)
        except HUB_ERRORS as error:
            raise UserError(f"--dataset {dataset} cannot be read from the Hub: {short(error)}") from error
        yield from (row["text"] for row in rows_of_hub)


def named_text(name: str) -> str:
    """The text of a pretraining with the digest of what it reads: of a local file, or of the files of a package."""
    if not name.startswith(PYTHON):
        return named_content(name)
    digest = hashlib.sha256()
    for text in documents(name, None):
        digest.update(text.encode() + b"\0")
    return f"{name} (sha256 {digest.hexdigest()[:16]})"


def rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[torch.Tensor]:
    """Rows (length) long of consecutive tokens; the last tokens, which do not fill one, are left out."""
    tokens: list[int] = []
    for text in texts:
        tokens.append(tokenizer.bos_token_id)
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(tokens) >= length:
            yield torch.tensor(tokens[:length])
            tokens = tokens[length:]


def example(row: torch.Tensor, bytes_of: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model gets: labels are the tokens themselves but for those of no byte."""
    return {"input_ids": row, "labels": torch.where(bytes_of[row] > 0, row, UNSCORED)}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows that lie in memory."""

    def __init__(self, stacked: list[torch.Tensor], bytes_of: torch.Tensor) -> None:
        self.rows, self._bytes_of = torch.stack(stacked), bytes_of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return example(self.rows[index], self._bytes_of)

    @property
    def scored_bytes(self) -> int:
        """The bytes that are predicted: those of each row's tokens but the first."""
        return int(self._bytes_of[self.rows[:, 1:]].sum())


class StreamedRows(IterableDataset[dict[str, torch.Tensor]]):
    """Rows of a dataset too large for memory, read as they are asked for."""

    def __init__(self, dataset: str, config: TextConfig, tokenizer: Any, length: int) -> None:
        self._given = (dataset, config, tokenizer, length)
        self._bytes_of = bytes_of_tokens(tokenizer)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        dataset, config, tokenizer, length = self._given
        texts = (text for index, text in enumerate(documents(dataset, config)) if index % HELD_OUT)
        for row in rows(texts, tokenizer, length):
            yield example(row, self._bytes_of)


def load_text(
    dataset: str,
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    validation_rows: int,
    training_rows: int,
) -> tuple[Rows | StreamedRows, Rows]:
    """Training and validation rows of `length` tokens; no document is in both. At most `training_rows` are read.

    Raises:
        UserError: see `documents`; or there are fewer validation rows than asked for.
    """
    bytes_of = bytes_of_tokens(tokenizer)
    generated = dataset.startswith(GYM_PREFIX)
    local = generated or dataset.startswith(PYTHON) or dataset.endswith(".jsonl")
    apart = (text for index, text in enumerate(documents(dataset, config)) if not index % HELD_OUT)
    held_out = list(islice(rows(apart, tokenizer, length), None if local and not generated else validation_rows))
    if len(held_out) < validation_rows:
        raise UserError(
            f"--validation_rows {validation_rows}: {dataset} has {len(held_out)} of {length} tokens; give at most that."
        )
    # Spread over all documents: the first few of a package may be nothing but tables.
    held_out = [held_out[index * len(held_out) // validation_rows] for index in range(validation_rows)]
    if local:
        texts = (text for index, text in enumerate(documents(dataset, config)) if index % HELD_OUT)
        training = list(islice(rows(texts, tokenizer, length), training_rows))
        if not training:
            raise UserError(f"--dataset {dataset} has no training row of {length} tokens; lower --max_seq_len.")
        return Rows(training, bytes_of), Rows(held_out, bytes_of)
    return StreamedRows(dataset, config, tokenizer, length), Rows(held_out, bytes_of)
