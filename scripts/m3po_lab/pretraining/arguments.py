# SPDX-License-Identifier: Apache-2.0
"""The arguments of a pretraining run, and whether a folder has the run that they define."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.m3po.hyper_connections.settings import MHC_DEFAULTS, check_mhc_hyperparameters
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from m3po_lab.command_line.idle_flags import check_idle
from m3po_lab.command_line.parser import (
    UNSET_OUTPUT_DIR,
    OneLineParser,
    check_unknown,
    one_line_errors,
    parse_mapping,
    read_keys,
)
from m3po_lab.command_line.training_checks import check_training
from m3po_lab.core.config_files import OF_PRETRAINING, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import read_json, shown_path
from m3po_lab.core.identity import RUN_FILE, difference, flag_values
from m3po_lab.models.digest import named_model
from m3po_lab.pretraining.data import named_text
from m3po_lab.problems.data import GYM_PREFIX

DEFAULT_MHC_CONFIG = "configs/mhc_small.yaml"


@dataclass
class PretrainArguments:
    """The text, the size of the model and its hyper-connections."""

    dataset: str = field(
        default="python:sympy",
        metadata={
            "help": "'python:<package>' (the files of an installed package), 'reasoning-gym:<task>' (solved problems, "
            "without end), a .jsonl with 'text', or a Hub id."
        },
    )
    dataset_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the reasoning-gym task as JSON or YAML, or the configuration of a Hub dataset."},
    )
    tokenizer: str = field(default="bytes", metadata={"help": "'bytes', or a byte-level BPE: a folder or a Hub id."})
    validation_rows: int = field(default=64, metadata={"help": "Rows of max_seq_len tokens for bits per byte."})
    depth: int = field(default=4, metadata={"help": "The number of layers."})
    model_dim: int = field(default=128, metadata={"help": "Hidden size; the MLP has four times as much."})
    num_heads: int = field(default=2, metadata={"help": "The number of attention heads."})
    max_seq_len: int = field(default=256, metadata={"help": "The number of tokens of a row."})
    nanochat_init: bool = field(
        default=True,
        metadata={"help": "Begin as nanochat does: output projections 0, embeddings N(0, 1). Else as Transformers."},
    )
    mhc_enabled: bool = field(default=False, metadata={"help": "Hyper-connections in place of the residual adds."})
    mhc_num_streams: int = field(
        default=MHC_DEFAULTS["mhc_num_streams"], metadata={"help": "S, the number of streams."}
    )
    mhc_sinkhorn_iters: int = field(
        default=MHC_DEFAULTS["mhc_sinkhorn_iters"], metadata={"help": "The rounds of the Sinkhorn iteration."}
    )
    mhc_sinkhorn_tau: float = field(
        default=MHC_DEFAULTS["mhc_sinkhorn_tau"], metadata={"help": "The temperature of the Sinkhorn iteration."}
    )
    mhc_residual: str = field(
        default=MHC_DEFAULTS["mhc_residual"],
        metadata={"help": "How H_res is made doubly stochastic: 'sinkhorn' or 'birkhoff'."},
    )
    mhc_alpha: float = field(
        default=MHC_DEFAULTS["mhc_alpha"], metadata={"help": "The scale that the dynamic part starts with."}
    )
    mhc_diagonal_bias: float = field(
        default=MHC_DEFAULTS["mhc_diagonal_bias"],
        metadata={"help": "How much H_res leans to the identity at the start."},
    )
    mhc_gate_noise: float = field(
        default=MHC_DEFAULTS["mhc_gate_noise"], metadata={"help": "Probability of a random routing gate for a row."}
    )

    def __post_init__(self) -> None:
        if self.dataset.startswith(GYM_PREFIX):
            self.dataset_config = parse_mapping("dataset_config", self.dataset_config)
        elif isinstance(self.dataset_config, dict):
            raise UserError(f"--dataset_config {self.dataset_config}: of {self.dataset} it is a name, not a mapping.")


@dataclass
class Pretraining:
    """One parsed command."""

    script: PretrainArguments
    training: TrainingArguments
    config_file: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training.output_dir)

    @property
    def variant(self) -> str:
        """`mhc`, or `baseline`."""
        return "mhc" if self.script.mhc_enabled else "baseline"


def parse(argv: list[str]) -> Pretraining:
    """Read ``[X.yaml] [--flag value ...]``; the folder is ``runs/<config>/<variant>-seed<seed>`` by default.

    Raises:
        UserError: for anything that cannot be read or is unknown.
    """
    config_name, rest = split_config(argv)
    file = find_config(config_name or DEFAULT_MHC_CONFIG, begins=OF_PRETRAINING)
    parser = OneLineParser(PretrainArguments, TrainingArguments)
    with one_line_errors(file):
        script, training, in_yaml, unknown = parser.parse_args_and_config(
            ["--config", str(file), *rest], return_remaining_strings=True, separate_remaining_strings=True
        )
    check_unknown(parser, in_yaml, unknown, file)
    if training.max_steps <= 0:
        raise UserError(f"--max_steps {training.max_steps}: it must be at least 1, so that both runs see as much text.")
    try:
        check_mhc_hyperparameters(MHC_DEFAULTS | mhc_numbers(script))
    except ValueError as error:
        raise UserError(f"--{one_line(error)}") from error
    if script.model_dim % (2 * script.num_heads):
        raise UserError(
            f"--model_dim {script.model_dim}: it must be a multiple of 2 * num_heads = {2 * script.num_heads}, so that "
            "each head is even."
        )
    check_idle((script, training), rest, read_keys(file))
    check_training(training)
    run = Pretraining(script, training, file)
    if training.output_dir == UNSET_OUTPUT_DIR:
        training.output_dir = str(PROJECT_ROOT / "runs" / file.stem / f"{run.variant}-seed{training.seed}")
    return run


def of_pretraining(run: Pretraining) -> dict[str, Any]:
    """The flags that define a run of pretraining, by name."""
    script = run.script
    return {
        **flag_values(script, run.training),
        "dataset": named_text(script.dataset),
        "tokenizer": named_model(script.tokenizer, ModelConfig(model_name_or_path=script.tokenizer)),
        "num_processes": run.training.world_size,
    }


def check_folder(run: Pretraining) -> None:
    """Refuse a folder with another run in it, finished or stopped.

    Raises:
        UserError: it names the first flag that differs, with both values.
    """
    result = read_json(run.folder / "result.json")
    if result is None and (not run.folder.is_dir() or get_last_checkpoint(run.folder) is None):
        return
    recorded = read_json(run.folder / RUN_FILE)
    stored = recorded["flags"] if recorded else {**result["script"], "max_steps": result["max_steps"]} if result else {}
    differing = difference(stored, of_pretraining(run))
    if differing is not None:
        name, before, now = differing
        raise UserError(
            f"--{name} {now}: {shown_path(run.folder)} has a run with {before}; set that, or give another --output_dir."
        )
    if recorded is None and run.training.process_index == 0:
        print(
            f"{shown_path(run.folder)} has no {RUN_FILE}: whether "
            f"{'all' if result is None else 'the other'} flags are those of this run could not be compared"
        )


def mhc_numbers(script: PretrainArguments) -> dict[str, Any]:
    """The numbers of the hyper-connections that have a flag here."""
    return {name: getattr(script, name) for name in MHC_DEFAULTS if hasattr(script, name)}
