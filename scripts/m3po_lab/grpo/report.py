# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: `summary.json`, `reward.png`, `completions.jsonl`, and the last lines on the terminal.

A gain is split: accuracy can rise because more answers come in the asked form, or because more of them are right. The
second is tested alone, on the problems whose answer was well-formed both before and after.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from statistics import fmean
from typing import Any

from transformers.m3po.settings import CROSS_PATH_MODES
from trl import GRPOTrainer
from trl.trainer.m3po.metrics import METRICS

from m3po_lab.command_line.commands import CONTINUE, shown_command, train_command
from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.core.files import shown_path, write_json, write_text
from m3po_lab.core.provenance import CODE, distribution, git_state, source_digest
from m3po_lab.core.stats import Paired, compare
from m3po_lab.evaluation.evaluate import Answered, Sampled
from m3po_lab.grpo.arguments import Run, changed_values
from m3po_lab.grpo.figure import draw_rewards
from m3po_lab.grpo.identity import with_acting
from m3po_lab.problems.data_sources import Problem
from m3po_lab.problems.rewards import make_rewards

HISTORY = {  # what is kept of each log line of a training, and its name there
    "step": "step",
    "reward": "reward",
    "reward_std": "reward_std",
    "accuracy": "rewards/correct_reward/mean",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "completion_length": "completions/mean_length",
    "step_time": "step_time",
    **{name: f"m3po/{name}" for name in METRICS},
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "math-verify", "reasoning-gym")
ATTENTION = (
    "attention_entropy",
    "attention_max",
    "attention_variance",
    "similarity_mean",
    "similarity_min",
    "similarity_max",
)
EFFECTS = ("blend_kl", "thought_kl", "aslr_kl", "peer_differs")
LEAST_EFFECT = 1e-3  # nats


@dataclass(frozen=True)
class Evaluations:
    """The held-out problems: greedy before and after the training, and sampled after it, where a run does that."""

    before: Sequence[Answered]
    after: Sequence[Answered]
    sampled: Sequence[Sampled]

    def sampled_means(self) -> dict[str, float] | None:
        """Of what was sampled the means, and of how many problems; None where nothing was."""
        if not self.sampled:
            return None
        names = ("accuracy", "pass_at_n", "majority_vote", "distinct_answers")
        means = {name: fmean(getattr(one, name) for one in self.sampled) for name in names}
        return {"num_problems": len(self.sampled), "num_paths": len(self.sampled[0].completions), **means}


def split_gain(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Paired]:
    """Three paired comparisons: accuracy, format, and accuracy where the form was right both times (`arithmetic`)."""
    both = [(early, late) for early, late in zip(before, after, strict=True) if early.formatted and late.formatted]
    return {
        "accuracy": compare([row.correct for row in before], [row.correct for row in after]),
        "format": compare([row.formatted for row in before], [row.formatted for row in after]),
        "arithmetic": compare([early.correct for early, _ in both], [late.correct for _, late in both]),
    }


def verdict(parts: dict[str, Paired]) -> str:
    """One sentence on what the comparison shows, at the level p < 0.05."""
    accuracy, form, arithmetic = parts["accuracy"], parts["format"], parts["arithmetic"]
    if not accuracy.significant():
        return f"No significant change in accuracy (p = {accuracy.p_value:.2g})."
    if accuracy.after < accuracy.before:
        return f"Accuracy is significantly LOWER than before (p = {accuracy.p_value:.2g})."
    text = f"Accuracy is significantly higher than before (p = {accuracy.p_value:.2g})"
    if arithmetic.significant() and arithmetic.after > arithmetic.before:
        return f"{text}, and so it is where the form was right both times (p = {arithmetic.p_value:.2g})."
    if form.after > form.before:
        return (
            f"{text}, but this gain is only format: where the form was right both times, "
            f"accuracy did not move significantly (p = {arithmetic.p_value:.2g})."
        )
    return f"{text}; on the {arithmetic.n} problems with the right form both times it alone is not significant."


def attention_means(history: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """What the attention of a run was like: each logged metric of `ATTENTION`, mean over the log lines that have it.

    None where nothing was logged: in the modes without it, and where nothing was blended.
    """
    logged = {name: [row[f"m3po/{name}"] for row in history if f"m3po/{name}" in row] for name in ATTENTION}
    return {name: fmean(values) for name, values in logged.items() if values} or None


def effects(history: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """What thinking did to the next token: each logged metric of `EFFECTS`, mean over the log lines that have it.

    None where nothing was measured.
    """
    logged = {name: [row[f"m3po/{name}"] for row in history if f"m3po/{name}" in row] for name in EFFECTS}
    return {name: fmean(values) for name, values in logged.items() if values} or None


def effect_line(measured: Mapping[str, float]) -> str:
    """What thinking did, as the last lines of a run have it; it says so where that is next to nothing."""
    named = {"blend_kl": "the blend", "thought_kl": "the thoughts", "aslr_kl": "ASLR"}
    parts = []
    for name, what in named.items():
        if name in measured:
            weak = measured[name] < LEAST_EFFECT
            nothing = f", next to nothing: whatever the run shows, {what} did not do it" if weak else ""
            parts.append(f"{what} moved the next token by {measured[name]:.2g} nats{nothing}")
    if "peer_differs" in measured:
        parts.append(f"at {measured['peer_differs']:.0%} of the thinking positions a peer had another token")
    return f"{'; '.join(parts)} (means over the run)"


def sampled_line(means: Mapping[str, float]) -> str:
    """What the sampled completions were like, as the last lines of a run have it."""
    paths = f"{means['num_paths']:.0f}"
    return (
        f"sampled, {paths} completions of {means['num_problems']:.0f} problems: right {means['accuracy']:.1%}, "
        f"pass@{paths} {means['pass_at_n']:.1%}, majority vote {means['majority_vote']:.1%}, "
        f"{means['distinct_answers']:.1f} distinct answers"
    )


def diversity(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How different the completions were at the start and at the end of a run.

    Of the different answers of a group and of the standard deviation of the rewards of a step, the mean over the first
    and over the last quarter of the log lines that have it, one line at least.
    """
    means: dict[str, float] = {}
    for name, key in (("distinct_answers", "m3po/distinct_answers"), ("reward_std", "reward_std")):
        values = [row[key] for row in history if key in row]
        if values:
            quarter = max(1, len(values) // 4)
            means |= {f"{name}_first": fmean(values[:quarter]), f"{name}_last": fmean(values[-quarter:])}
    return means


def log_columns(history: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The log lines of the training by column, None where a line lacks the number; columns that none has are left
    out."""
    lines = [row for row in history if "reward" in row]
    columns = {name: [row.get(key) for row in lines] for name, key in HISTORY.items()}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def last_reward(history: Sequence[dict[str, Any]]) -> float | None:
    """The mean reward on the last log line that has one."""
    return next((row["reward"] for row in reversed(history) if "reward" in row), None)


def summarise(
    run: Run,
    command: str,
    trainer: GRPOTrainer,
    parts: dict[str, Paired],
    sampled: dict[str, float] | None,
    train_seconds: float,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`: results, then everything that is needed to trust and to repeat them."""
    accuracy, form, arithmetic = parts["accuracy"], parts["format"], parts["arithmetic"]
    history = trainer.state.log_history
    differences = [row["m3po/rollout_logp_diff_max"] for row in history if "m3po/rollout_logp_diff_max" in row]
    steps = trainer.state.global_step
    commit, dirty = git_state(PROJECT_ROOT)
    return {
        "mode": run.training.mode,
        "gating_type": run.training.gating_type if run.training.mode in CROSS_PATH_MODES else None,
        "aslr_enabled": bool(run.training.aslr_enabled),
        "engine": run.engine.name,
        "engine_version": run.engine.version,
        "engine_why": run.engine.why,
        "distribution": distribution(trainer.accelerator),
        "num_processes": trainer.accelerator.num_processes,
        "accuracy_before": accuracy.before,
        "accuracy_after": accuracy.after,
        "accuracy_difference_interval_95": list(accuracy.interval),
        "gained": accuracy.gained,
        "lost": accuracy.lost,
        "p_value": accuracy.p_value,
        "num_eval_problems": accuracy.n,
        "format_before": form.before,
        "format_after": form.after,
        "arithmetic_before": arithmetic.before,
        "arithmetic_after": arithmetic.after,
        "arithmetic_p_value": arithmetic.p_value,
        "arithmetic_num_problems": arithmetic.n,
        "verdict": verdict(parts),
        "rollout_logp_diff_max": max(differences) if differences else None,
        "reward_last": last_reward(history),
        "attention": attention_means(history),
        "effects": effects(history),
        "diversity": diversity(history),
        "sampled": sampled,
        "history": log_columns(history),
        "steps": steps,
        "train_seconds": train_seconds,
        "seconds_per_step": train_seconds / steps if steps else None,
        "seed": run.training.seed,
        "model": trainer.model.config.name_or_path,
        "dataset": run.script.dataset,
        "git_commit": commit,
        "git_dirty": dirty,
        "code": source_digest(PROJECT_ROOT, CODE),
        "study": run.script.study,
        "command": command,
        "config": changed_values(run),
        "flags": with_acting(about["flags"], run.training),
        "parts": about["parts"],
        "versions": {name: metadata.version(name) for name in PACKAGES} | vllm_version(run.training),
        "device": str(trainer.accelerator.device),
    }


def vllm_version(training: Any) -> dict[str, str]:
    """That of vLLM, where it has decoded the rollouts; {} else."""
    if not training.use_vllm:
        return {}
    from vllm import __version__

    return {"vllm": __version__}


def completion_lines(
    run: Run, held_out: Sequence[Problem], before: Sequence[Answered], after: Sequence[Answered]
) -> str:
    """`completions.jsonl`: one held-out problem a line, with the completion before and after and its reward after."""
    rewards = make_rewards(run.training.answer_start)
    texts = [row.completion for row in after]
    known = {
        "reference": [problem.answer for problem in held_out],
        "kind": [problem.kind for problem in held_out],
    }
    columns = [reward(completions=texts, **known) for reward in rewards]
    totals = [
        sum(weight * value for weight, value in zip(run.training.reward_weights, values, strict=True))
        for values in zip(*columns, strict=True)
    ]
    lines = [
        {
            "question": problem.question,
            "reference": problem.answer,
            "before": early.completion,
            "correct_before": early.correct,
            "after": late.completion,
            "correct": late.correct,
            "reward": total,
        }
        for problem, early, late, total in zip(held_out, before, after, totals, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def table(parts: dict[str, Paired]) -> str:
    """The comparison as text, one line each for accuracy, format and arithmetic."""
    names = {"accuracy": "accuracy", "format": "format", "arithmetic": "accuracy, form right both times"}
    lines = [
        f"{'greedy, held-out':34}{'n':>5}{'before':>9}{'after':>9}{'gained':>8}{'lost':>6}{'p':>10}  95 % of change"
    ]
    for key, name in names.items():
        part = parts[key]
        if part.n == 0:
            lines.append(f"{name:34}{0:5d}")
            continue
        low, high = part.interval
        lines.append(
            f"{name:34}{part.n:5d}{part.before:9.1%}{part.after:9.1%}{part.gained:8d}{part.lost:6d}"
            f"{part.p_value:10.2g}  {100 * low:+.1f} to {100 * high:+.1f} points"
        )
    return "\n".join(lines)


def write_report(
    run: Run,
    words: Sequence[str],
    trainer: GRPOTrainer,
    held_out: Sequence[Problem],
    answers: Evaluations,
    train_seconds: float,
    about: Mapping[str, Any],
) -> None:
    """Write the run's report files and print its last lines; `about` is the content of its `run.json`."""
    parts = split_gain(answers.before, answers.after)
    command = train_command(words)
    summary = summarise(run, command, trainer, parts, answers.sampled_means(), train_seconds, about)
    summary["correct_after"] = "".join(str(int(row.correct)) for row in answers.after)  # a digit for each problem
    write_text(run.folder / "completions.jsonl", completion_lines(run, held_out, answers.before, answers.after))
    if answers.sampled:
        lines = [json.dumps(asdict(one), ensure_ascii=False) for one in answers.sampled]
        write_text(run.folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    draw_rewards(trainer.state.log_history, summary, run.folder / "reward.png")
    write_json(run.folder / "summary.json", summary)
    print("\n".join(closing_lines(run, summary, parts, words)))


def closing_lines(run: Run, summary: dict[str, Any], parts: dict[str, Paired], words: Sequence[str]) -> list[str]:
    """Result, files, and what one can do next."""
    folder = shown_path(run.folder)
    suffix = f" with {summary['gating_type']}" if summary["gating_type"] not in (None, "baseline") else ""
    suffix += " with ASLR (off in the evaluations)" if summary["aslr_enabled"] else ""
    more = train_command(words, {**CONTINUE, "max_steps": str(2 * summary["steps"])})
    aslr = shown_command("scripts/eval_gsm8k.sh", [f"{folder}/final", "--dataset", "problems", "--aslr", "on"])
    curves = shown_command("scripts/run.sh", ["tensorboard", "--logdir", folder])
    return [
        "",
        f"mode {summary['mode']}{suffix}, {summary['steps']} steps in {summary['train_seconds']:.0f} s "
        f"({summary['seconds_per_step'] or 0:.1f} s each), seed {summary['seed']}",
        table(parts),
        summary["verdict"],
        *([sampled_line(summary["sampled"])] if summary["sampled"] else []),
        *([effect_line(summary["effects"])] if summary["effects"] else []),
        "",
        f"model        {folder}/final",
        f"report       {folder}/summary.json  reward.png  completions.jsonl",
        *([f"train more   {more}"] if run.training.save_strategy != "no" else []),
        *([f"curves       {curves}"] if "tensorboard" in run.training.report_to else []),
        *([f"with ASLR    {aslr}"] if summary["aslr_enabled"] else []),
    ]
