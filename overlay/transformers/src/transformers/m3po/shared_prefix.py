# SPDX-License-Identifier: Apache-2.0
"""The prompt of a group is read once: one stream of tokens for a scoring pass, one prefill for a rollout.

The B = G N rows of a micro-batch are G prompts with N completions each, and the prompts often begin alike: a system
text, worked examples. As rows, each prompt is read N times and the common beginning B times. Here a pass reads a stream
of one row, each token once:

    [ K common tokens | rest of prompt 1 | ... | rest of prompt G | completion 1 of prompt 1 | ... ],
    S = K + G P + B C tokens.

Everything but attention works on single tokens, so that it does not notice. Attention is the one place that knows
(`attend_by_group`): what is common attends within itself, the rest of a prompt to that and to itself, a completion to
its prompt and to itself, with a call of the attention kernel on padded rows for each of the three. Pairs of completions
never meet, so the cost in pairs is K² + G P (K + P) + B C (K + P + C), less than that of the rows. Behind the last norm
the stream is taken apart into rows again (`split_rows`): what follows, ASLR, the head and the loss, sees B rows of
1 + C states, the first of them the prompt's last.

It is the same function as the rows (Prefix Grouper, arXiv 2506.05433, has it for plain tokens and one level); sums are
made in another order. It is one forward of the model, so that DDP, FSDP2, gradient checkpointing and torch.compile see
nothing new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .flags import SUPPORTED_MODEL_TYPES
from .shared_cache import SharedCache

ARGUMENT = "shared_prefix"  # of a forward
ATTENTION = "sdpa"  # the attention implementation that knows of it
LEAST_COMMON = 16  # tokens; what fewer save is less than the third call of the attention kernel costs


class SharedPrefix(NamedTuple):
    """How a stream of one row is made of G prompts, which begin alike, and of N completions of each.

    Attributes:
        common_length: K, may be 0.
        num_prompts: G.
        rest_length: P, columns of the rest of a prompt, its padding on the left included.
        num_paths: N.
        prompt_mask: (G, 1, P, K + P) bool, which tokens the rest of a prompt attends to; None where that is all in
            front of them, since K is 0 and no prompt is padded.
    """

    common_length: int
    num_prompts: int
    rest_length: int
    num_paths: int
    prompt_mask: torch.Tensor | None

    @property
    def prompt_tokens(self) -> int:
        """K + G P, where the completions begin."""
        return self.common_length + self.num_prompts * self.rest_length

    def completions(self, stream: torch.Tensor) -> torch.Tensor:
        """The rows (B, C, ...) of the completions in a stream (1, S, ...)."""
        return stream[0, self.prompt_tokens :].unflatten(0, (self.num_prompts * self.num_paths, -1))


def common_length(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """K, how many tokens all prompts begin with: 0 if fewer than `LEAST_COMMON`, and less than the shortest prompt.

    Args:
        input_ids, attention_mask: (G, P), padded on the left. One number is read back from the device.
    """
    if len(input_ids) == 1:
        return 0
    width = input_ids.shape[1]
    lengths = attention_mask.sum(-1, keepdim=True)
    column = torch.arange(width, device=input_ids.device)
    aligned = input_ids.gather(1, (column + width - lengths).clamp_max(width - 1))
    agree = (aligned == aligned[:1]).all(0) & (column < lengths.min() - 1)
    number = int(agree.long().cumprod(0).sum())
    return number if number >= LEAST_COMMON else 0


def _common_first(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, common: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, L), padded on the left, whose K = `common` first tokens stand in front of their padding, not behind."""
    if common == 0:
        return input_ids, attention_mask
    behind = attention_mask.cumsum(-1) > common
    first = input_ids[:1].masked_select((attention_mask[:1] != 0) & ~behind[:1]).expand(len(input_ids), -1)
    rest = (attention_mask * behind)[:, common:]
    return (
        torch.cat([first, input_ids[:, common:] * (rest != 0)], 1),
        torch.cat([torch.ones_like(first, dtype=attention_mask.dtype), rest], 1),
    )


def share_prefix(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, num_paths: int
) -> dict[str, Any]:
    """The inputs of a forward over a stream, from rows that lie side by side by groups.

    Args:
        input_ids: (B, L) long, prompts padded on the left and then C columns of completions padded on the right.
        attention_mask: (B, L), 1 for tokens.
        completion_length: C.
        num_paths: N, a divisor of B; the N rows of a group begin with the same prompt.

    Returns:
        input_ids (1, S) and position_ids (1, S) long, the latter those of the rollout (tokens are counted, padding is
        not); attention_mask (B, 1, C, L) bool, what a completion attends to; shared_prefix. No token attends to padding
        but padding to itself, so that no row of a mask is empty.

    Raises:
        ValueError: N does not divide B.
    """
    rows, length = input_ids.shape
    if rows % num_paths:
        raise ValueError(f"{rows} rows are not whole groups of {num_paths}.")
    prompt = length - completion_length
    common = common_length(input_ids[::num_paths, :prompt], attention_mask[::num_paths, :prompt])
    input_ids, attention_mask = _common_first(input_ids, attention_mask, common)
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    place = torch.arange(length, device=input_ids.device)
    earlier, itself = place[:, None] >= place, place[:, None] == place
    mask = (earlier & attention_mask.bool()[:, None, :]) | itself

    def stream(values: torch.Tensor) -> torch.Tensor:
        parts = values[0, :common], values[::num_paths, common:prompt], values[:, prompt:]
        return torch.cat([part.flatten() for part in parts]).unsqueeze(0)

    padded = common > 0 or not bool(attention_mask[::num_paths, :prompt].all())
    shared = SharedPrefix(
        common_length=common,
        num_prompts=rows // num_paths,
        rest_length=prompt - common,
        num_paths=num_paths,
        prompt_mask=mask[::num_paths, None, common:prompt, :prompt] if padded else None,
    )
    return {
        "input_ids": stream(input_ids),
        "position_ids": stream(position_ids),
        "attention_mask": mask[:, None, prompt:],
        ARGUMENT: shared,
    }


def attend_by_group(
    attention: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prefix: SharedPrefix | SharedCache,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hook of upstream's `sdpa_attention_forward`: the attention of a stream, and that of a rollout's decode step.

    Args:
        attention: that function, which works on rows.
        module: the attention module.
        query: (1, heads, S, d); key and value have as many heads or fewer, any floating dtype. In a decode step
            (B, heads, 1, d).
        attention_mask: (B, 1, C, L) bool, of `share_prefix`; in a decode step upstream's.
        shared_prefix: what the stream is made of; in a decode step the cache, which knows keys and values itself.
        kwargs: other arguments of `attention`.

    Returns:
        (1, S, heads, d) or (B, 1, heads, d), as upstream's, and None.
    """
    if isinstance(shared_prefix, SharedCache):
        layer = shared_prefix.layers[module.layer_idx]
        return layer.attend(query, attention_mask, kwargs["scaling"]), None
    common, prompts, paths = shared_prefix.common_length, shared_prefix.num_prompts, shared_prefix.num_paths
    sizes = [common, prompts * shared_prefix.rest_length, query.shape[2] - shared_prefix.prompt_tokens]

    def parts(states: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (1, heads, K, d), (G, heads, P, d), (B, heads, C, d)
        common_part, rests, completions = states.split(sizes, 2)
        return common_part, _as_rows(rests, prompts), _as_rows(completions, prompts * paths)

    first, of_prompts, of_completions = parts(query)
    (first_key, keys, new_keys), (first_value, values, new_values) = parts(key), parts(value)
    outputs = []
    if common:
        outputs.append(_attend(attention, module, first, first_key, first_value, None, **kwargs))
        keys = torch.cat([first_key.expand(prompts, -1, -1, -1), keys], dim=2)
        values = torch.cat([first_value.expand(prompts, -1, -1, -1), values], dim=2)
    outputs.append(_attend(attention, module, of_prompts, keys, values, shared_prefix.prompt_mask, **kwargs))
    keys, values = _with_prompts(keys, new_keys), _with_prompts(values, new_values)
    outputs.append(_attend(attention, module, of_completions, keys, values, attention_mask, **kwargs))
    return torch.cat([output.flatten(0, 1) for output in outputs]).unsqueeze(0), None


def _as_rows(states: torch.Tensor, number: int) -> torch.Tensor:
    """(1, heads, number * columns, d) as (number, heads, columns, d)."""
    return states.squeeze(0).unflatten(1, (number, -1)).transpose(0, 1)


def _with_prompts(prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """(G, heads, P, d) in front of (B, heads, C, d), each prompt in front of its N rows: (B, heads, P + C, d)."""
    rows = completions.unflatten(0, (len(prompts), -1))
    return torch.cat([prompts.unsqueeze(1).expand(-1, rows.shape[1], -1, -1, -1), rows], dim=3).flatten(0, 1)


def _attend(
    attention: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """`attention` of query (R, heads, q, d): (R, q, heads, d). Under a mask it copies a key for each of the heads that
    share it; torch's kernel for CPUs does not need that.
    """
    if attention_mask is None or query.device.type != "cpu":
        return attention(module, query, key, value, attention_mask, **kwargs)[0]
    given = {"attn_mask": attention_mask, "dropout_p": kwargs["dropout"], "scale": kwargs["scaling"]}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **given, enable_gqa=True).transpose(1, 2)


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
    if not isinstance(shared, SharedPrefix):
        return hidden_states, position_ids

    def rows(stream: torch.Tensor) -> torch.Tensor:
        first = shared.common_length + shared.rest_length - 1
        last = stream[0, first : shared.prompt_tokens : shared.rest_length]
        return torch.cat([last.repeat_interleave(shared.num_paths, 0).unsqueeze(1), shared.completions(stream)], 1)

    return rows(hidden_states), rows(position_ids)


def model_obstacle(config: Any) -> str | None:
    """Why the prompts of a model with this configuration cannot be read once; None where they can."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        return f"it is built into {', '.join(SUPPORTED_MODEL_TYPES)} models, and this is {config.model_type!r}"
    if config._attn_implementation != ATTENTION:
        return f"attn_implementation is {config._attn_implementation!r}, and it is built into {ATTENTION!r}"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "the model has layers with a sliding window"
    if (rope := (getattr(config, "rope_parameters", None) or {}).get("rope_type")) in ("dynamic", "longrope"):
        return f"rope_type {rope!r} makes positions depend on the longest row"
    return None


def attend_by_cache(model_kwargs: dict[str, Any]) -> None:
    """Hands a shared cache among `model_kwargs` to the attention of every forward of `_sample`, which must know it."""
    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, SharedCache):
        model_kwargs[ARGUMENT] = cache


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
def shared_prefill(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_paths: int, *, find_common: bool = True
) -> dict[str, Any]:
    """Arguments of `generate` with which it finds the prompts in a cache, where each token was read once.

    Args:
        model: as `generate` is called on it.
        input_ids: (B, L) long, padded on the left, the N rows of a prompt side by side.
        attention_mask: (B, L).
        num_paths: N.
        find_common: whether to look for what the prompts have in common. Processes that share a model must not: they
            have to make the same number of forwards.

    Returns:
        input_ids and attention_mask (B, L) with the common beginning in front of the padding, and past_key_values: a
        cache of B rows and L - 1 columns. `generate` reads the last token of each row itself. {} where nothing is read
        twice.
    """
    prompts, mask = input_ids[::num_paths], attention_mask[::num_paths]
    common = common_length(prompts, mask) if find_common else 0
    if input_ids.shape[1] == 1 or (num_paths == 1 and common == 0):
        return {}
    prompts, mask = _common_first(prompts, mask, common)
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)

    def read(rows: slice, columns: slice, cache: Any) -> Any:
        return model(
            input_ids=prompts[rows, columns],
            attention_mask=mask[rows, : columns.stop],
            position_ids=positions[rows, columns],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            is_m3po_inference=True,  # ASLR works behind the layers and leaves nothing in the cache
        ).past_key_values

    cache: Any = None
    last = input_ids.shape[1] - 1
    if common:
        cache = read(slice(1), slice(common), None)
        cache.batch_repeat_interleave(len(prompts))
    if common < last:
        cache = read(slice(None), slice(common, last), cache)
    if SharedCache.serves(cache):
        cache = SharedCache(cache, common, num_paths)
    else:
        cache.batch_repeat_interleave(num_paths)
    return {
        "input_ids": prompts.repeat_interleave(num_paths, 0),
        "attention_mask": mask.repeat_interleave(num_paths, 0),
        "past_key_values": cache,
    }
