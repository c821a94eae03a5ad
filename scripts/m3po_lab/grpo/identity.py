# SPDX-License-Identifier: Apache-2.0
"""What defines a run of GRPO (see `core.identity`): its flags; of mode, gating function and ASLR those in force.

A resume may change a few flags (`MAY_CHANGE`); the values then hold from its step on, and `parts` says which held
where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.settings import RESIDUAL_MODES
from trl import GRPOConfig, ModelConfig
from trl.trainer.m3po.config import M3POArguments, checkpoint_info

from m3po_lab.core.files import write_json
from m3po_lab.core.identity import RUN_FILE, as_json, defining, flag_values, named_content, read_run
from m3po_lab.grpo.arguments import Run, RunArguments
from m3po_lab.models.digest import named_model
from m3po_lab.models.embedded import EMBEDDED_MODEL

# What a resumed run may change: how long it trains, and how many problems are answered together at its end.
MAY_CHANGE = ("max_steps", "num_train_epochs", "per_device_eval_batch_size")
LENGTHS = ("max_steps", "num_train_epochs")


def of_run(run: Run) -> dict[str, Any]:
    """The flags that define a run of GRPO, by name; it has to be asked before the trainer settles any of them."""
    training = run.training
    flags = with_acting(flag_values(run.script, training, run.model), training)
    if training.max_steps > 0:
        del flags["num_train_epochs"]
    model = run.model.model_name_or_path or EMBEDDED_MODEL
    return {
        **flags,
        "dataset": named_content(run.script.dataset),
        "model_name_or_path": named_model(model, run.model),
        "engine": run.engine.name,
        "num_processes": training.world_size,
    }


def with_acting(flags: Mapping[str, Any], training: Any) -> dict[str, Any]:
    """The flags; of those that this overlay adds, the ones that act in the run, with the values in force."""
    in_force = checkpoint_info(training)
    learns, residual = "gating_training" in in_force, training.mode in RESIDUAL_MODES
    acts = {
        "gating_learning_rate": learns,
        "gating_warmup_steps": learns,
        "thinking_residual_gate_learning_rate": residual,
        "thinking_residual_lambda_learning_rate": residual,
        **{name: training.aslr_enabled is not False for name in ASLR_HYPERPARAMETERS},
    }
    names = [entry.name for entry in fields(M3POArguments) if entry.name in in_force or acts.get(entry.name)]
    values = {name: as_json(in_force.get(name, getattr(training, name))) for name in names}
    if "gating_type" in values:  # the defaults of a gating function are no difference
        gate, options = gating_class(values["gating_type"]), values["gating_config"]
        usual = gate.structure({}) | {name: options.get(name) for name in ("temperature", "debug")}
        values["gating_config"] = {name: value for name, value in options.items() if value != usual.get(name)}
        if values["cross_path_temp"] == gate.default_temperature:
            values["cross_path_temp"] = None
    values["aslr_enabled"] = bool(training.aslr_enabled)
    own = {entry.name for entry in fields(M3POArguments)}
    return {name: values.get(name, value) for name, value in flags.items() if name not in own or name in values}


def recorded_flags(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The flags in a run's `summary.json`; of one that has them not yet, its changed values over the defaults."""
    if "flags" in summary:
        return dict(summary["flags"])
    values = {}
    for entry in (entry for kind in (RunArguments, GRPOConfig, ModelConfig) for entry in fields(kind)):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        values[entry.name] = summary.get("config", {}).get(entry.name, as_json(default))
    names = ("mode", "seed", "aslr_enabled", "gating_type", "dataset", "num_eval_problems")
    values |= {name: summary[name] for name in names if summary.get(name) is not None}
    values["model_name_or_path"] = values["model_name_or_path"] or EMBEDDED_MODEL
    flags = with_acting(defining(values), SimpleNamespace(**values))
    for name in ("accelerator_config", "parallelism_config"):  # objects, of which such a summary says nothing
        del flags[name]
    engine = summary["engine"] if "engine_version" in summary else "trl"
    return {**flags, "engine": engine, "num_processes": summary.get("num_processes", 1)}


def parts_of(stored: Mapping[str, Any] | None, flags: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Which values of `MAY_CHANGE` held from which step on, for a run that goes on at `step` (0: that starts).

    Args:
        stored: the content of its `run.json`; None for a new run, and for one without the file.
    """
    part = {"from_step": step, **{name: flags[name] for name in MAY_CHANGE if name in flags}}
    before = [past for past in stored["parts"] if past["from_step"] < step] if stored else []
    if before and {**before[-1], "from_step": step} == part:
        return before
    return [*before, part]


def schedule_parts(flags: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the learning rate of a run went by where it is not that of one run from the start; else empty.

    A rate that does not hang on the length of the run is the same however the run was cut into parts.
    """
    constant = flags.get("lr_scheduler_type") == "constant" or (
        flags.get("lr_scheduler_type") == "constant_with_warmup" and flags.get("warmup_steps", 0) >= 1
    )
    lengths = [[part["from_step"], *(part[name] for name in LENGTHS if name in part)] for part in parts]
    changed = [part for at, part in enumerate(lengths) if at == 0 or part[1:] != lengths[at - 1][1:]]
    return [] if constant or [part[0] for part in changed] == [0] else changed


def begin(run: Run, flags: Mapping[str, Any], resume: Path | None) -> dict[str, Any]:
    """Writes `run.json` into the folder of a run that starts, or goes on from a checkpoint; returns its content."""
    stored, step = (read_run(resume), int(resume.name.rpartition("-")[2])) if resume else (None, 0)
    content = {"flags": dict(flags), "parts": parts_of(stored, flags, step)}
    if run.training.process_index == 0:
        write_json(run.folder / RUN_FILE, content)
    return content
