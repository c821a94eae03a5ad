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
from lm_eval.tasks import TaskManager

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import check_writable, shown_path, write_json, write_text
from m3po_lab.core.identity import named_content
from m3po_lab.core.observe import unchanged
from m3po_lab.evaluation.folder import FinishedParts, claim_results, weights_of
from m3po_lab.pretraining.context import prompts_read, rows
from m3po_lab.pretraining.routing_gates import read_gates
from m3po_lab.pretraining.tasks import COLUMNS, FILES, SHIPPED, check_rows, load_tasks, write_task
from m3po_lab.pretraining.variants import Controlled, ShortContext, Variant, routed, variants_of

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


def evaluate(
    variant: Variant, tasks: dict[str, Any], limit: int | None, finished: FinishedParts
) -> dict[str, dict[str, Any]]:
    """lm-eval's results of the tasks by name; each is saved as soon as it is there.

    Args:
        variant: the model with its gate or controller.
        tasks: lm-eval's tasks by name.
        limit: evaluate only the first problems of each task.
        finished: saves the tasks that are done.
    """
    model = variant.model
    length = model.config.max_position_embeddings
    options = {"task_manager": TaskManager(include_defaults=False), "limit": limit}
    results = dict(finished.read())
    with unchanged(model), routed(model, variant.gate):
        lm = ShortContext(variant, batch_size=8, max_length=length, device=str(model.device))
        for name, task in tasks.items():
            if name in results:
                print(f"{name}: done before")
                continue
            output = simple_evaluate(lm, tasks=[task], **options, bootstrap_iters=0, log_samples=False)
            assert output is not None
            results[name] = {**output["results"][name], "prompts_read": prompts_read(task, lm)}
            finished.add([name, results[name]])
    return {name: results[name] for name in tasks}


def decoding(variants: dict[str, Variant]) -> dict[str, dict[str, float | None]]:
    """Seconds for each token of greedy decoding, the variants in turn, medians of `PAIRS`; on a GPU the peak in bytes.

    What a controller does before the first token is counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = {}

    def decode(variant: Variant) -> None:
        model = variant.model
        prompt = torch.full((1, 8), model.config.bos_token_id, device=model.device)
        gate = variant.gate_of(prompt, torch.ones_like(prompt))
        model.generate(prompt, do_sample=False, min_new_tokens=DECODED, max_new_tokens=DECODED, **gate)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    for name, variant in variants.items():
        on_gpu = variant.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        decode(variant)
        peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else None
    for _ in range(PAIRS):
        for name, variant in variants.items():
            start = time.perf_counter()
            decode(variant)
            seconds[name].append((time.perf_counter() - start) / DECODED)
    return {name: {"seconds_per_token": median(seconds[name]), "peak_bytes": peaks[name]} for name in variants}


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


def run(options: argparse.Namespace, controller: Controlled | None = None) -> None:
    """Evaluate and report.

    Args:
        options: of the command.
        controller: the one that `--controller` names.

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
    variants = variants_of(options, controller)
    depends_on = {
        "model": weights_of(options.checkpoint),
        **({"baseline": weights_of(options.baseline)} if options.baseline else {}),
        "gate": options.gate,
        **({"controller": controller.digest, "constants": controller.constants} if controller else {}),
        "limit": options.limit,
        "tasks": sorted(options.tasks),
        "data": {name: named_content(str(file)) for name, file in files.items()} if data else None,
    }
    suffix = "" if options.gate is None else f"-gate{options.gate[:LONGEST_NAME]}"
    folder = claim_results(options.output_dir, "-".join(Path(options.checkpoint).parts[-2:]) + suffix, depends_on)
    tasks = load_tasks({name: write_task(name, data, folder / "tasks") for name in options.tasks}, data is not None)
    finished = {
        name: FinishedParts(folder / f"{name.replace(' ', '_')}.partial.jsonl", depends_on) for name in variants
    }
    results = {name: evaluate(variant, tasks, options.limit, finished[name]) for name, variant in variants.items()}
    speed = decoding(variants)
    text = table(results, speed)
    places = {"model": options.checkpoint, **({"baseline": options.baseline} if options.baseline else {})}
    header = {"places": places, "gate": options.gate, "data": options.data, "limit": options.limit}
    if controller is not None:
        header["controller"] = options.controller
    write_json(folder / "results.json", {**header, "results": results, "decoding": speed})
    write_text(folder / "results.md", text + "\n")
    for parts in finished.values():
        parts.remove()
    print(f"{text}\n\nwritten to {shown_path(folder)}/results.md and results.json")
