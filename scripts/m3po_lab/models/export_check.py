# SPDX-License-Identifier: Apache-2.0
"""Whether an exported model is the checkpoint it was made of: merging, and a comparison of logits on real prompts.

All is compared in float32. Merging adds the same numbers in another order, so the logits may differ by rounding alone;
that the weights are rounded to the dtype asked for is meant, so what was written is compared with the merged model
after the same rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.m3po.flags import has_aslr, has_residual_gate
from transformers.m3po.modules import ADDED_MODULES
from trl import ModelConfig

from m3po_lab.core.errors import UserError, short
from m3po_lab.models.loading import load_model

# Of the largest logit. Float32 rounding is some 1e-5 of it through 30 layers; an adapter that is merged wrongly or a
# pair that is tied again moves logits by far more.
BOUND = 1e-4
PROMPTS = {
    "What is 12 + 35 - 4?": "12 + 35 is 47, and 47 - 4 is 43.\n#### 43",
    "A baker sells 3 trays of 24 rolls and keeps 5 of them. How many rolls does she sell?": "3 * 24 - 5 = 67\n#### 67",
    "Solve for x: 2x - 7 = 15.": "2x = 22, so x = 11.\n#### 11",
    "Which is larger, 0.9 or 0.11? Why?": "0.90 is more than 0.11.\n#### 0.9",
}


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A model without adapter that computes what this one does (which is used up).

    Where head and embeddings are one matrix, what the adapter adds to one of the two would reach the other as well, so
    the head gets a matrix of its own first. The two are tied again if they end up equal.

    Raises:
        UserError: the adapter has weights that are no numbers.
    """
    if not isinstance(model, PeftModel):
        return model
    base: Any = model.get_base_model()
    tied = base.config.tie_word_embeddings
    for module in base.get_output_embeddings().modules() if tied else ():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(weight.detach().clone()))
    try:
        plain: Any = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {short(error)}") from error
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    plain.config.tie_word_embeddings = tied and torch.equal(head.weight, embeddings.weight)
    if plain.config.tie_word_embeddings:
        plain.tie_weights()
    return plain


@dataclass
class Comparison:
    """What a checkpoint computes on a few prompts, to be computed again by what is made of it.

    Args:
        prompts: the token ids (1, L) of each.
        aslr: whether ASLR is exported too; without it the checkpoint is compared with its loop off.
        logits: (tokens, V) float32, of the checkpoint.
    """

    prompts: list[torch.Tensor]
    aslr: bool
    logits: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, aslr: bool) -> Comparison:
        """The comparison with a checkpoint's model, in float32."""
        prompts = encoded(tokenizer)
        return cls(prompts, aslr, logits_of(model, prompts, aslr))

    def check_merged(self, plain: PreTrainedModel) -> None:
        """Refuse a merged model, in float32, that computes something else.

        Raises:
            UserError: with the largest difference of a logit.
        """
        self._check(logits_of(plain, self.prompts, self.aslr), self.logits, "the merged model")

    def check_written(self, plain: PreTrainedModel, folder: Path) -> str:
        """Refuse what was written if it computes something else; says how far it is from the checkpoint.

        Args:
            plain: what was written, with its weights rounded; in float32 afterwards.
            folder: where it was written.

        Raises:
            UserError: with the largest difference of a logit, or the first weight or prompt that differs.
        """
        again, tokenizer = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))
        plain.float()
        prompts = encoded(tokenizer)
        if not all(map(torch.equal, prompts, self.prompts)):
            raise UserError("not exported: the tokenizer that was written splits a prompt otherwise.")
        weights, read = plain.state_dict(), again.state_dict()
        for modules in ADDED_MODULES:  # one path does not use a learnable gating function: its logits say nothing of it
            for name in modules.among(weights):
                if name not in read or not torch.equal(weights[name], read[name]):
                    raise UserError(f"not exported: {name} of what was written is not the checkpoint's.")
        logits = logits_of(again, prompts, self.aslr)
        self._check(logits, logits_of(plain, prompts, self.aslr), "what was written")
        return (
            f"compared with the checkpoint on {len(prompts)} prompts, {len(logits)} tokens: the largest difference of "
            f"a logit is {difference(logits, self.logits):.2g}, of logits up to {self.logits.abs().max():.3g}"
        )

    def _check(self, logits: torch.Tensor, reference: torch.Tensor, what: str) -> None:
        distance, bound = difference(logits, reference), BOUND * float(self.logits.abs().max())
        if not distance <= bound:
            raise UserError(
                f"not exported: a logit of {what} differs by {distance:.3g} from the checkpoint's, and rounding "
                f"explains {bound:.1g}; evaluate the checkpoint as it is, or take another DTYPE if that is float16."
            )


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two logits; NaN where one is no number."""
    return float((logits - reference).abs().max())


def encoded(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The token ids (1, L) of each prompt with its answer, through the chat template."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in PROMPTS
    ]
    answered = [text + answer for text, answer in zip(texts, PROMPTS.values(), strict=True)]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in answered]


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor], aslr: bool) -> torch.Tensor:
    """The logits (tokens, V) of a model on the prompts; a residual gate mixes in a thought at every position."""
    model.eval()
    logits = []
    for ids in prompts:
        inputs: dict[str, Any] = {}
        if has_aslr(model):
            inputs |= {"is_m3po_inference": not aslr, "aslr_row_seeds": torch.zeros(1, dtype=torch.long)}
        if has_residual_gate(model):  # the thought of a position: the token before it
            inputs |= {
                "thinking_bag_ids": ids.roll(1).unsqueeze(-1).int(),
                "thinking_bag_weights": torch.ones(*ids.shape, 1),
            }
        logits.append(model(input_ids=ids, **inputs).logits[0].float())
    return torch.cat(logits)
