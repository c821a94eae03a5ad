# SPDX-License-Identifier: Apache-2.0
"""The state of a rollout: what `_sample` calls at each step, and what comes out of it.

`generate(..., m3po=state)` carries one `M3POGenerationState` in and out. `_sample` calls `begin_rollout` once, then at
each step `before_forward` and `after_sampling`, and `end` after the last one. Nothing is read back from the device
while decoding, and nothing grows: the record is allocated once for the longest completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..aslr.rollout import LatentRollout
from ..aslr.settings import ASLR_HYPERPARAMETERS
from ..flags import has_aslr, has_residual_gate
from ..gating.module import gating_of_model
from ..hyper_connections.routing_gate import pop_routing_gate
from ..settings import CROSS_PATH_MODES, DEFAULT_GATING_TYPE, ThinkingSettings
from ..shared_prefix import attend_by_cache
from ..thinking.inputs import mix_bags
from ..thinking.interaction import GatingFunction, Temperature, temperature_of
from ..thinking.record import RolloutRecord
from .checks import check_model
from .output import M3POGenerateOutput
from .rollout import ThinkingRollout
from .sampling import invert_cdf

if TYPE_CHECKING:
    from ...generation import GenerationConfig


class M3POGenerationState:
    """Carries a rollout's settings in and its record out.

    Args:
        group_ids: (B,) integers, the group of each row that is decoded; None when `num_return_sequences` makes the
            groups.
        settings: the hyperparameters of the mode; None takes them from the generation config. A state without settings,
            in a call that asks for no mode and on a model without a residual gate, only records `rollout_logps`.
        tokenizer: needed to find the answer marker, unless it is given to `generate`.
        gating_function: similarity (G, N, V) -> (G, N, N) in place of the one named by `gating_type`; a learnable
            gating function is given itself.
        thought_temperature: temperature of the soft thoughts where tokens are chosen greedily; sampled tokens and
            their thoughts share the sampling temperature. None takes the generation config's.
        row_seeds: (B,) integers, what ASLR's noise is made of in each row that is decoded; None draws them from torch's
            generator.
        aslr_overrides: numbers of ASLR for this rollout, flag: value; the others are the model configuration's.
        inverse_cdf: draw a token by inverting its distribution function, with one random number a row where
            torch.multinomial takes one for each token of the vocabulary: the same distribution, other draws.

    Attributes, after `generate`:
        rollout_logps: (B, T) float32, log-prob of each sampled token in the distribution it was sampled from; 0 after
            the end of a row.
        thinking_mask: (B, T) bool, or None without a mode.
        bag_ids, bag_weights: (B, T, K) int32 and float32, or None when every input is its token's embedding.
        row_seeds: (B,) long where ASLR ran, given or drawn; else None.
        statistics: 0-dim tensors by name, see `attention_statistics`, `residual_statistics` and `LatentRollout.end`.
    """

    def __init__(
        self,
        *,
        group_ids: torch.Tensor | None = None,
        settings: ThinkingSettings | None = None,
        tokenizer: Any = None,
        gating_function: GatingFunction | None = None,
        thought_temperature: float | None = None,
        row_seeds: torch.Tensor | None = None,
        aslr_overrides: dict[str, Any] | None = None,
        inverse_cdf: bool = False,
    ):
        if thought_temperature is not None and not thought_temperature > 0.0:
            raise ValueError(f"thought_temperature={thought_temperature} is not above 0; set the sampling temperature.")
        unknown = sorted(set(aslr_overrides or {}) - set(ASLR_HYPERPARAMETERS))
        if unknown:
            raise ValueError(f"aslr_overrides has {unknown[0]}; it takes {', '.join(ASLR_HYPERPARAMETERS)}.")
        self.group_ids = group_ids
        self.settings = settings
        self.tokenizer = tokenizer
        self.gating_function = gating_function
        self.thought_temperature = thought_temperature
        self._given_seeds = row_seeds
        self.aslr_overrides = aslr_overrides or {}
        self.inverse_cdf = inverse_cdf
        self.record = RolloutRecord(torch.empty(0, 0))
        self.statistics: dict[str, torch.Tensor] = {}
        self._rollout: ThinkingRollout | None = None
        self._latent: LatentRollout | None = None

    @property
    def rollout_logps(self) -> torch.Tensor:
        return self.record.logps

    @property
    def thinking_mask(self) -> torch.Tensor | None:
        return self.record.thinking_mask

    @property
    def bag_ids(self) -> torch.Tensor | None:
        return self.record.bag_ids

    @property
    def bag_weights(self) -> torch.Tensor | None:
        return self.record.bag_weights

    @property
    def row_seeds(self) -> torch.Tensor | None:
        return self.record.row_seeds

    @property
    def has_given_seeds(self) -> bool:
        """Whether the seeds of the rows were given."""
        return self._given_seeds is not None

    @property
    def record_bytes(self) -> int:
        """Bytes that the last rollout kept, its statistics included."""
        buffers = [part.buffers for part in (self._rollout, self._latent) if part is not None]
        return sum(tensor.nbytes for tensors in (self.record.tensors(), *buffers) for tensor in tensors)

    def begin(self, model: Any, input_ids: torch.Tensor, generation_config: GenerationConfig) -> None:
        """Allocates the record for `input_ids` (B, L) and checks what the rollout needs."""
        rows, self._prompt_length = input_ids.shape
        max_new_tokens = generation_config.max_length - self._prompt_length
        self._step = 0
        self._probs: torch.Tensor | None = None
        self._unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self._return_embeds = bool(generation_config.return_thinking_embeds)
        self._return_dict = bool(generation_config.return_dict_in_generate)
        self._embed_tokens = model.get_input_embeddings()
        self._base_model = model.base_model
        self.statistics = {}
        self._rollout = None
        self._latent = LatentRollout.of(
            model, input_ids, generation_config, max_new_tokens, self._given_seeds, self.aslr_overrides
        )
        # What the distribution of a greedy token lacks to be that of its thought.
        requested = (self.thought_temperature, generation_config.temperature, 1.0)
        greedy = next(float(value) for value in requested if value is not None)
        self._thought_temperature = 1.0 if generation_config.do_sample else greedy
        settings = self.settings or ThinkingSettings.from_generation_config(generation_config, model)
        if settings is not None:
            check_model(model, settings)
            temperature = self._temperature_of(settings)
            group_ids = self._groups_of(rows, generation_config.num_return_sequences or 1, settings)
            self._rollout = ThinkingRollout(
                settings,
                group_ids.to(input_ids.device),
                max_new_tokens,
                model.config.vocab_size,
                self._embed_tokens,
                self.tokenizer,
                self.gating_function or _own_gate(model, settings),
                temperature,
            )
        if self._rollout is None:
            self.record = RolloutRecord.zeros(rows, max_new_tokens, input_ids.device)
        else:
            self.record = self._rollout.record
        if self._latent is not None:
            self.record.row_seeds = self._latent.row_seeds

    def _temperature_of(self, settings: ThinkingSettings) -> Temperature | None:
        """T of a gating function that was given itself; None where the settings name the gate.

        Raises:
            ValueError: the settings name a gating function too, or another T than the one it was made with.
        """
        if self.gating_function is None:
            return None
        names = {
            "gating_type": settings.gating_type != DEFAULT_GATING_TYPE,
            "gating_config": bool(settings.gating_config),
        }
        for name in (name for name, is_given in names.items() if is_given):
            raise ValueError(f"{name} is not read beside gating_function, which is one already; leave one of them out.")
        return temperature_of("cross_path_temp", settings.cross_path_temp, self.gating_function)

    def _groups_of(self, rows: int, num_return_sequences: int, settings: ThinkingSettings) -> torch.Tensor:
        if self.group_ids is None:
            if num_return_sequences < 2 and settings.mode in CROSS_PATH_MODES:
                raise ValueError(
                    "enable_cross_path needs groups: set num_return_sequences to 2 or more, or pass "
                    "m3po=M3POGenerationState(group_ids=...) with the group of each row."
                )
            return torch.arange(rows) // num_return_sequences
        if len(self.group_ids) != rows:
            raise ValueError(f"group_ids has {len(self.group_ids)} entries for {rows} decoded rows; give one per row.")
        return self.group_ids

    def before_forward(self, model_inputs: dict[str, Any]) -> None:
        """Adds the bags of the completion tokens among `model_inputs["input_ids"]` (B, L), from the second pass on.

        With ASLR its trace goes to the token that is predicted now; the rest of what ASLR reads is the same in every
        pass, the prefill included, and comes from `begin_rollout`.
        """
        if self._rollout is not None:
            positions = slice(max(0, self._step - model_inputs["input_ids"].shape[1]), self._step)
            model_inputs.update(self._rollout.forward_kwargs(positions))
        if self._latent is not None:
            model_inputs["aslr_trace"] = self._latent.trace_of(self._step)

    @property
    def aslr_inputs(self) -> dict[str, Any]:
        """What every pass of the rollout gets for ASLR, the prefill included."""
        return {"is_m3po_inference": True} if self._latent is None else self._latent.forward_kwargs

    def multinomial(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        """In place of torch's in `_sample`: the tokens of a step, (B, 1) long, drawn from `probs` (B, V) float32."""
        self._probs = probs
        return invert_cdf(probs) if self.inverse_cdf else torch.multinomial(probs, num_samples)

    def after_sampling(
        self,
        input_ids: torch.Tensor,
        next_token_scores: torch.Tensor,
        unfinished_sequences: torch.Tensor,
    ) -> None:
        """Records the token just sampled and the thinking input that goes with it.

        Args:
            input_ids: (B, L + t) long, with the new token.
            next_token_scores: (B, V) float32, the processed logits it was chosen from.
            unfinished_sequences: (B,) long, 1 for the rows that go on after this token.
        """
        probs, self._probs = self._probs, None
        if probs is None:  # greedy decoding has none
            probs = next_token_scores.softmax(-1)
        chosen = probs.gather(-1, input_ids[:, -1:]).squeeze(-1).log()
        self.record.logps[:, self._step] = torch.where(self._unfinished, chosen, 0.0)
        was_unfinished, self._unfinished = self._unfinished, unfinished_sequences.bool()
        if self._rollout is not None:
            if self._thought_temperature != 1.0 and self._rollout.settings.has_thoughts:
                probs = (next_token_scores / self._thought_temperature).softmax(-1)
            completion_ids = input_ids[:, self._prompt_length :]
            self._rollout.write(self._step, probs, completion_ids, was_unfinished, self._unfinished)
        if self._latent is not None:
            self._latent.write(self._step, was_unfinished)
        self._step += 1

    def end(self, steps_to_undo: int) -> None:
        """Cuts the record to the steps that were taken and works out the statistics.

        Raises:
            ValueError: a token was chosen from a distribution that is not finite; its row is named.
        """
        steps = self._step - steps_to_undo
        if self._rollout is not None:
            self.statistics |= self._rollout.end(steps)
            self.record = self._rollout.record
        else:
            self.record = self.record.cut(steps)
        if self._latent is not None:
            self.statistics |= self._latent.end(steps)
        if not bool(self.record.logps.isfinite().all()):  # the one read of a rollout, behind its last step
            row, step = (~self.record.logps.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"the distribution of row {row} was not finite at completion token {step}: look for NaN in the model's "
                "logits."
            )

    @property
    def returns_output(self) -> bool:
        """Whether `generate` answers with `M3POGenerateOutput` rather than with what upstream returns."""
        records = self._rollout is not None or self._latent is not None
        return records and (self._return_dict or self._return_embeds)

    def output(
        self,
        sequences: torch.Tensor,
        model_kwargs: dict[str, Any],
        scores: tuple[torch.Tensor, ...] | None,
        logits: tuple[torch.Tensor, ...] | None,
        attentions: tuple[Any, ...] | None,
        hidden_states: tuple[Any, ...] | None,
    ) -> M3POGenerateOutput:
        """The output object of the rollout; sequences (B, L + T), the rest as `_sample` collected it."""
        thinking_embeds = None
        if self._return_embeds:
            completion = self._embed_tokens(sequences[:, self._prompt_length :])
            gate = self._base_model.thinking_residual if has_residual_gate(self._base_model) else None
            thinking_embeds = mix_bags(self._embed_tokens, completion, self.bag_ids, self.bag_weights, gate)
        return M3POGenerateOutput(
            sequences=sequences,
            thinking_embeds=thinking_embeds,
            thinking_mask=self.thinking_mask,
            embeds_ratio=None if self._rollout is None else self._rollout.embeds_ratio,
            bag_ids=self.bag_ids,
            bag_weights=self.bag_weights,
            rollout_logps=self.rollout_logps,
            row_seeds=self.row_seeds,
            statistics=self.statistics,
            scores=scores,
            logits=logits,
            attentions=attentions,
            hidden_states=hidden_states,
            past_key_values=model_kwargs.get("past_key_values") if self._return_dict else None,
        )


def _own_gate(model: Any, settings: ThinkingSettings) -> Any:
    """The learnable gating function that the settings name; None where they name one without parameters."""
    return gating_of_model(model, settings.gating_type, settings.gating_config) if settings.learns else None


def begin_rollout(
    model: Any,
    state: M3POGenerationState | None,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> M3POGenerationState | None:
    """Hook of `_sample`: the state of this rollout, or None when nothing is asked for (then nothing here runs)."""
    attend_by_cache(model_kwargs)
    if state is None:
        if not (generation_config.enable_cross_path or has_residual_gate(model) or has_aslr(model)):
            return None
        state = M3POGenerationState()
    # `generate` hands its tokenizer on to the decoding method, from where it would reach the model's forward.
    tokenizer = model_kwargs.pop("tokenizer", None)
    state.tokenizer = state.tokenizer if tokenizer is None else tokenizer
    state.begin(model, input_ids, generation_config)
    if has_aslr(model):
        model_kwargs.update(state.aslr_inputs)
    return state


def pop_state(generate_kwargs: dict[str, Any]) -> M3POGenerationState | None:
    """Hook of `generate`: takes `m3po=` and the `aslr_*` overrides out of its arguments; None if there is neither.

    A routing gate stays there, in the form that decoding needs (`pop_routing_gate`).

    Raises:
        ValueError: both are given.
    """
    pop_routing_gate(generate_kwargs)
    state = generate_kwargs.pop("m3po", None)
    requested = {name: generate_kwargs.pop(name) for name in ASLR_HYPERPARAMETERS if name in generate_kwargs}
    overrides = {name: value for name, value in requested.items() if value is not None}
    if not overrides:
        return state
    if state is not None:
        raise ValueError(
            f"{next(iter(overrides))} stands beside m3po=M3POGenerationState(...): give the state aslr_overrides="
            f"{overrides} instead."
        )
    return M3POGenerationState(aslr_overrides=overrides)
