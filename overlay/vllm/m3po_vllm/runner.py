# SPDX-License-Identifier: Apache-2.0
"""What a model runner of vLLM (V1) does more: thinking inputs before a forward, the record behind the sampling."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from . import CONFIG
from .requests import Tag
from .rollouts import Member, Rollouts
from .sampler import GREEDY, Sampler


def thinking(runner: Any) -> Any:
    """A class of runners that think: a subclass of vLLM's for a CPU or for a GPU."""

    class ThinkingRunner(runner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sampler = Sampler(logprobs_mode=self.model_config.logprobs_mode)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            super().load_model(*args, **kwargs)
            tokenizer = AutoTokenizer.from_pretrained(self.model_config.tokenizer)
            numbers = self.vllm_config.additional_config[CONFIG]
            vocabulary = self.model_config.get_vocab_size()
            self.rollouts = Rollouts(self.get_model(), numbers, tokenizer, vocabulary, self.device)

        def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
            super()._on_request_state_removed(req_id, req_state)
            self.rollouts.leave(req_id)

        def _preprocess(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = super()._preprocess(scheduler_output, *args, **kwargs)
            requests = self.input_batch.req_ids
            if self.rollouts.thinks(requests):
                starts = self.query_start_loc.gpu[: len(requests)].long()
                self.rollouts.mix(requests, self.inputs_embeds.gpu, starts)
            return inputs

        def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
            requests = self.input_batch.req_ids
            self.rollouts.admit([one for one in map(self._newcomer, requests) if one is not None])
            self.sampler.keeps = self.rollouts.thinks(requests)
            output = super()._sample(logits, spec_decode_metadata)
            if self.sampler.keeps:
                tokens = output.sampled_token_ids[:, 0]
                self.rollouts.write(requests, tokens, self.sampler.probs, self.sampler.scores)
            return output

        def _newcomer(self, request: str) -> Member | None:
            state = self.requests[request]
            params = state.sampling_params
            tag = Tag.of(request, params)
            if tag is None or state.output_token_ids:
                return None
            room = self.max_model_len - state.num_prompt_tokens
            stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else params.all_stop_token_ids)}
            return Member(request, tag, min(params.max_tokens, room), frozenset(stops), params.temperature < GREEDY)

    return ThinkingRunner
