# SPDX-License-Identifier: Apache-2.0
"""A scheduler that keeps the paths of a group in step: they take their k-th token in the same step of the engine.

They are admitted together, whole prompts at a time, and only where the cache holds every running request to its last
token, so that none is ever taken out again. From there on the scheduler of vLLM gives each a token a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler as UpstreamScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from .groups import Groups
from .requests import PATHS, Tag
from .sampler import GREEDY

logger = init_logger(__name__)


class GroupRefused(ValueError):
    """A group that could never be admitted; the text names the argument of the engine to change."""


def tag_of(request: Request) -> Tag | None:
    return Tag.of(request.request_id, request.sampling_params)


class Scheduler(UpstreamScheduler):
    """As vLLM's, first come, first served, and groups whole.

    Raises:
        ValueError: the engine is set up so that groups could not be kept together; it names the argument.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        parallel, scheduling = config.parallel_config, config.scheduler_config
        wrong = {
            "scheduling_policy": self.policy.value != "fcfs" and "fcfs",
            "pipeline_parallel_size": parallel.pipeline_parallel_size > 1 and "1",
            "tensor_parallel_size": parallel.tensor_parallel_size > 1 and "1",
            "data_parallel_size": parallel.data_parallel_index > 0 and "1",
            "long_prefill_token_threshold": scheduling.long_prefill_token_threshold > 0 and "0",
            "watermark": scheduling.watermark > 0 and "0",
            "enable_lora": config.lora_config is not None and "False, and merge the adapter",
            "speculative_config": config.speculative_config is not None and "None",
            "kv_transfer_config": self.connector is not None and "None",
        }
        for name, mend in wrong.items():
            if mend:
                raise ValueError(f"{name} cannot be combined with thinking inputs: set it to {mend}.")
        self.groups = Groups(self.requests)
        self.waiting = _WholeGroups(self)
        self._refused: list[Request] = []

    def add_request(self, request: Request) -> None:
        tag = tag_of(request)
        if tag is not None:
            assert request.sampling_params is not None
            why = self.groups.add(tag, request.request_id, request.sampling_params.temperature < GREEDY)
            if why is not None:
                return self._refuse(why, [request])
            group = self.groups[tag.group]
            never = self._why_never(request, tag)
            if never is not None:
                self.groups.refuse(group, never)
            if group.refused is not None:
                # Those that wait for it would wait for ever.
                peers = self.finish_requests(self.groups.alive(group), RequestStatus.FINISHED_ABORTED)
                return self._refuse(group.refused, [*peers, request])
            # Keys and values behind the prompt hang on thinking inputs, which the tokens do not tell: no other request
            # may read them. Those of the prompt are still shared within the group.
            request.cache_salt = f"m3po {tag.group}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _refuse(self, why: str, requests: list[Request]) -> None:
        """Ends requests with an error.

        Raises:
            GroupRefused: the engine is in the process of who asks; in another one it would end for all of its clients.
        """
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise GroupRefused(why)
        logger.error(why)
        self._refused += requests

    def _why_never(self, request: Request, tag: Tag) -> str | None:
        """Why a group would wait for ever, with the argument of the engine and what it has to be; None if it fits."""
        blocks = tag.paths * self.blocks_at_most([request]) + 1
        needed = {
            "max_num_seqs": (tag.paths, self.max_num_active_reqs, ""),
            "max_num_batched_tokens": (tag.paths * request.num_prompt_tokens, self.max_num_scheduled_tokens, ""),
            "blocks of the cache": (
                blocks,
                self.kv_cache_config.num_blocks,
                ": raise VLLM_CPU_KVCACHE_SPACE or gpu_memory_utilization, or lower max_tokens",
            ),
        }
        for name, (need, have, mend) in needed.items():
            if need > have:
                return (
                    f"{tag.paths} paths behind a prompt of {request.num_prompt_tokens} tokens need {need} {name}, and "
                    f"this engine has {have}{mend}."
                )
        return None

    def has_requests(self) -> bool:
        return super().has_requests() or bool(self._refused)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        for request in self._refused:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
        self._refused.clear()
        return outputs

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.waiting, _WholeGroups)
        self.groups.forget()
        self.waiting.open()
        return super().schedule(*args, **kwargs)

    def blocks_at_most(self, requests: Iterable[Request]) -> int:
        """Cache blocks that requests have when each has its last token, shared ones counted for each."""
        total = 0
        for request in requests:
            longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            total += -(-longest // self.block_size)
        return total


class _WholeGroups(FCFSRequestQueue):
    """The waiting requests, of which the scheduler sees those that are admitted in this step: each group whole."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._admitted = 0

    def pop_request(self) -> Request:
        self._admitted -= 1
        return super().pop_request()

    def __bool__(self) -> bool:
        return self._admitted > 0

    def open(self) -> None:
        """At the beginning of a step: puts the requests that are admitted in it before all others."""
        scheduler = self._scheduler
        self._admitted = 0
        if scheduler.pause_state != PauseState.UNPAUSED:
            return
        running = list(scheduler.running)
        seats = scheduler.max_num_active_reqs - len(running)
        tokens = scheduler.max_num_scheduled_tokens - sum(map(_tokens_to_come, running))
        blocks = scheduler.kv_cache_config.num_blocks - 1 - scheduler.blocks_at_most(running)
        admitted: list[Request] = []
        for unit in self._units():
            tag = tag_of(unit[0])
            if tag is not None and not scheduler.groups[tag.group].arrived:
                continue  # its other paths are on their way
            seats -= len(unit)
            tokens -= sum(map(_tokens_to_come, unit))
            blocks -= scheduler.blocks_at_most(unit)
            if min(seats, blocks) < 0 or (tokens < 0 and tag is not None):
                break
            admitted += unit
            if tag is not None:
                scheduler.groups[tag.group].begun = True
                if len(unit) < tag.paths:  # some were taken back while the group waited
                    for request in unit:
                        _say_paths(request, len(unit))
            if tokens < 0:
                break
        self.remove_requests(admitted)
        self.extendleft(reversed(admitted))
        self._admitted = len(admitted)

    def _units(self) -> list[list[Request]]:
        """What is admitted together, in the order of the first of each."""
        units: dict[str, list[Request]] = {}
        for request in self:
            tag = tag_of(request)
            units.setdefault(request.request_id if tag is None else f"group {tag.group}", []).append(request)
        return list(units.values())


def _tokens_to_come(request: Request) -> int:
    return max(1, request.num_tokens - request.num_computed_tokens)


def _say_paths(request: Request, paths: int) -> None:
    params = copy(request.sampling_params)
    assert params is not None
    params.extra_args = {**(params.extra_args or {}), PATHS: paths}
    request.sampling_params = params
