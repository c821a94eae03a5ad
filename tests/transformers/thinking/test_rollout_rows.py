# SPDX-License-Identifier: Apache-2.0
"""`ThinkingRollout.write` with the distributions of some rows: an engine lets go of those that have ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.m3po import ThinkingSettings
from transformers.m3po.gating import create_gating_function
from transformers.m3po.generation.rollout import ThinkingRollout

VOCAB, HIDDEN, STEPS = 24, 6, 6
GROUPS = torch.tensor([7, 2, 7, 4, 2, 7, 7])  # sizes 4, 2 and 1
ENDS = torch.tensor([5, 1, 2, 3, 6, 1, 6])  # tokens of each row: at last a path is alone in its group

pytestmark = pytest.mark.usefixtures("one_thread")


def rolled_out(some: bool, mode: str, gating_type: str, **numbers: Any) -> ThinkingRollout:
    """A rollout whose rows end one after the other, which is handed all distributions or `some`: those of rows that go
    on, in another order.
    """
    torch.manual_seed(0)
    table = torch.nn.Embedding(VOCAB, HIDDEN)
    gate = create_gating_function(gating_type, {"vocab_size": VOCAB, "rank": 4} if gating_type == "luong" else {})
    settings = ThinkingSettings(mode=mode, gating_type=gating_type, cross_path_phase="all", **numbers)
    rollout = ThinkingRollout(settings, GROUPS, STEPS, VOCAB, table, None, gate)
    tokens = torch.zeros(len(GROUPS), 0, dtype=torch.long)
    for step in range(STEPS):
        probs = torch.randn(len(GROUPS), VOCAB).mul(3).softmax(-1)
        tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
        was = step < ENDS
        rows = was.nonzero().squeeze(1).flip(0)
        with torch.no_grad():
            if some:
                rollout.write(step, probs[rows], tokens, was, step + 1 < ENDS, rows)
            else:
                rollout.write(step, probs, tokens, was, step + 1 < ENDS)
    return rollout


@pytest.mark.parametrize("numbers", [{}, {"cross_path_top_k": 1, "cross_path_temp": "match"}], ids=["all", "match"])
@pytest.mark.parametrize("mode", ["m3po", "hrpo", "h3po"])
@pytest.mark.parametrize("gating_type", ["baseline", "kl_divergence", "luong"])
def test_rows_that_have_ended_need_no_distribution(mode: str, gating_type: str, numbers: dict[str, Any]) -> None:
    numbers = numbers | {"thought_top_k": 4, "cross_path_lambda": 0.4}
    whole, mine = (rolled_out(some, mode, gating_type, **numbers) for some in (False, True))
    going = torch.arange(STEPS) < ENDS.unsqueeze(1)
    assert torch.equal(mine.record.thinking_mask, going)
    assert mine.record.bag_weights[~going].count_nonzero() == 0
    for name in ("bag_ids", "bag_weights"):
        theirs = getattr(whole.record, name)[going]
        torch.testing.assert_close(getattr(mine.record, name)[going], theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine.peers, whole.peers, atol=1e-6, rtol=0)
    if mine.record.gating is not None:
        for name, values in vars(mine.record.gating).items():
            theirs = getattr(whole.record.gating, name)
            assert values.isfinite().all() and torch.equal(values[going], theirs[going])
    statistics, theirs = mine.end(STEPS), whole.end(STEPS)
    assert statistics.keys() == theirs.keys() and statistics
    for name, value in statistics.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-5, equal_nan=True)
