# SPDX-License-Identifier: Apache-2.0
"""What thinking does to the next token: KL(with || without), in nats, on a group of a rollout.

The model reads the same completions twice, as they were rolled out and without the blend, the thoughts or ASLR. The
input of a token acts on the prediction of the next, and so that is where the two are compared. A few times a run
(`blend_kl_steps`), without gradient and without a random number, so that the run is the same with it and without.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers.m3po.gating.module import GATING_MODULE
from transformers.m3po.settings import RESIDUAL_MODES, ThinkingSettings
from transformers.m3po.shared_prefix import share_prefix
from transformers.m3po.thinking.logits import apply_m3po_to_logits
from transformers.m3po.thinking.record import BAG_ARGUMENTS, RolloutRecord

Batch = dict[str, Any]
MEASUREMENTS = 8  # of a run, where `blend_kl_steps` is None
MOST_ELEMENTS = 1 << 27  # logits of a forward; of longer completions positions at even distances are looked at


def is_due(args: Any, state: Any) -> bool:
    """Whether the rollout of this step is measured; it follows from the step alone, so that a resumed run agrees.

    Args:
        args: a `GRPOConfig`.
        state: the trainer's, which knows the step and their number.
    """
    every = args.blend_kl_steps
    if every is None:
        every = max(1, state.max_steps // MEASUREMENTS)
    steps_of_rollout = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    return every > 0 and state.global_step % every < max(1, steps_of_rollout)


def peers_differ(completion_ids: torch.Tensor, thinking_mask: torch.Tensor, num_paths: int) -> torch.Tensor:
    """Share of the thinking positions at which a thinking peer has another token: 0-dim float32, nan without any.

    Args:
        completion_ids: (B, C) long, the N = `num_paths` rows of a group side by side.
        thinking_mask: (B, C) bool.
        num_paths: N, a divisor of B.
    """
    tokens, thinks = (value.unflatten(0, (-1, num_paths)) for value in (completion_ids, thinking_mask))
    other = (tokens.unsqueeze(1) != tokens.unsqueeze(2)) & thinks.unsqueeze(1)  # (G, path, peer, C)
    return (other.any(2) & thinks).sum() / thinks.sum()


def divergence(log_probs: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, mean over the positions of `mask`: 0-dim float32, nan without any.

    Args:
        log_probs, others: (B, K, V) float32, log p and log q.
        mask: (B, K) bool.
    """
    return (log_probs.exp() * (log_probs - others)).sum(-1)[mask].mean()


@torch.no_grad()
def thinking_effects(
    trainer: Any, batch: Batch, record: RolloutRecord, settings: ThinkingSettings | None, *, shares_prefix: bool
) -> dict[str, torch.Tensor]:
    """The effects that the run's mode can have, of the first group of this process; 0-dim float32 tensors in nats.

    Args:
        trainer: the `GRPOTrainer`.
        batch: a rollout; prompt_ids, prompt_mask, completion_ids and completion_mask, B rows each.
        record: of the rows, C positions, as the scoring passes take it.
        settings: of the mode, None in mode `none`.
        shares_prefix: whether the rows of a prompt lie side by side and it may be read once.

    Returns:
        blend_kl (mode m3po) or thought_kl (hrpo, h3po), mean over the thinking positions; aslr_kl where ASLR ran,
        mean over the positions of the completions.
    """
    rows = min(trainer.num_generations, len(batch["completion_ids"]))
    record = record.rows(slice(rows)).without_gradient()
    prompt_ids, prompt_mask, ids, mask = (
        batch[name][:rows] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    )
    length = ids.shape[1]
    model = trainer.model
    vocab_size = trainer.accelerator.unwrap_model(model).config.get_text_config().vocab_size
    number = min(length, max(1, MOST_ELEMENTS // (rows * vocab_size)))
    positions = torch.linspace(0, length - 1, number, device=ids.device).round().long()
    input_ids, attention_mask = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
    if shares_prefix and rows == trainer.num_generations:
        inputs = share_prefix(input_ids, attention_mask, length, rows)
        states = positions + 1
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        states = positions + prompt_ids.shape[1]
    thinking = record.forward_kwargs(0.0, settings is not None and settings.has_thoughts)

    def read(arguments: Batch) -> torch.Tensor:  # (rows, number, V) float32 log-probs
        with trainer.accelerator.autocast():
            logits = model(**inputs, **arguments, logits_to_keep=states, use_cache=False).logits
        return (logits.float() / trainer.temperature).log_softmax(-1)

    was_training = model.training
    model.eval()  # no dropout, and no random numbers for it
    try:
        log_probs = read(thinking)
        effects = {}
        if settings is not None and record.thinking_mask is not None:
            name = "thought_kl" if settings.mode in RESIDUAL_MODES else "blend_kl"
            thinks = (record.thinking_mask & mask.bool())[:, positions]
            if settings.learns and trainer.args.gating_training == "logits":
                blended = _blend(trainer, log_probs, record.thinking_mask[:, positions], settings)
                effects[name] = divergence(blended, log_probs, thinks)
            elif record.has_bags:
                plain = {name: value for name, value in thinking.items() if name not in BAG_ARGUMENTS}
                effects[name] = divergence(log_probs, read(plain), thinks)
            else:
                effects[name] = torch.zeros((), device=ids.device)  # every input is its token's embedding
        if record.row_seeds is not None:
            without = read(thinking | {"is_m3po_inference": True})
            effects["aslr_kl"] = divergence(log_probs, without, mask.bool()[:, positions])
    finally:
        model.train(was_training)
    return effects


def _blend(
    trainer: Any, log_probs: torch.Tensor, thinking_mask: torch.Tensor, settings: ThinkingSettings
) -> torch.Tensor:
    """The distributions of a group after they are blended with each other (`gating_training: logits`)."""
    base: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    base = base.base_model
    gating_function = partial(getattr(base, GATING_MODULE), embed_tokens=base.embed_tokens)
    group = torch.zeros(len(log_probs), dtype=torch.long, device=log_probs.device)
    blend = thinking_mask, gating_function, settings.cross_path_lambda, settings.temperature
    return apply_m3po_to_logits(log_probs, group, *blend)
