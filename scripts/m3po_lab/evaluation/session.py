# SPDX-License-Identifier: Apache-2.0
"""One evaluation from its parsed flags to its report: checkpoint, datasets, model, lm-eval, files."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import check_writable
from m3po_lab.core.identity import named_content
from m3po_lab.evaluation.agreement import agreement
from m3po_lab.evaluation.by_vllm import check_engine, model_in_vllm
from m3po_lab.evaluation.checkpoint import Checkpoint, describe_aslr
from m3po_lab.evaluation.datasets import choose, make_task
from m3po_lab.evaluation.decoding import Decoding
from m3po_lab.evaluation.evaluate import run_tasks, run_tasks_with
from m3po_lab.evaluation.folder import FinishedParts, claim_results, weights_of
from m3po_lab.evaluation.report import write_report
from m3po_lab.evaluation.settings import SETTINGS_FILE, EvalSettings, demo_settings
from m3po_lab.models.loading import device, load_model, without_flag


def run_evaluation(options: argparse.Namespace, hyperparameters: Mapping[str, Any], command: str) -> None:
    """Evaluate and report.

    Args:
        options: the parsed flags.
        hyperparameters: the flags among them that name a hyperparameter of the checkpoint, None where one is not set.
        command: how the user started the evaluation.

    Raises:
        UserError: for a wrong input, before anything is generated.
    """
    check_counts(options)
    check_writable(Path(options.output_dir) if options.output_dir else PROJECT_ROOT / "evals")
    checkpoint = Checkpoint.read(options.model, hyperparameters)
    of_run = EvalSettings.read(Path(options.problems_of or options.model))
    if of_run is None and options.problems_of:
        raise UserError(f"--problems_of {options.problems_of} has no {SETTINGS_FILE}: give a checkpoint of a run.")
    settings = of_run or demo_settings()
    names, reason = choose(options.dataset, options.num_fewshot)
    tasks = [make_task(name, options.num_fewshot, settings, checkpoint.answer_start) for name in names]
    model, tokenizer = load(options.model, options.dtype)
    paths = checkpoint.paths(options.num_paths, options.seed)
    checkpoint.check_modules(model, paths)
    if options.engine == "vllm":
        check_engine(model, options.aslr)
    evaluations = checkpoint.latent_paths(model, options.aslr, options.seed, options.aslr_max_iterations)
    if len(evaluations) > 1 and paths is not None:
        raise UserError(
            f"--num_paths {options.num_paths}: --aslr {options.aslr} compares one greedy path; leave it out."
        )
    print(f"{options.model}: {checkpoint.describe(paths)}{describe_aslr(model, evaluations)}")
    origin = f"of the run, {settings.dataset}" if of_run else "of configs/demo.yaml, since the model has none"
    print(f"{reason}{f'; problems: those {origin}' if 'problems' in names else ''}")
    batch_size = options.batch_size or settings.batch_size
    depends_on = {
        **weights_of(options.model),
        **{name: value for name, value in checkpoint.stored.items() if name != "versions"},
        **asdict(settings),
        **{name: getattr(options, name) for name in ("num_fewshot", "limit", "num_paths", "seed", "aslr", "dtype")},
        **({} if options.engine == "transformers" else {"engine": options.engine}),
        "ways": {name: None if aslr is None else aslr.overrides for name, aslr in evaluations.items()},
        "datasets": [named_content(name) for name in names],
        "batch_size": batch_size,
        "device": model.device.type,
    }
    folder = claim_results(options.output_dir, folder_name(options), json.loads(json.dumps(depends_on)))
    results, finished = {}, []
    for name, aslr in evaluations.items():
        decoding = Decoding(
            batch_size, settings.precision, settings.chat_template_kwargs, checkpoint.thoughts, paths, aslr
        )
        file = "partial.jsonl" if len(evaluations) == 1 else f"partial-{name}.jsonl"
        decoded = [asdict(part) if part else None for part in (paths, checkpoint.thoughts, aslr)]
        finished.append(FinishedParts(folder / file, [depends_on, *decoded]))
        label = "evaluation" if len(evaluations) == 1 else f"evaluation, ASLR {name}"
        try:
            if options.engine == "vllm":
                given = (checkpoint.decoded_with(paths), checkpoint.sampling_temperature, decoding, label, finished[-1])
                with model_in_vllm(model, tokenizer, *given, options.seed) as lm:
                    results[name] = run_tasks_with(lm, tasks, options.limit)
            else:
                results[name] = run_tasks(model, tokenizer, tasks, decoding, label, options.limit, finished[-1])
        except ValueError as error:
            raise UserError(one_line(error)) from error
    header = {
        "model": options.model,
        "checkpoint": checkpoint.stored,
        "num_paths": options.num_paths,
        "seed": options.seed,
        "aslr": options.aslr,
        "dtype": options.dtype,
        "engine": options.engine,
        "precision": settings.precision,
        "device": model.device.type,
        "command": command,
        "agreement": None,
    }
    if paths is None and "off" in results and "problems" in results["off"]["samples"]:
        samples = results["off"]["samples"]["problems"]
        header["agreement"] = agreement(options.model, options.problems_of, samples)
    write_report(results, header, folder)
    for parts in finished:
        parts.remove()


def check_counts(options: argparse.Namespace) -> None:
    """Refuse numbers of problems, paths or rows below one.

    Raises:
        UserError: names the flag.
    """
    for name in ("limit", "num_paths", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1.")


def load(name: str, dtype: str) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model on the GPU if there is one, and its tokenizer."""
    if (Path(name) / "final").is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is the folder of a run: give one of its checkpoints, e.g. {Path(name) / 'final'}.")
    with without_flag():
        model, tokenizer = load_model(ModelConfig(model_name_or_path=name, dtype=dtype))
    return model.to(device()), tokenizer


def folder_name(options: argparse.Namespace) -> str:
    """The last two parts of the model's name and the options that differ from their defaults, to read."""
    with_aslr = options.aslr != "off"
    shown = {
        "mode": options.mode,
        "shot": options.num_fewshot,
        "paths": options.num_paths if options.num_paths > 1 else None,
        "seed": options.seed,
        "limit": options.limit,
        "engine": None if options.engine == "transformers" else f"-{options.engine}",
        "aslr": options.aslr if with_aslr else None,
        "R": options.aslr_max_iterations if with_aslr else None,
    }
    parts = [part for part in Path(options.model).parts if part not in ("/", ".", "..")][-2:]
    datasets = [Path(name).name for name in options.dataset]
    return "-".join([*parts, *datasets, *(f"{name}{value}" for name, value in shown.items() if value)])
