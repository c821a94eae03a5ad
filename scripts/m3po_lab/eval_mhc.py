# SPDX-License-Identifier: Apache-2.0
"""Evaluate a base model by lm-eval: ``bash scripts/eval_mhc.sh CHECKPOINT [--gate G] [--baseline CHECKPOINT] ...``.

GSM8K with 0 and 8 examples, HellaSwag, ARC-Easy and bits per byte are lm-eval's own tasks; from the Hub, or with
`--data DIR` from files of the same formats. With `--baseline` each task is run on that model too, and the seconds and
the memory of decoding stand side by side. A command that was stopped goes on behind the tasks that are done.
Exit codes: 0 evaluated, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from m3po_lab.command_line.entry import start
from m3po_lab.core.files import check_writable, read_json, shown_path, write_json, write_text
from m3po_lab.pretraining.context import prompts_read, rows
from m3po_lab.pretraining.routing_gates import HELP, gates_of, read_gates

FILES = {  # task -> split: file in --data; rows in the format of the dataset on the Hub
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "gsm8k_8shot": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "hellaswag": {"validation": "hellaswag_validation.jsonl"},
    "arc_easy": {"test": "arc_easy_test.jsonl"},
    "bits_per_byte": {"validation": "text.jsonl"},
}
COLUMNS = {  # file: what the task reads of its rows
    "gsm8k_train.jsonl": ("question", "answer"),
    "gsm8k_test.jsonl": ("question", "answer"),
    "hellaswag_validation.jsonl": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "arc_easy_test.jsonl": ("question", "choices", "answerKey"),
    "text.jsonl": ("page",),
}
SHIPPED = {  # task -> lm-eval's own file, and the number of examples
    "gsm8k": ("gsm8k/gsm8k.yaml", 0),
    "gsm8k_8shot": ("gsm8k/gsm8k.yaml", 8),
    "hellaswag": ("hellaswag/hellaswag.yaml", 0),
    "arc_easy": ("arc/arc_easy.yaml", 0),
    "bits_per_byte": ("wikitext/wikitext.yaml", 0),
}
SHOWN = {
    "gsm8k": "exact_match,flexible-extract",
    "gsm8k_8shot": "exact_match,flexible-extract",
    "hellaswag": "acc_norm,none",
    "arc_easy": "acc_norm,none",
    "bits_per_byte": "bits_per_byte,none",
}
DECODED, PAIRS = 64, 5
LONGEST_NAME = 20  # characters of the gates in a folder's name
MIB = 1 << 20


def write_task(name: str, data: Path | None, folder: Path) -> str:
    """Writes the file of a task: the one that lm-eval ships, with its dataset replaced by local files if there are any.

    Returns:
        Its path, which lm-eval takes for a task.
    """
    import lm_eval
    import yaml

    shipped, shots = SHIPPED[name]
    task: dict[str, Any] = {"include": str(Path(lm_eval.__file__).parent / "tasks" / shipped), "task": name}
    task |= {"num_fewshot": shots, "tag": []}
    text = ""
    if data is not None:
        files = {split: str((data / file).resolve()) for split, file in FILES[name].items()}
        task |= {"dataset_path": None, "dataset_name": None, "dataset_kwargs": {"files": files}}
        task |= {f"{split}_split": None for split in ("training", "validation", "test")}
        task |= {"training_split" if split == "train" else f"{split}_split": split for split in files}
        text = "custom_dataset: !function m3po_lab.eval_mhc.local_rows\n"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task) + text, encoding="utf-8")
    return str(file)


def check_rows(file: Path, columns: Sequence[str]) -> None:
    """Refuse a file of which a row lacks what its task reads, before a model is loaded.

    Raises:
        UserError: the line and what it lacks are named.
    """
    from m3po_lab.core.errors import UserError
    from m3po_lab.core.user_files import read_json_lines

    for number, row in read_json_lines(file):
        missing = [name for name in columns if name not in row]
        if missing:
            raise UserError(f"{file}, line {number}: it lacks {missing[0]!r}; a row has {', '.join(columns)}.")


def local_rows(files: dict[str, str], **metadata: Any) -> dict[str, Any]:
    """The splits of a task from JSONL files, for lm-eval.

    Raises:
        UserError: a file is not one JSON object a line.
    """
    from datasets import Dataset

    from m3po_lab.core.user_files import read_json_lines

    return {split: Dataset.from_list([row for _, row in read_json_lines(Path(file))]) for split, file in files.items()}


def load_tasks(files: dict[str, str], local: bool) -> dict[str, Any]:
    """lm-eval's tasks with their data, by name; `files` has the file of each, `local` says that the data are files too.

    Raises:
        UserError: the data of one cannot be read.
    """
    from lm_eval.tasks import TaskManager

    from m3po_lab.core.errors import UserError, short
    from m3po_lab.core.hub import HUB_ERRORS
    from m3po_lab.core.observe import unchanged_random_state

    manager, loaded = TaskManager(include_defaults=False), {}
    for name, file in files.items():
        try:
            with unchanged_random_state():  # lm-eval draws a task's id from Python's
                loaded[name] = manager.load([file])["tasks"][name]
        except HUB_ERRORS as error:
            what = "the files in --data" if local else "the Hub"
            mend = "mend them" if local else "give --data, a folder with its files"
            raise UserError(f"task {name} cannot be read from {what} ({short(error, 160)}): {mend}.") from error
    return loaded


def evaluate(model: Any, tokenizer: Any, tasks: dict[str, Any], limit: int | None, kept: Path, about: Any) -> Any:
    """lm-eval's results of the tasks, given by name; each is kept as soon as it is there.

    Args:
        kept: JSON file of the results so far.
        about: what they hang on, as JSON has it; those of anything else are not taken.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from m3po_lab.core.observe import unchanged

    class ShortContext(HFLM):
        """A model of a short context generates half of it at most; the prompt keeps its end, which the table says."""

        @property
        def max_gen_toks(self) -> int:
            return min(256, self.max_length // 2)

    length = model.config.max_position_embeddings
    how = {"task_manager": TaskManager(include_defaults=False), "limit": limit}
    before = read_json(kept) or {}
    found = before["results"] if before.get("about") == about else {}
    with unchanged(model):
        lm = ShortContext(
            pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=length, device=str(model.device)
        )
        for name, task in tasks.items():
            if name in found:
                print(f"{name}: done before")
                continue
            done = simple_evaluate(lm, tasks=[task], **how, bootstrap_iters=0, log_samples=False)
            assert done is not None
            found[name] = {**done["results"][name], "prompts_read": prompts_read(task, lm)}
            write_json(kept, {"about": about, "results": found})
    return {name: found[name] for name in tasks}


def decoding(models: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Seconds for each token of greedy decoding, the models in turn, medians of `PAIRS`; on a GPU the peak in bytes."""
    import torch

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


def load(place: str) -> tuple[Any, Any]:
    """A model folder's model, on the GPU if there is one, and its tokenizer.

    Raises:
        UserError: it is no model folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from m3po_lab.core.errors import UserError
    from m3po_lab.models.model_files import UNREADABLE, check_model_files, unreadable

    if not (Path(place) / "config.json").is_file():
        raise UserError(f"{place} is not a model folder: give the folder final of a run.")
    check_model_files(Path(place))
    try:
        model = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(f"{place} cannot be loaded", error) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def run(given: argparse.Namespace) -> None:
    """Evaluate and report.

    Raises:
        UserError: for a wrong input, before anything is evaluated.
    """
    from transformers.m3po.hyper_connections.connections import set_mhc_gate

    from m3po_lab.core.errors import PROJECT_ROOT, UserError
    from m3po_lab.core.identity import named_content
    from m3po_lab.evaluation.folder import claim_results, weights_of

    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit {given.limit}: it must be at least 1.")
    if given.gate is not None:
        read_gates(given.gate)
    check_writable(Path(given.output_dir) if given.output_dir else PROJECT_ROOT / "evals")
    data = Path(given.data) if given.data else None
    for name in given.tasks:
        for file in FILES[name].values() if data else ():
            if not (data / file).is_file():  # type: ignore[operator]
                raise UserError(
                    f"--data {data} has no {file}, which {name} needs: add it, or leave {name} out of --tasks."
                )
            check_rows(data / file, COLUMNS[file])  # type: ignore[operator]
    places = {"model": given.checkpoint, **({"baseline": given.baseline} if given.baseline else {})}
    loaded = {name: load(place) for name, place in places.items()}
    model = loaded["model"][0]
    if given.gate is not None:
        set_mhc_gate(model, gates_of(model, given.gate, given.checkpoint))
    about = {
        **{name: weights_of(place) for name, place in places.items()},
        "gate": given.gate,
        "limit": given.limit,
        "tasks": sorted(given.tasks),
        "data": {name: named_content(str(data / name)) for task in given.tasks for name in FILES[task].values()}
        if data
        else None,
    }
    told = "" if given.gate is None else f"-gate{given.gate[:LONGEST_NAME]}"
    folder = claim_results(given.output_dir, "-".join(Path(given.checkpoint).parts[-2:]) + told, about)
    files = {name: write_task(name, data, folder / "tasks") for name in given.tasks}
    tasks = load_tasks(files, local=data is not None)
    results = {}
    for name, pair in loaded.items():
        results[name] = evaluate(*pair, tasks, given.limit, folder / f"{name}.partial.json", about)
    speed = decoding({name: pair[0] for name, pair in loaded.items()})
    text = table(results, speed)
    told_of = {"places": places, "gate": given.gate, "data": given.data, "limit": given.limit}
    write_json(folder / "results.json", {**told_of, "results": results, "decoding": speed})
    write_text(folder / "results.md", text + "\n")
    for name in loaded:
        (folder / f"{name}.partial.json").unlink()
    print(f"{text}\n\nwritten to {shown_path(folder)}/results.md and results.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.command_line.plain_parser import OneLineFlags
    from m3po_lab.core.errors import exit_code

    flags = OneLineFlags(usage="bash scripts/eval_mhc.sh CHECKPOINT [--flag value ...]")
    flags.add_argument("checkpoint", help="a model folder, e.g. runs/mhc_small/mhc-seed0/final")
    flags.add_argument("--baseline", help="another one, evaluated beside it")
    flags.add_argument("--gate", help=HELP)
    flags.add_argument("--tasks", nargs="+", choices=list(FILES), default=list(FILES), metavar="TASK")
    flags.add_argument("--data", help="folder with the tasks' files, see docs/hyper-connections.md (default: the Hub)")
    flags.add_argument("--limit", type=int, help="the first N problems of each task")
    flags.add_argument("--output_dir", help="default: evals/<run>-final-<digest of the model and the options>")
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(
        lambda: run(flags.parse_args(words)), "Stopped. The same command goes on behind the tasks that are done."
    )


if __name__ == "__main__":
    start(main)
