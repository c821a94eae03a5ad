# SPDX-License-Identifier: Apache-2.0
"""The prompt of a group is read once: one stream of tokens for a scoring pass, one prefill for a rollout.

The B = G N rows of a micro-batch are G prompts with N completions each. As rows, each prompt is read N times. Here a
pass reads a stream of one row: the G prompts, one behind the other, then the B completions,

    [ prompt 1 | ... | prompt G | completion 1 of prompt 1 | ... | completion N of prompt G ],  S = G P + B C tokens.

Everything but attention works on single tokens, so that it does not notice. Attention is the one place that knows
(`attend_by_group`): prompts attend within themselves, completions to their prompt and to themselves, with two calls of
the attention kernel on padded rows. Pairs of completions never meet, so the cost in pairs is G P² + B C (P + C), less
than that of the rows. Behind the last norm the stream is taken apart into rows again (`split_rows`): what follows,
ASLR, the head and the loss, sees B rows of 1 + C states, the first of them the prompt's last.

It is the same function as the rows (Liu et al., 2025, arXiv:2506.05433, have it for plain tokens); sums are made in
another order. One forward of the model, so that DDP, FSDP2, gradient checkpointing and torch.compile see nothing new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ARGUMENT = "shared_prefix"  # of a forward
ATTENTION = "sdpa"  # the attention implementation that knows of it


class SharedPrefix(NamedTuple):
    """How a stream of one row is made of G prompts and of N completions of each.

    Attributes:
        num_prompts: G.
        prompt_length: P, columns of a prompt, its padding on the left included.
        num_paths: N.
        prompt_mask: (G, 1, P, P) bool, which tokens of a prompt attend to which.
    """

    num_prompts: int
    prompt_length: int
    num_paths: int
    prompt_mask: torch.Tensor

    @property
    def prompt_tokens(self) -> int:
        """G P, where the completions begin."""
        return self.num_prompts * self.prompt_length

    def completions(self, stream: torch.Tensor) -> torch.Tensor:
        """The rows (B, C, ...) of the completions in a stream (1, S, ...)."""
        return stream[0, self.prompt_tokens :].unflatten(0, (self.num_prompts * self.num_paths, -1))


def share_prefix(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, num_paths: int
) -> dict[str, Any]:
    """The inputs of a forward over a stream, from rows that lie side by side by groups.

    Args:
        input_ids: (B, P + C) long, prompts padded on the left and completions on the right.
        attention_mask: (B, P + C), 1 for tokens.
        completion_length: C.
        num_paths: N, a divisor of B; the N rows of a group begin with the same P columns.

    Returns:
        input_ids (1, S) and position_ids (1, S) long, the latter those of the rollout (tokens are counted, padding is
        not); attention_mask (B, 1, C, P + C) bool, what a completion attends to; shared_prefix. A token that is
        padding attends to itself alone, and nothing to it.

    Raises:
        ValueError: N does not divide B.
    """
    rows, length = input_ids.shape
    if rows % num_paths:
        raise ValueError(f"{rows} rows are not whole groups of {num_paths}.")
    prompt_length = length - completion_length
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    place = torch.arange(length, device=input_ids.device)
    earlier, itself = place[:, None] >= place, place[:, None] == place
    mask = (earlier & attention_mask.bool()[:, None, :]) | itself
    of_prompts, of_completions = slice(None, prompt_length), slice(prompt_length, None)

    def stream(values: torch.Tensor) -> torch.Tensor:
        parts = values[::num_paths, of_prompts], values[:, of_completions]
        return torch.cat([part.flatten() for part in parts]).unsqueeze(0)

    return {
        "input_ids": stream(input_ids),
        "position_ids": stream(position_ids),
        "attention_mask": mask[:, None, of_completions],
        ARGUMENT: SharedPrefix(
            rows // num_paths, prompt_length, num_paths, mask[::num_paths, None, of_prompts, of_prompts]
        ),
    }


def attend_by_group(
    attention: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    shared_prefix: SharedPrefix,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hook of upstream's `sdpa_attention_forward`: the attention of a stream.

    Args:
        attention: that function, which works on rows.
        module: the attention module.
        query: (1, heads, S, d); key and value have as many heads or fewer, any floating dtype.
        attention_mask: (B, 1, C, P + C) bool, of `share_prefix`.
        shared_prefix: what the stream is made of.
        kwargs: other arguments of `attention`.

    Returns:
        (1, S, heads, d), as upstream's, and None.
    """
    prompts, paths, split = shared_prefix.num_prompts, shared_prefix.num_paths, shared_prefix.prompt_tokens

    def of_prompts(states: torch.Tensor) -> torch.Tensor:  # (G, heads, P, d)
        return states[0, :, :split].unflatten(1, (prompts, -1)).transpose(0, 1)

    def of_completions(states: torch.Tensor) -> torch.Tensor:  # (B, heads, C, d)
        return states[0, :, split:].unflatten(1, (prompts * paths, -1)).transpose(0, 1)

    def with_prompt(states: torch.Tensor) -> torch.Tensor:  # (B, heads, P + C, d)
        return torch.cat([of_prompts(states).repeat_interleave(paths, 0), of_completions(states)], dim=2)

    read, _ = attention(
        module, of_prompts(query), of_prompts(key), of_prompts(value), shared_prefix.prompt_mask, **kwargs
    )
    written, _ = attention(
        module, of_completions(query), with_prompt(key), with_prompt(value), attention_mask, **kwargs
    )
    return torch.cat([read.flatten(0, 1), written.flatten(0, 1)]).unsqueeze(0), None


def split_rows(
    hidden_states: torch.Tensor, position_ids: torch.Tensor, forward_kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hook behind the last norm: the rows of a stream, each with the last state of its prompt in front.

    Args:
        hidden_states: (1, S, H).
        position_ids: (1, S) long.
        forward_kwargs: the extra arguments of the forward.

    Returns:
        (B, 1 + C, H) and (B, 1 + C); the very tensors that came in where the pass is one of rows.
    """
    shared = forward_kwargs.get(ARGUMENT)
    if shared is None:
        return hidden_states, position_ids

    def rows(stream: torch.Tensor) -> torch.Tensor:
        last = stream[0, shared.prompt_length - 1 : shared.prompt_tokens : shared.prompt_length]
        return torch.cat([last.repeat_interleave(shared.num_paths, 0).unsqueeze(1), shared.completions(stream)], 1)

    return rows(hidden_states), rows(position_ids)


def check_attention(config: Any) -> None:
    """Refuses a stream for a model whose attention would read it as one text.

    Raises:
        ValueError: it names the attention implementation.
    """
    if config._attn_implementation != ATTENTION:
        raise ValueError(
            f"shared_prefix needs attn_implementation='{ATTENTION}'; this model has {config._attn_implementation!r}."
        )


@torch.no_grad()
def shared_prefill(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_paths: int) -> dict[str, Any]:
    """Arguments of `generate` with which it reads the prompts of groups from a cache: each prompt was read once.

    Args:
        model: as `generate` is called on it.
        input_ids: (B, P) long, padded on the left, the N rows of a prompt side by side.
        attention_mask: (B, P).
        num_paths: N.

    Returns:
        past_key_values: a cache of B rows and P - 1 columns; `generate` reads the last token of each row itself. {}
        where that is all there is.
    """
    if input_ids.shape[1] == 1:
        return {}
    mask = attention_mask[::num_paths, :-1]
    cache = model(
        input_ids=input_ids[::num_paths, :-1],
        attention_mask=mask,
        position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
        is_m3po_inference=True,  # ASLR works behind the layers and leaves nothing in the cache
    ).past_key_values
    cache.batch_repeat_interleave(num_paths)
    return {"past_key_values": cache}
