# SPDX-License-Identifier: Apache-2.0
"""One evaluation from its parsed flags to its report: checkpoint, datasets, model, lm-eval, files."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from lm_eval.api.task import Task
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.m3po.flags import has_residual_gate
from transformers.m3po.settings import RESIDUAL_MODES
from trl import ModelConfig

from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line, short
from m3po_lab.core.files import check_writable
from m3po_lab.evaluation.agreement import agreement
from m3po_lab.evaluation.checkpoint import (
    aslr_line,
    aslr_of,
    check_gate,
    checkpoint_numbers,
    mode_line,
    paths_of,
    thoughts_of,
)
from m3po_lab.evaluation.evaluate import load_task, problems_task, run_tasks
from m3po_lab.evaluation.folder import claim_results, weights_of
from m3po_lab.evaluation.report import write_report
from m3po_lab.evaluation.resume import FinishedBatches
from m3po_lab.evaluation.settings import SETTINGS_FILE, EvalSettings
from m3po_lab.evaluation.tasks import MARKER, demo_settings
from m3po_lab.grpo.identity import named_content
from m3po_lab.models.loading import load_model
from m3po_lab.models.model_files import HUB_ERRORS
from m3po_lab.problems.data_sources import GSM8K

DATASETS = {GSM8K: "gsm8k", "gsm8k": "gsm8k"} | {
    name: name for name in ("gsm_symbolic", "problems", "math500", "mmlu_stem", "arc_challenge")
}
WITH_EXAMPLES = ("gsm8k", "gsm_symbolic")
HUB_SECONDS = 10


def run_evaluation(given: argparse.Namespace, numbers_given: dict[str, Any], command: str) -> None:
    """Evaluate and report; `command` is how the user started it.

    Raises:
        UserError: for a wrong input, before anything is generated.
    """
    check(given)
    check_writable(Path(given.output_dir) if given.output_dir else PROJECT_ROOT / "evals")
    numbers = checkpoint_numbers(given.model, numbers_given)
    paths = paths_of(numbers, given.num_paths, given.seed)
    known = EvalSettings.read(Path(given.problems_of or given.model))
    if known is None and given.problems_of:
        raise UserError(f"--problems_of {given.problems_of} has no {SETTINGS_FILE}: give a checkpoint of a run.")
    settings = known or demo_settings()
    names, reason = choose(given.dataset, given.num_fewshot)
    tasks = [make_task(name, given.num_fewshot, settings, numbers.get("answer_start", MARKER)) for name in names]
    model, tokenizer = load(given.model, given.dtype)
    if has_residual_gate(model) != (numbers["mode"] in RESIDUAL_MODES):
        raise UserError(
            f"{given.model} has {'a' if has_residual_gate(model) else 'no'} residual gate, which does not fit mode "
            f"{numbers['mode']}: evaluate the folder that its run saved, with its m3po.json."
        )
    thoughts = thoughts_of(numbers)
    check_gate(numbers, model, given.model, paths)
    ways = aslr_of(numbers, given.model, model, given.aslr, given.seed, given.aslr_max_iterations)
    if len(ways) > 1 and paths is not None:
        raise UserError(f"--num_paths {given.num_paths}: --aslr {given.aslr} compares one greedy path; leave it out.")
    whose = f"those of the run, {settings.dataset}" if known else "those of configs/demo.yaml, since the model has none"
    print(f"{given.model}: {mode_line(numbers, paths)}{aslr_line(model, ways)}")
    print(f"{reason}{f'; problems: {whose}' if 'problems' in names else ''}")
    decoding = {"dtype": given.dtype, "precision": settings.precision, "device": model.device.type}
    depends = {
        **weights_of(given.model),
        **{name: value for name, value in numbers.items() if name != "versions"},
        **asdict(settings),
        **{name: getattr(given, name) for name in ("num_fewshot", "limit", "num_paths", "seed", "aslr", "dtype")},
        "ways": {name: None if aslr is None else aslr.overrides for name, aslr in ways.items()},
        "datasets": [named_content(name) for name in names],
        "batch_size": given.batch_size or settings.batch_size,
        "device": model.device.type,
    }
    folder = claim_results(given.output_dir, folder_name(given), json.loads(json.dumps(depends)))
    found, kept = {}, []
    for name, aslr in ways.items():
        decodes = [asdict(how) if how else None for how in (paths, thoughts, aslr)]
        part = "partial.jsonl" if len(ways) == 1 else f"partial-{name}.jsonl"
        kept.append(FinishedBatches(folder / part, [depends, *decodes]))
        try:
            found[name] = run_tasks(
                model,
                tokenizer,
                tasks,
                batch_size=given.batch_size or settings.batch_size,
                precision=settings.precision,
                label="evaluation" if len(ways) == 1 else f"evaluation, ASLR {name}",
                chat_template_kwargs=settings.chat_template_kwargs,
                thoughts=thoughts,
                paths=paths,
                aslr=aslr,
                limit=given.limit,
                finished=kept[-1],
            )
        except ValueError as error:
            raise UserError(one_line(error)) from error
    about = {
        "model": given.model,
        "checkpoint": numbers,
        "num_paths": given.num_paths,
        "seed": given.seed,
        "aslr": given.aslr,
        **decoding,
        "command": command,
        "agreement": None,
    }
    if paths is None and "off" in found and "problems" in found["off"]["samples"]:
        about["agreement"] = agreement(given.model, given.problems_of, found["off"]["samples"]["problems"])
    write_report(found, about, folder)
    for batches in kept:
        batches.remove()


def check(given: argparse.Namespace) -> None:
    """Refuse counts below one."""
    for name in ("limit", "num_paths", "batch_size"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1.")


def choose(asked: list[str], num_fewshot: int) -> tuple[list[str], str]:
    """The datasets to evaluate and why these, in one line.

    Raises:
        UserError: for a dataset that is unknown, or has no solved examples where eight are asked for.
    """
    for name in asked:
        if name not in DATASETS and not name.endswith(".jsonl"):
            raise UserError(f"--dataset {name} is unknown: give {', '.join(DATASETS)} or the path of a .jsonl.")
        if num_fewshot and DATASETS.get(name, "gsm8k") not in WITH_EXAMPLES:
            raise UserError(
                f"--num_fewshot {num_fewshot}: {name} has no solved examples; leave it out, or give --dataset "
                f"{' or '.join(WITH_EXAMPLES)}."
            )
    if len({DATASETS.get(name, "gsm8k") for name in asked}) < len(asked):
        raise UserError(f"--dataset {' --dataset '.join(asked)}: two of them are one task; evaluate them one by one.")
    if asked:
        return asked, f"datasets as asked for: {', '.join(asked)}"
    missing = hub_error()
    if missing is None:
        return [GSM8K], f"no --dataset is given: {GSM8K} from the Hub"
    names = ["gsm_symbolic"] if num_fewshot else ["gsm_symbolic", "problems"]
    return names, f"no --dataset is given and the Hub cannot be reached ({missing}): generated {' and '.join(names)}"


def hub_error() -> str | None:
    """Why GSM8K cannot be had from the Hub now; None when it can."""
    try:
        HfApi().dataset_info(GSM8K, timeout=HUB_SECONDS)
    except HUB_ERRORS as error:
        return short(error, 120)
    return None


def make_task(name: str, num_fewshot: int, settings: EvalSettings, marker: str) -> Task:
    """The task of a dataset."""
    if name == "problems":
        return problems_task(settings)
    task = DATASETS.get(name, "gsm8k") + (f"_{num_fewshot}shot" if num_fewshot else "")
    return load_task(task, marker=marker, **({} if name in DATASETS else {"data": name}))


def load(name: str, dtype: str) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model on the GPU if there is one, and its tokenizer."""
    if (Path(name) / "final").is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is the folder of a run: give one of its checkpoints, e.g. {Path(name) / 'final'}.")
    try:
        model, tokenizer = load_model(ModelConfig(model_name_or_path=name, dtype=dtype))
    except UserError as error:
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def folder_name(given: argparse.Namespace) -> str:
    """The last two parts of the model's name and the options that were given, to read."""
    parts = [part for part in Path(given.model).parts if part not in ("/", ".", "..")][-2:]
    datasets = [Path(name).name for name in given.dataset]
    paths = given.num_paths if given.num_paths > 1 else None
    options = {"mode": given.mode, "shot": given.num_fewshot, "paths": paths, "seed": given.seed, "limit": given.limit}
    options["aslr"] = given.aslr if given.aslr != "off" else None
    options["R"] = given.aslr_max_iterations if given.aslr != "off" else None
    told = [f"{name}{value}" for name, value in options.items() if value]
    return "-".join([*parts, *datasets, *told])
