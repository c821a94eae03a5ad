# SPDX-License-Identifier: Apache-2.0
"""A base model as it is evaluated: alone, with a routing gate, or with a controller that sets one for each prompt."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.connections import set_mhc_gate

from m3po_lab.core.errors import UserError
from m3po_lab.evaluation.folder import weights_of
from m3po_lab.models.embedding import mean_state
from m3po_lab.models.loading import load_base_model
from m3po_lab.pretraining.routing_gates import gates_of

Controller = Callable[[np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Controlled:
    """A trained controller as an evaluation takes it.

    Args:
        gates: sets them.
        digest: tells it from another one.
        weights: the digest of the model that it was trained on.
        constants: gates that are the same for all prompts, by the name of their column.
    """

    gates: Controller
    digest: str
    weights: str
    constants: dict[str, float]

    def check(self, model: Any, place: str) -> None:
        """Refuse another model than that of the training.

        Raises:
            UserError: says so.
        """
        if not has_hyper_connections(model):
            raise UserError(f"--controller: {place} has no hyper-connections; leave it out.")
        if weights_of(place)["weights"] != self.weights:
            raise UserError(f"--controller was trained on another model than {place}: give that model.")


@dataclass(frozen=True)
class Variant:
    """A model as it is evaluated.

    Args:
        model: on its device.
        tokenizer: its.
        gate: its routing gate, None for 1 or a model without hyper-connections.
        controller: sets the gate of each prompt, `mhc_gate` of rows from the embeddings of their prompts (B, H).
    """

    model: Any
    tokenizer: Any
    gate: Any = None
    controller: Controller | None = None

    def gate_of(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """The argument of a forward on these prompts, if any."""
        if self.controller is not None:
            return {"mhc_gate": self.controller(mean_state(self.model, ids, mask))}
        return {} if self.gate is None else {"mhc_gate": self.gate}


class ShortContext(HFLM):
    """A model of a short context generates half of it at most; the prompt keeps its end, which the table says.

    Of a prompt, and of the context of a continuation, the variant's controller sees what the model reads.
    """

    def __init__(self, variant: Variant, **options: Any) -> None:
        super().__init__(pretrained=variant.model, tokenizer=variant.tokenizer, **options)
        self.variant = variant

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    def _model_generate(self, context: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        gate = self.variant.gate_of(context, options["attention_mask"])
        return super()._model_generate(context, *given, **options, **gate)

    def _loglikelihood_tokens(self, requests: Any, *given: Any, **options: Any) -> Any:
        """Those of a context share its gate, so that each context is a call of its own where one is set by prompt."""
        if self.variant.controller is None:
            return super()._loglikelihood_tokens(requests, *given, **options)
        contexts: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            contexts.setdefault(tuple(context[-self.max_length :]), []).append(place)
        found: list[Any] = [None] * len(requests)
        for context, places in tqdm(contexts.items(), desc="contexts"):
            ids = torch.tensor([context], device=self.device)
            with routed(self.variant.model, self.variant.gate_of(ids, torch.ones_like(ids))["mhc_gate"]):
                results = super()._loglikelihood_tokens([requests[place] for place in places], disable_tqdm=True)
            for place, result in zip(places, results, strict=True):
                found[place] = result
        return found


@contextmanager
def routed(model: Any, gate: Any) -> Iterator[None]:
    """A stored routing gate, taken away again; None stores none."""
    if gate is not None:
        set_mhc_gate(model, gate)
    try:
        yield
    finally:
        if gate is not None:
            set_mhc_gate(model, None)


def variants_of(options: argparse.Namespace, controller: Controlled | None) -> dict[str, Variant]:
    """The columns of the table: the model, under a controller too with its constant gates, and the baseline.

    Raises:
        UserError: a model cannot be loaded, or the gate or the controller does not fit it.
    """
    model, tokenizer = load_base_model(options.checkpoint)
    gate = None if options.gate is None else gates_of(model, options.gate, options.checkpoint)
    variants = {"model": Variant(model, tokenizer, gate)}
    if controller is not None:
        controller.check(model, options.checkpoint)
        variants["policy"] = Variant(model, tokenizer, controller=controller.gates)
        variants |= {name: Variant(model, tokenizer, value) for name, value in controller.constants.items()}
    if options.baseline:
        variants["baseline"] = Variant(*load_base_model(options.baseline))
    return variants
