# SPDX-License-Identifier: Apache-2.0
"""The report: a gain that is only format is called that, and every file a run promises is there."""

import json
import re
from pathlib import Path

import pytest

from m3po_lab.evaluation.evaluate import Answered, Sampled, load_cached
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.figure import running_mean
from m3po_lab.grpo.report import (
    Evaluations,
    attention_means,
    completion_lines,
    diversity,
    effect_line,
    effects,
    last_reward,
    log_columns,
    split_gain,
    table,
    verdict,
)
from m3po_lab.problems.data_sources import Problem

RIGHT, WRONG, FORMLESS = (Answered("", True, True), Answered("", False, True), Answered("", False, False))
KEYS = {
    "mode": str,
    "engine": str,
    "engine_version": str,
    "engine_why": str,
    "distribution": str,
    "num_processes": int,
    "accuracy_before": float,
    "accuracy_after": float,
    "p_value": float,
    "num_eval_problems": int,
    "format_before": float,
    "format_after": float,
    "rollout_logp_diff_max": float,
    "train_seconds": float,
    "seconds_per_step": float,
    "reward_last": float,
    "attention": type(None),
    "gating_type": type(None),
    "diversity": dict,
    "flags": dict,
    "parts": list,
}


def changes(**counts: int) -> tuple[list[Answered], list[Answered]]:
    kinds = {"r": RIGHT, "w": WRONG, "f": FORMLESS}
    pairs = [(kinds[name[0]], kinds[name[1]]) for name, count in counts.items() for _ in range(count)]
    return [early for early, _ in pairs], [late for _, late in pairs]


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"ww": 100, "wr": 30, "rw": 5}, "significantly higher .*so it is where the form was right both times"),
        ({"ff": 50, "fr": 30, "ww": 20, "rr": 20}, "this gain is only format"),
        ({"ww": 100, "wr": 6, "rw": 5}, "No significant change"),
        ({"ww": 100, "rw": 30}, "significantly LOWER"),
    ],
)
def test_verdict_says_what_moved(counts: dict[str, int], text: str) -> None:
    parts = split_gain(*changes(**counts))
    assert re.search(text, verdict(parts))


def test_arithmetic_is_measured_where_the_form_was_right_both_times() -> None:
    parts = split_gain(*changes(ff=5, fr=3, wr=2, rr=1, rf=4))
    assert (parts["arithmetic"].n, parts["arithmetic"].gained, parts["arithmetic"].lost) == (3, 2, 0)
    assert parts["format"].lost == 4
    assert len(table(parts).splitlines()) == 4


def test_running_mean_is_that_of_the_neighbours() -> None:
    assert running_mean([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]


def test_attention_is_the_mean_over_the_steps_that_logged_it() -> None:
    """Steps on completions of an earlier step log none, and the last line of a training is no step."""
    history = [
        {"reward": 0.25, "m3po/attention_entropy": 1.0, "m3po/similarity_min": 0.5, "m3po/active_paths": 8.0},
        {"loss": 0.1, "eval_reward": 0.1},
        {"reward": 0.75, "m3po/attention_entropy": 2.0},
        {"train_loss": 0.2},
    ]
    assert attention_means(history) == {"attention_entropy": 1.5, "similarity_min": 0.5}
    assert last_reward(history) == 0.75
    assert attention_means(history[1:2]) is None and last_reward(history[1:2]) is None


def test_diversity_is_that_of_the_first_and_of_the_last_quarter_of_the_lines_that_have_it() -> None:
    rows = [{"m3po/distinct_answers": float(step), "reward_std": 0.5} for step in range(9)]
    history = [row for pair in zip(rows, [{"loss": 0.1}] * 9, strict=True) for row in pair]
    history += [{"reward_std": 1.5}] * 4
    found = {"distinct_answers_first": 0.5, "distinct_answers_last": 7.5}
    assert diversity(history) == {**found, "reward_std_first": 0.5, "reward_std_last": 1.5}
    assert diversity(history[:2]) == {
        **{"distinct_answers_first": 0.0, "distinct_answers_last": 0.0},
        **{"reward_std_first": 0.5, "reward_std_last": 0.5},
    }
    assert diversity([{"loss": 0.1}]) == {}


def test_what_thinking_did_is_the_mean_of_what_was_measured_and_said_where_it_is_next_to_nothing() -> None:
    history = [{"reward": 0.5, "m3po/blend_kl": 0.25, "m3po/peer_differs": 0.5}, {"m3po/peer_differs": 0.25}]
    assert effects(history) == {"blend_kl": 0.25, "peer_differs": 0.375} and effects([{"reward": 0.5}]) is None
    assert effect_line({"blend_kl": 0.25, "peer_differs": 0.375}) == (
        "the blend moved the next token by 0.25 nats; at 38% of the thinking positions a peer had another token "
        "(means over the run)"
    )
    weak = effect_line({"thought_kl": 0.5, "aslr_kl": 0.0009})
    assert "the thoughts moved the next token by 0.5 nats;" in weak
    assert "ASLR moved the next token by 0.0009 nats, next to nothing: whatever the run shows, ASLR did not" in weak


def test_the_log_is_kept_by_columns() -> None:
    history = [
        {"step": 1, "reward": 0.5, "rewards/correct_reward/mean": 0.25, "m3po/blend_kl": 0.1},
        {"step": 1, "eval_loss": 0.1},
        {"step": 2, "reward": 0.75, "rewards/correct_reward/mean": 0.5},
    ]
    assert log_columns(history) == {
        "step": [1, 2],
        "reward": [0.5, 0.75],
        "accuracy": [0.25, 0.5],
        "blend_kl": [0.1, None],
    }


def test_samples_are_reported_by_their_means() -> None:
    one, two = Sampled(0.5, 1.0, 0.0, 3, ["a", "b"]), Sampled(0.0, 0.0, 1.0, 1, ["c", "d"])
    means = {"accuracy": 0.25, "pass_at_n": 0.5, "majority_vote": 0.5, "distinct_answers": 2}
    assert Evaluations([], [], [one, two]).sampled_means() == {"num_problems": 2, "num_paths": 2, **means}
    assert Evaluations([], [], []).sampled_means() is None


def test_reward_of_the_report_compares_as_the_kind_of_answer_is() -> None:
    run = parse_run(["configs/demo_short.yaml", "--reward_weights", "1.0", "0.25"])
    after = [Answered("so\n#### (B)", True, True)]
    line = json.loads(completion_lines(run, [Problem("Which?", "B", kind="letter")], [FORMLESS], after))
    assert (line["reward"], line["correct"], line["correct_before"]) == (1.25, True, False)


def test_finished_run_leaves_every_file_of_the_report(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert {key: type(summary[key]) for key in KEYS} == KEYS
    assert summary["num_eval_problems"] == 6
    assert summary["rollout_logp_diff_max"] < 1e-4
    assert summary["config"]["learning_rate"] == 0.01
    state = json.loads((finished_run / "checkpoint-6" / "trainer_state.json").read_text())
    assert summary["reward_last"] == [row["reward"] for row in state["log_history"] if "reward" in row][-1]
    assert {"git_commit", "git_dirty", "seed", "versions", "command"} <= summary.keys()
    lines = [json.loads(line) for line in (finished_run / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {"question", "before", "after", "reward", "correct"} <= lines[0].keys()
    assert (finished_run / "reward.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("final", "checkpoint-2"):
        assert json.loads((finished_run / folder / "m3po.json").read_text())["mode"] == "none"


def test_evaluation_is_cached_for_its_own_settings_only(finished_run: Path) -> None:
    stored = json.loads((finished_run / "baseline.json").read_text())
    assert len(load_cached(finished_run / "baseline.json", stored["key"])) == 6
    assert load_cached(finished_run / "baseline.json", "another key") == []
