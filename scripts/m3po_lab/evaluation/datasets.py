# SPDX-License-Identifier: Apache-2.0
"""Which datasets an evaluation asks, by the names of `--dataset`."""

from huggingface_hub import HfApi
from lm_eval.api.task import Task

from m3po_lab.core.errors import UserError, short
from m3po_lab.core.hub import HUB_ERRORS
from m3po_lab.evaluation.evaluate import load_task, problems_task
from m3po_lab.evaluation.settings import EvalSettings
from m3po_lab.problems.data_sources import GSM8K

DATASETS = {GSM8K: "gsm8k", "gsm8k": "gsm8k"} | {
    name: name for name in ("gsm_symbolic", "problems", "math500", "mmlu_stem", "arc_challenge")
}
WITH_EXAMPLES = ("gsm8k", "gsm_symbolic")
HUB_SECONDS = 10


def choose(names: list[str], num_fewshot: int) -> tuple[list[str], str]:
    """The datasets to evaluate and why these, in one line.

    Raises:
        UserError: for a dataset that is unknown, or has no solved examples where eight are asked for.
    """
    for name in names:
        if name not in DATASETS and not name.endswith(".jsonl"):
            raise UserError(f"--dataset {name} is unknown: give {', '.join(DATASETS)} or the path of a .jsonl.")
        if num_fewshot and DATASETS.get(name, "gsm8k") not in WITH_EXAMPLES:
            raise UserError(
                f"--num_fewshot {num_fewshot}: {name} has no solved examples; leave it out, or give --dataset "
                f"{' or '.join(WITH_EXAMPLES)}."
            )
    if len({DATASETS.get(name, "gsm8k") for name in names}) < len(names):
        raise UserError(f"--dataset {' --dataset '.join(names)}: two of them are one task; evaluate them one by one.")
    if names:
        return names, f"datasets as asked for: {', '.join(names)}"
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
