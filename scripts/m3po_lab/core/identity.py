# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same run: `run.json`, in the run folder from its start and in each of its checkpoints.

It has every flag that can change a number of the run, as the run was started with it; of a local file or folder the
content counts and not its name. Resuming, sweeps and comparisons all go by this, so that none of them takes a run for
another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m3po_lab.core.files import read_json, write_json

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
        *(
            "blend_kl_steps",
            "disable_tqdm",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "log_completions",
            "log_multimodal",
        ),
        *("log_completions_hub_repo", "log_unique_prompts", "num_completions_to_print", "skip_memory_metrics"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        *("hub_revision", "debug", "include_num_input_tokens_seen", "blend_kl_steps"),
    ),
    "the rows come in their order, however they are fetched": (
        *("shuffle_dataset", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    ),
    "which study the run is for, and what is sampled behind its end": (
        *("study", "num_eval_paths", "num_sampled_problems"),
    ),
    "no code here reads them": ("do_train", "do_eval", "do_predict", "local_rank"),
    "how long one waits, and where a server is": (
        *("ddp_timeout", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
        *("vllm_group_port", "vllm_gpu_memory_utilization"),
    ),
}


def flag_values(*groups: Any) -> dict[str, Any]:
    """The flags of argument groups that can change a number, as JSON values, in their order."""
    values = {entry.name: getattr(group, entry.name) for group in groups for entry in fields(group) if entry.init}
    return defining(values)


def defining(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags among `values` that can change a number, as JSON values."""
    left_out = {name for names in WITHOUT_EFFECT.values() for name in names}
    return {name: as_json(value) for name, value in values.items() if name not in left_out}


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


def named_content(name: str) -> str:
    """A local file's name with the digest of its content; what is no file stays as it is."""
    path = Path(name)
    if not path.is_file():
        return name
    with path.open("rb") as content:
        return f"{name} (sha256 {hashlib.file_digest(content, 'sha256').hexdigest()[:16]})"


def short_digest(value: Any) -> str:
    """Sixteen digits that differ where JSON values do."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(variant: str, seed: int) -> str:
    """The name of a run's folder, from that of its variant; other characters than a path likes are replaced."""
    plain = variant.replace(":", "-").replace(" ", "-").replace("=", "-")
    safe = re.sub(r"[^\w.+-]", "_", plain, flags=re.ASCII)
    return f"{safe}{'' if safe == plain else f'-{short_digest(variant)[:8]}'}-seed{seed}"


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """`run.json` of a checkpoint, or of its run folder if it was killed before it had one; None without."""
    return read_json(checkpoint / RUN_FILE) or read_json(checkpoint.parent / RUN_FILE)


class SaveRunFile(TrainerCallback):
    """Writes `run.json` into every checkpoint."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RUN_FILE, self.content)


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a flag are the same: of files by their content, or by name where one has no digest."""
    matches = [CONTENT.fullmatch(value) for value in (one, other)] if name in OF_FILES else [None, None]
    if all(matches):
        return matches[0][2] == matches[1][2]  # type: ignore[index]
    one, other = (match[1] if match else value for match, value in zip(matches, (one, other), strict=True))
    return one == other


def as_json(value: Any) -> Any:
    """A flag's value as JSON reads it back."""
    return json.loads(json.dumps(value, default=_text))


def _text(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
