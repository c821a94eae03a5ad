# SPDX-License-Identifier: Apache-2.0
"""What the generation tests share: a tokenizer of 256 tokens full of `#`, a scripted sampler, a teacher-forced pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast

# Weights large enough that what a path hears from its peers moves its logits.
LIVELY = {"initializer_range": 0.25}


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte-level tokens (pad 0, bos 1, eos 2); about every sixth holds a `#`, so that random text meets `####`."""
    letters = [chr(c) for c in range(33, 127) if chr(c) != "#"]
    marks = ["#", "##", "###", "####", "Ġ####", "Ċ####", "Ġ#", "####Ġ"]
    marks += [f"{mark}{digit}" for mark in ("#", "##") for digit in "0123456789"]
    marks += [f"{digit}{mark}" for mark in ("#", "##") for digit in "0123456789"]
    words = [a + b for a in "abcdefghijklmnopq" for b in "aeiou"]
    tokens = ["<pad>", "<s>", "</s>", *letters, "Ġ", "Ċ", *marks, *words]
    tokens += [f"w{i}" for i in range(256 - len(tokens))]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def text_of(tokenizer: Any, ids: Any) -> str:
    """The text of some token ids, exactly as the tokens spell it."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Script(LogitsProcessor):
    """Forces the tokens (B, T) of a script, one column a step: what is sampled is known beforehand."""

    def __init__(self, tokens: list[list[int]]):
        self.tokens, self.step = torch.tensor(tokens), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced


def left_padded(lengths: list[int], seed: int = 3, first: int = 130, last: int = 256) -> dict[str, torch.Tensor]:
    """Random prompts (B, L) of the given lengths, padded on the left with 0, and their attention mask."""
    width = max(lengths)
    ids = torch.randint(first, last, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width).expand(len(lengths), -1) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def alive_after(completions: torch.Tensor, eos: list[int]) -> torch.Tensor:
    """(B, T) bool: the token was read again, as input; not an end token, and not the last of the rollout."""
    after = torch.isin(completions, torch.tensor(eos)).long().cumsum(1) == 0
    return torch.cat([after[:, :-1], torch.zeros_like(after[:, :1])], dim=1)


def alive_before(completions: torch.Tensor, eos: list[int]) -> torch.Tensor:
    """(B, T) bool: the row had not ended before this token, so the token was sampled."""
    after = alive_after(completions, eos)
    return torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)


def teacher_forced_logps(
    model: Any,
    sequences: torch.Tensor,
    prompt_mask: torch.Tensor,
    temperature: float = 1.0,
    **bags: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probs (B, T) of the completion tokens of `sequences` (B, L + T) in one forward with position ids."""
    prompt_length = prompt_mask.shape[1]
    mask = prompt_mask.repeat_interleave(len(sequences) // len(prompt_mask), dim=0)
    mask = torch.cat([mask, torch.ones_like(sequences[:, prompt_length:])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=positions, **bags).logits
    logps = (logits[:, prompt_length - 1 : -1].float() / temperature).log_softmax(-1)
    return logps.gather(-1, sequences[:, prompt_length:, None]).squeeze(-1)
