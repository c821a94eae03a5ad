# SPDX-License-Identifier: Apache-2.0
"""How much of its prompts a model of a short context has read: lm-eval cuts their beginning, and with it examples."""

from typing import Any


def prompts_read(task: Any, lm: Any) -> dict[str, float]:
    """Of the requests of an evaluated task that end in a generation or a choice; {} where there are none.

    Args:
        task: lm-eval's, after the evaluation.
        lm: lm-eval's `HFLM` that evaluated it.

    Returns:
        `cut`: the share of the prompts whose beginning was cut off. `examples`: solved examples that were read whole,
        the mean over the prompts; only for a task that shows some.
    """
    prompts = [instance.args[0] for instance in task.instances if isinstance(instance.args[0], str)]
    kind = task.OUTPUT_TYPE
    if not prompts or kind == "loglikelihood_rolling":
        return {}
    room = lm.max_length - (lm.max_gen_toks if kind == "generate_until" else 0)
    shots, delimiter = task.config.num_fewshot or 0, task.config.fewshot_delimiter
    whole, examples = 0, []
    for instance, prompt in zip(task.instances, prompts, strict=True):
        choice = instance.args[1] if kind != "generate_until" else ""
        tokens = lm.tok_encode(prompt)
        length = room - (len(lm.tok_encode(choice)) - 1 if choice else 0)  # the last token is predicted, never read
        is_whole = len(tokens) <= length
        whole += is_whole
        examples.append(examples_read(lm.tokenizer.decode(tokens[-length:]), shots, delimiter, is_whole))
    shares = {"cut": 1 - whole / len(prompts)}
    return shares | ({"examples": sum(examples) / len(examples)} if shots else {})


def examples_read(text: str, shots: int, delimiter: str, is_whole: bool) -> int:
    """The examples that are whole in the end of a prompt, of `shots` that stood before the question."""
    return shots if is_whole else min(max(0, text.count(delimiter) - 1), shots)


def rows(results: dict[str, dict[str, Any]], task: str, shots: int) -> list[tuple[str, list[str]]]:
    """Rows of the table for a task: what was read of the prompts, where anything was cut."""
    reads = [results[model][task].get("prompts_read", {}) for model in results]
    if not any(read.get("cut") for read in reads):
        return []
    lines = [(f"{task}, prompts cut at their beginning", [f"{read.get('cut', 0):.0%}" for read in reads])]
    if shots:
        lines.append((f"{task}, examples read of {shots}", [f"{read.get('examples', shots):.1f}" for read in reads]))
    return lines
