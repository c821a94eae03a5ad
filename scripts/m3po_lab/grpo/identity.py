# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same run: `run.json`, in the run folder from its start and in each of its checkpoints.

It has every flag that can change a number of the run, as the run was started with it; of a local file or folder the
content counts and not its name. Flags of a mode, a gate or ASLR count where the run has them. Resuming, sweeps and
comparisons all go by this, so that none of them takes a run for another one.

A resume may change a few flags (`MAY_CHANGE`); the values then hold from its step on, and `parts` says which held
where.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.m3po.aslr.settings import ASLR_NUMBERS
from transformers.m3po.gating.factory import gate_class
from transformers.m3po.settings import RESIDUAL_MODES
from trl import GRPOConfig, ModelConfig
from trl.trainer.m3po.config import M3POArguments, checkpoint_info

from m3po_lab.core.files import read_json, write_json
from m3po_lab.grpo.config import Run, RunArguments, UserError, one_line
from m3po_lab.models.loading import EMBEDDED_MODEL, model_digest
from m3po_lab.pretraining.data import PYTHON, documents

RUN_FILE = "run.json"
OF_FILES = ("dataset", "model_name_or_path", "tokenizer")  # flags that may name files, of which the content counts
CONTENT = re.compile(r"(.*) \((?:sha256|version) (\S+)\)", re.DOTALL)  # a name, and what tells its content
# The flags that cannot change a number of a run, and why.
WITHOUT_EFFECT = {
    "where the run lies and what becomes of what is there": ("output_dir", "overwrite", "resume_from_checkpoint"),
    "mode says it": ("enable_cross_path", "thinking_residual_enabled"),
    "what is kept of the run, at the ends of generation cycles only": (
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        "enable_jit_checkpoint",
    ),
    "what is shown and sent of the run": (
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "log_completions", "log_multimodal"),
        *("log_completions_hub_repo", "log_unique_prompts", "num_completions_to_print", "skip_memory_metrics"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        *("hub_revision", "debug", "include_num_input_tokens_seen"),
    ),
    "the rows come in their order, however they are fetched": (
        *("shuffle_dataset", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    ),
    "no code here reads them": ("do_train", "do_eval", "do_predict", "local_rank"),
    "how long one waits, and where a server is": (
        *("ddp_timeout", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
        *("vllm_group_port", "vllm_gpu_memory_utilization"),
    ),
}
# What a resumed run may change: how long it trains, and how many problems are answered together at its end.
MAY_CHANGE = ("max_steps", "num_train_epochs", "per_device_eval_batch_size")
LENGTHS = ("max_steps", "num_train_epochs")


def flag_values(*groups: Any) -> dict[str, Any]:
    """The flags of argument groups that can change a number, as JSON values, in their order."""
    values = {entry.name: getattr(group, entry.name) for group in groups for entry in fields(group) if entry.init}
    return defining(values)


def defining(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags among `values` that can change a number, as JSON values."""
    left_out = {name for names in WITHOUT_EFFECT.values() for name in names}
    return {name: _plain(value) for name, value in values.items() if name not in left_out}


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
    """The flags; those that this overlay adds with the values in force, where the mode, the gate or ASLR has them."""
    told = checkpoint_info(training)
    learns, residual = "gating_training" in told, training.mode in RESIDUAL_MODES
    acts = {
        "gating_learning_rate": learns,
        "gating_warmup_steps": learns,
        "thinking_residual_gate_learning_rate": residual,
        "thinking_residual_lambda_learning_rate": residual,
        **{name: training.aslr_enabled is not False for name in ASLR_NUMBERS},
    }
    names = [entry.name for entry in fields(M3POArguments) if entry.name in told or acts.get(entry.name)]
    values = {name: _plain(told.get(name, getattr(training, name))) for name in names}
    if "gating_type" in values:  # what its gate has by default is no difference of its own
        gate, options = gate_class(values["gating_type"]), values["gating_config"]
        usual = gate.structure({}) | {name: options.get(name) for name in ("temperature", "debug")}
        values["gating_config"] = {name: value for name, value in options.items() if value != usual.get(name)}
        if values["cross_path_temp"] == gate.default_temperature:
            values["cross_path_temp"] = None
    values["aslr_enabled"] = bool(training.aslr_enabled)
    own = {entry.name for entry in fields(M3POArguments)}
    return {name: values.get(name, value) for name, value in flags.items() if name not in own or name in values}


def named_content(name: str) -> str:
    """A local file's name with the digest of its content; what is no file stays as it is."""
    path = Path(name)
    if not path.is_file():
        return name
    with path.open("rb") as content:
        return f"{name} (sha256 {hashlib.file_digest(content, 'sha256').hexdigest()[:16]})"


def named_text(name: str) -> str:
    """The text of a pretraining with the digest of what it reads: of a local file, or of the files of a package."""
    if not name.startswith(PYTHON):
        return named_content(name)
    digest = hashlib.sha256()
    for text in documents(name, None):
        digest.update(text.encode() + b"\0")
    return f"{name} (sha256 {digest.hexdigest()[:16]})"


def named_model(name: str, config: ModelConfig) -> str:
    """A local model's name with the digest of its weights and tokenizer; of the embedded one with its version.

    Raises:
        UserError: one of its files cannot be read.
    """
    if name == EMBEDDED_MODEL:
        return f"{name} (version {model_digest(config).removeprefix(name).strip()})"
    if not Path(name).exists():
        return name
    try:
        return f"{name} (sha256 {short_digest(model_digest(config))})"
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--model_name_or_path {name}: {one_line(error)}") from error


def short_digest(value: Any) -> str:
    """Sixteen digits that differ where JSON values do."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def difference(
    stored: Mapping[str, Any], now: Mapping[str, Any], besides: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first flag in which two runs differ, with the stored value and that of now; None if they are the same.

    A flag that only one of them knows says nothing: its mode or ASLR, which come first, or its version lacks it.

    Args:
        besides: flags that are not looked at.
    """
    for name, value in now.items():
        if name in stored and name not in besides and not _same(name, stored[name], value):
            return name, stored[name], value
    return None


def recorded_flags(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The flags in a run's `summary.json`; of one that has them not yet, its changed values over the defaults."""
    if "flags" in summary:
        return dict(summary["flags"])
    given = {}
    for entry in (entry for kind in (RunArguments, GRPOConfig, ModelConfig) for entry in fields(kind)):
        made = entry.default if entry.default_factory is MISSING else entry.default_factory()
        given[entry.name] = summary.get("config", {}).get(entry.name, _plain(made))
    told = ("mode", "seed", "aslr_enabled", "gating_type", "dataset", "num_eval_problems")
    given |= {name: summary[name] for name in told if summary.get(name) is not None}
    given["model_name_or_path"] = given["model_name_or_path"] or EMBEDDED_MODEL
    flags = with_acting(defining(given), SimpleNamespace(**given))
    for name in ("accelerator_config", "parallelism_config"):  # objects, of which such a summary says nothing
        del flags[name]
    engine = summary["engine"] if "engine_version" in summary else "trl"
    return {**flags, "engine": engine, "num_processes": summary.get("num_processes", 1)}


def parts_of(stored: Mapping[str, Any] | None, flags: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Which values of `MAY_CHANGE` held from which step on, for a run that goes on at `step` (0: that starts).

    Args:
        stored: what `read_run` found of it; None of a new run, or of one whose past is not known.
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


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """`run.json` of a checkpoint, or of its run folder if it was killed before it had one; None without."""
    return read_json(checkpoint / RUN_FILE) or read_json(checkpoint.parent / RUN_FILE)


def begin(run: Run, flags: Mapping[str, Any], resume: Path | None) -> dict[str, Any]:
    """Writes `run.json` into the folder of a run that starts, or goes on from a checkpoint; returns its content."""
    stored, step = (read_run(resume), int(resume.name.rpartition("-")[2])) if resume else (None, 0)
    content = {"flags": dict(flags), "parts": parts_of(stored, flags, step)}
    if run.training.process_index == 0:
        write_json(run.folder / RUN_FILE, content)
    return content


class KeepRun(TrainerCallback):
    """Writes `run.json` into every checkpoint."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RUN_FILE, self.content)


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a flag are the same: of files by their content, or by name where one has no digest."""
    told = [CONTENT.fullmatch(value) for value in (one, other)] if name in OF_FILES else [None, None]
    if all(told):
        return told[0][2] == told[1][2]  # type: ignore[index]
    one, other = (found[1] if found else value for found, value in zip(told, (one, other), strict=True))
    return one == other


def _plain(value: Any) -> Any:
    """A flag's value as JSON reads it back."""
    return json.loads(json.dumps(value, default=_text))


def _text(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
