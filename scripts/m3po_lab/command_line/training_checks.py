# SPDX-License-Identifier: Apache-2.0
"""What Transformers' Trainer would find out only when the training starts: tried on nothing, right after parsing.

The optimizer, its schedule and the reporters of a run are made once for a model of one weight, so that a package that
is missing or an option that does not exist ends a run here, and not behind an evaluation of the start model.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from m3po_lab.core.errors import UserError, short

UNLISTED = {"azure_ml": "azureml", "flyte": "flytekit"}  # reporters that Transformers has and may not list as available
MAPPINGS = (
    "generation_kwargs",
    "chat_template_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
    "model_init_kwargs",
)
# What an optimizer or a schedule raises for a package that is missing or an option that it does not have.
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)


def check_training(training: TrainingArguments) -> None:
    """Refuse an optimizer, a schedule or a reporter that cannot be made, and options that are none.

    Raises:
        UserError: names the flag and says why.
    """
    for name in MAPPINGS:
        value = getattr(training, name, None)
        if not isinstance(value, dict | None):
            raise UserError(f"--{name} {value!r}: it must be a JSON object, e.g. '{{\"key\": 1}}'.")
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel true needs the package liger-kernel, which is not installed: leave it out.")
    cache = getattr(training, "cache_implementation", None)
    if cache is not None and cache.startswith("offloaded") and training.device.type == "cpu":
        raise UserError(f"--cache_implementation {cache} needs a GPU, and this run is on the CPU: leave it out.")
    _check_reporters(training)
    _check_optimizer(training)


def _check_optimizer(training: TrainingArguments) -> None:
    """Refuse an optimizer or a schedule that cannot be made; the error of `check_training`."""
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kind([weight], **options)
    except REFUSALS as error:
        if "need to pass a" not in str(error):  # GaLore, APOLLO and LOMO look at the model, after all else
            flags = f"--optim {training.optim.value}"
            flags += f" --optim_args {training.optim_args}" if training.optim_args else ""
            raise UserError(f"{flags} cannot be used here: {short(error)} (the default is adamw_torch)") from error
    steps = max(1, training.max_steps)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=torch.optim.SGD([weight], lr=training.learning_rate),
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except REFUSALS as error:
        raise UserError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs "
            f"{training.lr_scheduler_kwargs} cannot be used: {short(error)}."
        ) from error


def _check_reporters(training: TrainingArguments) -> None:
    """Refuse a reporter of `--report_to` that is unknown or needs a package that is not installed.

    Raises:
        UserError: names it and those that can be had.
    """
    usable = [
        *get_available_reporting_integrations(),
        *(name for name, module in UNLISTED.items() if find_spec(module)),
    ]
    for name in training.report_to:
        if name not in usable:
            why = "needs a package that is not installed" if name in INTEGRATION_TO_CALLBACK else "is unknown"
            raise UserError(f"--report_to {name} {why}; give one of {', '.join([*usable, 'none'])}.")
