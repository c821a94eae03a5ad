# SPDX-License-Identifier: Apache-2.0
"""The evaluation of base models by lm-eval, with the time and the memory of their decoding."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.m3po.hyper_connections.connections import set_mhc_gate

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import check_writable, shown_path, write_json, write_text
from m3po_lab.core.identity import named_content
from m3po_lab.core.observe import unchanged
from m3po_lab.evaluation.folder import FinishedParts, claim_results, weights_of
from m3po_lab.models.loading import load_base_model
from m3po_lab.pretraining.context import prompts_read, rows
from m3po_lab.pretraining.routing_gates import gates_of, read_gates
from m3po_lab.pretraining.tasks import COLUMNS, FILES, SHIPPED, check_rows, load_tasks, write_task

SHOWN = {
    "gsm8k": "exact_match,flexible-extract",
    "gsm8k_8shot": "exact_match,flexible-extract",
    "hellaswag": "acc_norm,none",
    "arc_easy": "acc_norm,none",
    "bits_per_byte": "bits_per_byte,none",
}
DECODED, PAIRS = 64, 5
LONGEST_NAME = 20  # characters of the routing gates in a folder's name
MIB = 1 << 20


class ShortContext(HFLM):
    """A model of a short context generates half of it at most; the prompt keeps its end, which the table says."""

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)


def evaluate(
    model: Any, tokenizer: Any, tasks: dict[str, Any], limit: int | None, finished: FinishedParts
) -> dict[str, dict[str, Any]]:
    """lm-eval's results of the tasks by name; each is saved as soon as it is there.

    Args:
        tasks: lm-eval's tasks by name.
        limit: evaluate only the first problems of each task.
        finished: saves the tasks that are done.
    """
    length = model.config.max_position_embeddings
    options = {"task_manager": TaskManager(include_defaults=False), "limit": limit}
    results = dict(finished.read())
    with unchanged(model):
        lm = ShortContext(
            pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=length, device=str(model.device)
        )
        for name, task in tasks.items():
            if name in results:
                print(f"{name}: done before")
                continue
            output = simple_evaluate(lm, tasks=[task], **options, bootstrap_iters=0, log_samples=False)
            assert output is not None
            results[name] = {**output["results"][name], "prompts_read": prompts_read(task, lm)}
            finished.add([name, results[name]])
    return {name: results[name] for name in tasks}


def decoding(models: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Seconds for each token of greedy decoding, the models in turn, medians of `PAIRS`; on a GPU the peak in bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int | None] = {}

    def decode(model: Any) -> None:
        prompt = torch.full((1, 8), model.config.bos_token_id, device=model.device)
        model.generate(prompt, do_sample=False, min_new_tokens=DECODED, max_new_tokens=DECODED)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    for name, model in models.items():
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        decode(model)
        peaks[name] = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    for _ in range(PAIRS):
        for name, model in models.items():
            start = time.perf_counter()
            decode(model)
            seconds[name].append((time.perf_counter() - start) / DECODED)
    return {name: {"seconds_per_token": median(seconds[name]), "peak_bytes": peaks[name]} for name in models}


def table(results: dict[str, dict[str, Any]], speed: dict[str, dict[str, float | None]]) -> str:
    """Tasks as rows, models as columns."""
    models = list(results)
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for task in next(iter(results.values())):
        cells = [f"{results[model][task][SHOWN[task]]:.4f}" for model in models]
        lines.append(f"| {task}, {SHOWN[task].split(',')[0]} | {' | '.join(cells)} |")
        lines += [f"| {what} | {' | '.join(shown)} |" for what, shown in rows(results, task, SHIPPED[task][1])]
    times = [f"{1e3 * (speed[model]['seconds_per_token'] or 0):.2f}" for model in models]
    lines.append(f"| ms per decoded token | {' | '.join(times)} |")
    peaks = [value for model in models if (value := speed[model]["peak_bytes"]) is not None]
    if peaks:
        lines.append(f"| MiB at peak | {' | '.join(f'{value / MIB:.1f}' for value in peaks)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Evaluate and report.

    Raises:
        UserError: for a wrong input, before anything is evaluated.
    """
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: it must be at least 1.")
    if options.gate is not None:
        read_gates(options.gate)
    check_writable(Path(options.output_dir) if options.output_dir else PROJECT_ROOT / "evals")
    data = Path(options.data) if options.data else None
    files = {} if data is None else {name: data / name for task in options.tasks for name in FILES[task].values()}
    for task in options.tasks if data else ():
        for name in FILES[task].values():
            if not files[name].is_file():
                raise UserError(
                    f"--data {data} has no {name}, which {task} needs: add it, or leave {task} out of --tasks."
                )
            check_rows(files[name], COLUMNS[name])
    places = {"model": options.checkpoint, **({"baseline": options.baseline} if options.baseline else {})}
    models = {name: load_base_model(place) for name, place in places.items()}
    model = models["model"][0]
    if options.gate is not None:
        set_mhc_gate(model, gates_of(model, options.gate, options.checkpoint))
    depends_on = {
        **{name: weights_of(place) for name, place in places.items()},
        "gate": options.gate,
        "limit": options.limit,
        "tasks": sorted(options.tasks),
        "data": {name: named_content(str(file)) for name, file in files.items()} if data else None,
    }
    suffix = "" if options.gate is None else f"-gate{options.gate[:LONGEST_NAME]}"
    folder = claim_results(options.output_dir, "-".join(Path(options.checkpoint).parts[-2:]) + suffix, depends_on)
    tasks = load_tasks({name: write_task(name, data, folder / "tasks") for name in options.tasks}, data is not None)
    finished = {name: FinishedParts(folder / f"{name}.partial.jsonl", depends_on) for name in models}
    results = {
        name: evaluate(model, tokenizer, tasks, options.limit, finished[name])
        for name, (model, tokenizer) in models.items()
    }
    speed = decoding({name: model for name, (model, _) in models.items()})
    text = table(results, speed)
    header = {"places": places, "gate": options.gate, "data": options.data, "limit": options.limit}
    write_json(folder / "results.json", {**header, "results": results, "decoding": speed})
    write_text(folder / "results.md", text + "\n")
    for parts in finished.values():
        parts.remove()
    print(f"{text}\n\nwritten to {shown_path(folder)}/results.md and results.json")
