# SPDX-License-Identifier: Apache-2.0
"""Rollouts of tiny models with ASLR, and the same tokens scored in one teacher-forced pass."""

from __future__ import annotations

import torch
from reference.gated import narrow_tokenizer
from reference.latent import CLOSE
from reference.tiny import alive_before, left_padded, teacher_forced_logps
from transformers.m3po import M3POGenerationState

EOS = [2, 11, 20, 25]
GROUPS = [4, 4, 1, 4, 1, 9]
LENGTHS = [3, 6, 4, 5, 6, 2]
TEMPERATURE = 0.8
CROSS = {"enable_cross_path": True, "cross_path_lambda": 0.4, "cross_path_temp": 0.5}
MODES = {"none": {}, "m3po": CROSS, "hrpo": {}, "h3po": CROSS}
STATISTICS = {"router_weight_mean", "activation_rate_actual", "latent_diversity_before", "latent_diversity_after"}
LEFT_OUT = object()  # of an argument that a rollout has by default


def rollout(model, mode="none", seed=1, **overrides):
    """Six left-padded prompts of several lengths, groups of three, two and one in disorder; ASLR running."""
    arguments = {
        **left_padded(LENGTHS, first=3, last=28),
        "tokenizer": narrow_tokenizer(),
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "max_new_tokens": 8,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "is_m3po_inference": False,
        **MODES[mode],
    }
    if "m3po" not in overrides and "num_return_sequences" not in overrides and mode in ("m3po", "h3po"):
        overrides["m3po"] = M3POGenerationState(group_ids=torch.tensor(GROUPS))
    torch.manual_seed(seed)
    given = {name: value for name, value in (arguments | overrides).items() if value is not LEFT_OUT}
    return model.generate(**given)


def completions_of(output):
    return output.sequences[:, -output.rollout_logps.shape[1] :]


def scored(model, output, mask=None, temperature=TEMPERATURE, **inputs):
    """Log-probs of one teacher-forced pass with the seeds and the bags of a rollout; 0 after the end of a row."""
    mask = left_padded(LENGTHS)["attention_mask"] if mask is None else mask
    inputs = {"is_m3po_inference": False, "aslr_row_seeds": output.row_seeds, **inputs}
    if output.bag_ids is not None:
        inputs |= {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    logps = teacher_forced_logps(model, output.sequences, mask, temperature, **inputs)
    return torch.where(alive_before(completions_of(output), EOS), logps, 0.0)


def assert_agrees(model, output, tolerance=CLOSE, **given):
    torch.testing.assert_close(output.rollout_logps, scored(model, output, **given), atol=tolerance, rtol=tolerance)
