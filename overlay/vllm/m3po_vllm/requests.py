# SPDX-License-Identifier: Apache-2.0
"""What a request says of its group, and which requests are refused before they start."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm import SamplingParams, envs
from vllm.v1.sample.logits_processor import LogitsProcessor

PATHS, GROUP, PATH, RECORD = "m3po_paths", "m3po_group", "m3po_path", "m3po_record"  # in SamplingParams.extra_args

# What would roll out another distribution than the policy pass scores: name -> the value that changes nothing.
PLAIN: dict[str, Any] = {
    "top_p": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
ABSENT = (
    *("logit_bias", "allowed_token_ids", "bad_words", "structured_outputs", "stop"),
    *("repetition_detection", "thinking_token_budget"),
)


class Tag(NamedTuple):
    """Where a request belongs.

    A request whose `SamplingParams.extra_args` have `m3po_paths` above 0 thinks, any other is plain. The `n` paths of
    one request are a group by themselves; requests that are sent one by one say `m3po_group` and `m3po_path` too. With
    `m3po_record` the record of the group is kept until it is taken (`Worker.take_m3po_records`).

    Attributes:
        group: any text, one for each group.
        path: from 0 to paths - 1.
        paths: N.
        recorded: whether the record of the group is kept.
    """

    group: str
    path: int
    paths: int
    recorded: bool = False

    @classmethod
    def of(cls, request_id: str, params: SamplingParams | None) -> Tag | None:
        """The tag of a request as the engine knows it; None of a plain one."""
        extra = (params.extra_args if params is not None else None) or {}
        if not extra.get(PATHS):
            return None
        paths, recorded = int(extra[PATHS]), bool(extra.get(RECORD))
        if GROUP in extra:
            return cls(str(extra[GROUP]), int(extra.get(PATH, 0)), paths, recorded)
        if paths == 1:
            return cls(request_id, 0, 1, recorded)
        path, _, parent = request_id.partition("_")  # as `ParentRequest` names the n paths of a request
        return cls(parent, int(path), paths, recorded)


class Admission(LogitsProcessor):
    """Touches no logit: vLLM asks it about each request, which is where one that cannot be served is refused."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        extra = sampling_params.extra_args or {}
        paths = extra.get(PATHS, 0)
        if not isinstance(paths, int) or paths < 0:
            raise ValueError(f"{PATHS}={paths!r} is no whole number from 0 on; set the number of paths of the group.")
        if paths == 0:
            return
        if GROUP not in extra and sampling_params.n != paths:
            raise ValueError(
                f"{PATHS}={paths} of a request with n={sampling_params.n}: set both to the number of paths, or say "
                f"{GROUP} and {PATH} in each request of the group."
            )
        if GROUP in extra and sampling_params.n != 1:
            raise ValueError(f"n={sampling_params.n} of a request that says its {GROUP}: send each path by itself.")
        path = extra.get(PATH, 0)
        if not isinstance(path, int) or not 0 <= path < paths:
            raise ValueError(f"{PATH}={path!r} is none of the {paths} paths of a group; give each its own, from 0 on.")
        for name, plain in PLAIN.items():
            if getattr(sampling_params, name) != plain:
                raise ValueError(f"{name} cannot be combined with thinking inputs: leave it at {plain}.")
        for name in ABSENT:
            # A stop text is seen behind the step that completes it: without peers nobody hears the tokens between.
            if getattr(sampling_params, name, None) not in (None, [], {}) and not (name == "stop" and paths == 1):
                raise ValueError(f"{name} cannot be combined with thinking inputs: leave it out.")
        if sampling_params.top_k > 0:
            raise ValueError("top_k cannot be combined with thinking inputs: leave it at 0.")

    # What vLLM asks of every logits processor.

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class EveryRequest(Admission):
    """The same for an engine all of whose requests think, each with its `n` paths as a group, unless it says another.

    `m3po_paths: 0` makes a request plain.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        extra = sampling_params.extra_args or {}
        if extra.get(RECORD) and not envs.VLLM_SERVER_DEV_MODE:
            raise ValueError(f"{RECORD} is for an engine in a program: nobody could take the record from a server.")
        if PATHS not in extra:
            sampling_params.extra_args = {**extra, PATHS: sampling_params.n}
        super().validate_params(sampling_params)
