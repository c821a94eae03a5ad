# SPDX-License-Identifier: Apache-2.0
"""One pretraining run of a NanoChat, with hyper-connections or without, by Transformers' Trainer.

A run that was stopped goes on from its last checkpoint; a finished one has `result.json` and is not run again.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import NanoChatConfig, NanoChatForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.report import full_report, mean_matrices
from transformers.m3po.hyper_connections.settings import MHC_DEFAULTS, check_mhc_numbers
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from m3po_lab.command_line.training_checks import check_training
from m3po_lab.core.errors import OF_PRETRAINING, PROJECT_ROOT, UserError, find_config, one_line, split_config
from m3po_lab.core.files import check_writable, read_json, shown_path, write_json
from m3po_lab.core.observe import unchanged
from m3po_lab.core.provenance import git_state
from m3po_lab.core.saving import ObeyUmask, save_model
from m3po_lab.grpo.config import UNSET_OUTPUT_DIR, OneLineParser, check_unknown, one_line_errors, read_keys
from m3po_lab.grpo.identity import RUN_FILE, KeepRun, difference, flag_values, named_model, named_text
from m3po_lab.grpo.idle_flags import check_idle
from m3po_lab.pretraining.data import UNSCORED, load_text, load_tokenizer

DEFAULT_MHC_CONFIG = "configs/mhc_small.yaml"
KEY = "eval_bits_per_byte"  # in Trainer's log
REPORTED_ROWS = 4  # validation rows on which H_res and the gate are looked at


@dataclass
class PretrainArguments:
    """The text, the size of the model and its hyper-connections; names as in seed 5."""

    dataset: str = field(
        default="python:sympy",
        metadata={"help": "'python:<package>' (the files of an installed package), a .jsonl with 'text', or a Hub id."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Of a dataset of the Hub."})
    tokenizer: str = field(default="bytes", metadata={"help": "'bytes', or a byte-level BPE: a folder or a Hub id."})
    validation_rows: int = field(default=64, metadata={"help": "Rows of max_seq_len tokens for bits per byte."})
    depth: int = field(default=4, metadata={"help": "Layers."})
    model_dim: int = field(default=128, metadata={"help": "Hidden size; the MLP has four times as much."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads."})
    max_seq_len: int = field(default=256, metadata={"help": "Tokens of a row."})
    nanochat_init: bool = field(
        default=True,
        metadata={"help": "Begin as nanochat does: output projections 0, embeddings N(0, 1). Else as Transformers."},
    )
    mhc_enabled: bool = field(default=False, metadata={"help": "Hyper-connections in place of the residual adds."})
    mhc_num_streams: int = field(default=MHC_DEFAULTS["mhc_num_streams"], metadata={"help": "S, the streams."})
    mhc_sinkhorn_iters: int = field(default=MHC_DEFAULTS["mhc_sinkhorn_iters"], metadata={"help": "Its rounds."})
    mhc_sinkhorn_tau: float = field(default=MHC_DEFAULTS["mhc_sinkhorn_tau"], metadata={"help": "Its temperature."})
    mhc_residual: str = field(default=MHC_DEFAULTS["mhc_residual"], metadata={"help": "'sinkhorn' or 'birkhoff'."})
    mhc_alpha: float = field(default=MHC_DEFAULTS["mhc_alpha"], metadata={"help": "Start of the dynamic part's scale."})
    mhc_diagonal_bias: float = field(
        default=MHC_DEFAULTS["mhc_diagonal_bias"], metadata={"help": "How much H_res leans to the identity at first."}
    )
    mhc_gate_noise: float = field(
        default=MHC_DEFAULTS["mhc_gate_noise"], metadata={"help": "Probability of a random routing gate for a row."}
    )


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
    """Read ``[X.yaml] [--flag value ...]``; the folder is ``runs/<config>/<variant>-seed<seed>`` if none is given.

    Raises:
        UserError: for anything that cannot be read or is unknown.
    """
    given, rest = split_config(argv)
    file = find_config(given or DEFAULT_MHC_CONFIG, begins=OF_PRETRAINING)
    parser = OneLineParser(PretrainArguments, TrainingArguments)
    with one_line_errors(file):
        script, training, in_yaml, unknown = parser.parse_args_and_config(
            ["--config", str(file), *rest], return_remaining_strings=True, separate_remaining_strings=True
        )
    check_unknown(parser, in_yaml, unknown, file)
    if training.max_steps <= 0:
        raise UserError(f"--max_steps {training.max_steps}: it must be at least 1, so that both runs see as much text.")
    try:
        check_mhc_numbers(MHC_DEFAULTS | mhc_numbers(script))
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
    told = read_json(run.folder / RUN_FILE)
    stored = told["flags"] if told else {**result["script"], "max_steps": result["max_steps"]} if result else {}
    differing = difference(stored, of_pretraining(run))
    if differing is not None:
        name, before, now = differing
        raise UserError(
            f"--{name} {now}: {shown_path(run.folder)} has a run with {before}; set that, or give another --output_dir."
        )
    if told is None and run.training.process_index == 0:
        print(
            f"{shown_path(run.folder)} has no {RUN_FILE}: whether "
            f"{'all' if result is None else 'the other'} flags are those of this run could not be compared"
        )


def mhc_numbers(script: PretrainArguments) -> dict[str, Any]:
    """The numbers of the hyper-connections that have a flag here."""
    return {name: getattr(script, name) for name in MHC_DEFAULTS if hasattr(script, name)}


def make_model(script: PretrainArguments, vocabulary: int, tokenizer: Any) -> NanoChatForCausalLM:
    """A fresh NanoChat; the weights besides those of mHC are the same for the same torch seed, with it or without."""
    config = NanoChatConfig(
        vocab_size=vocabulary,
        hidden_size=script.model_dim,
        intermediate_size=4 * script.model_dim,
        num_hidden_layers=script.depth,
        num_attention_heads=script.num_heads,
        max_position_embeddings=script.max_seq_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"mhc_enabled": True, **mhc_numbers(script)} if script.mhc_enabled else {}),
    )
    model = NanoChatForCausalLM(config)
    if script.nanochat_init:
        start_as_nanochat(model)
    return model


@torch.no_grad()
def start_as_nanochat(model: NanoChatForCausalLM) -> None:
    """nanochat's own start (gpt.py of January 2026), in place.

    Embeddings N(0, 1), head N(0, 0.001), matrices uniform in ±sqrt(3 / H), output projections 0: at the first step
    every layer is the identity, with hyper-connections and without. Drawn from a generator of its own, with torch's
    seed.
    """
    bound = (3.0 / model.config.hidden_size) ** 0.5
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    model.model.embed_tokens.weight.normal_(0, 1, generator=generator)
    model.lm_head.weight.normal_(0, 0.001, generator=generator)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            module.weight.uniform_(-bound, bound, generator=generator)
        for module in (attention.o_proj, mlp.fc2):
            module.weight.zero_()


def nats_of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each row's scored tokens: logits (B, T, V) and labels (B, T) -> (B)."""
    if isinstance(logits, tuple):
        logits = logits[0]
    shifted, targets = logits[:, :-1].float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        shifted.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    return losses.view(targets.shape).sum(1)


class PretrainingTrainer(Trainer):
    """Transformers' Trainer, but for evaluations that leave the model and the random generators as they were.

    Its own draw from torch's generator, and with `mhc_gate_noise` the training would depend on how often it evaluates.
    """

    def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        with unchanged(self.model):
            return super().evaluate(*given, **more)


class Watch(TrainerCallback):
    """Seconds of each step, and what the hyper-connections do at each evaluation, in the log as `mhc/...`."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.seconds: list[float] = []
        self.trainer: Trainer | None = None
        self._start = 0.0

    def on_step_begin(self, *given: Any, **more: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *given: Any, **more: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def on_evaluate(self, *given: Any, **more: Any) -> None:
        if self.trainer is None:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not has_hyper_connections(model):
            return
        report = full_report(model, {name: value.to(model.device) for name, value in self.inputs.items()})
        self.trainer.log({f"mhc/{name}": value for name, value in summary(report).items()})


def summary(report: dict[str, Any]) -> dict[str, float]:
    """A report on all sublayers in one number each: the largest error, the means of the others."""
    parts = list(report["sublayers"].values())
    found = {name: max(part[name] for part in parts) for name in ("row_error", "column_error")}
    for name in ("from_start", "from_identity", "stream_cosine"):
        found[name] = sum(part[name] for part in parts) / len(parts)
    return {
        **found,
        "composite_gain": max(report["composite_gain_rows"], report["composite_gain_columns"]),
        "gate_effect": report["gate_effect"],
    }


def peak_bytes() -> int:
    """Of this process: the most memory on the GPU, or in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_pretraining(run: Pretraining) -> None:
    """Train, or go on, and write `result.json` and the model.

    Raises:
        UserError: for a wrong input, before anything is trained.
    """
    check_writable(run.folder)
    check_folder(run)
    result = run.folder / "result.json"
    if read_json(result) is not None:
        print(f"{shown_path(run.folder)}: done before")
        return
    script, training, flags = run.script, run.training, of_pretraining(run)
    tokenizer = load_tokenizer(script.tokenizer)
    a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    text, held_out = load_text(
        script.dataset,
        script.dataset_config,
        tokenizer,
        script.max_seq_len,
        script.validation_rows,
        training.max_steps * a_step,
    )
    torch.manual_seed(training.seed)
    vocabulary = -(-len(tokenizer) // 64) * 64  # as nanochat pads it
    model = make_model(script, vocabulary, tokenizer)
    watch = Watch({"input_ids": held_out.rows[:REPORTED_ROWS]})
    bits = held_out.scored_bytes * torch.log(torch.tensor(2.0)).item()
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=text,
        eval_dataset=held_out,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=nats_of_rows,
        compute_metrics=lambda found: {"bits_per_byte": float(found.predictions.sum()) / bits},
        callbacks=[watch, KeepRun({"flags": flags}), ObeyUmask()],
    )
    watch.trainer = trainer
    first = matrices_of(model, watch.inputs)
    if trainer.is_world_process_zero():
        write_json(run.folder / RUN_FILE, {"flags": flags})
        print(f"{run.variant}, seed {training.seed}: {describe(model, script)} into {shown_path(run.folder)}")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run.folder) if run.folder.is_dir() else None)
    final = trainer.evaluate()
    save_model(trainer, run.folder / "final")
    commit, dirty = git_state(PROJECT_ROOT)
    net = trainer.accelerator.unwrap_model(trainer.model)
    parts = {name: value.numel() for name, value in net.named_parameters()}
    inputs = {name: value.to(net.device) for name, value in watch.inputs.items()}
    report = full_report(net, inputs) if script.mhc_enabled else None
    history = trainer.state.log_history
    written = {
        "variant": run.variant,
        "seed": training.seed,
        "bits_per_byte": final[KEY],
        "curve": sorted({row["step"]: row[KEY] for row in history if KEY in row}.items()),
        "loss_curve": sorted({row["step"]: row["loss"] for row in history if "loss" in row}.items()),
        "parameters": sum(parts.values()),
        "mhc_parameters": sum(count for name, count in parts.items() if ".mhc_" in name),
        "tokens_per_second": a_step * script.max_seq_len / median(watch.seconds) if watch.seconds else None,
        "steps_timed": len(watch.seconds),
        "peak_bytes": peak_bytes(),
        "report": report,
        "matrices": matrices_of(net, inputs),
        "first_matrices": first,
        "flags": flags,
        "script": dataclasses.asdict(script),
        "max_steps": training.max_steps,
        "tokens_per_step": a_step * script.max_seq_len,
        "git_commit": commit,
        "git_dirty": dirty,
        "device": str(trainer.accelerator.device),
        "torch": torch.__version__,
    }
    if trainer.is_world_process_zero():
        write_json(result, written)
        for line in report["verdicts"] if report else ():
            print(f"WARNING: {line}")


def matrices_of(model: NanoChatForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, list[list[float]]] | None:
    """`mean_matrices` for a file; None for the baseline."""
    if not has_hyper_connections(model):
        return None
    return {name: matrix.tolist() for name, matrix in mean_matrices(model, inputs).items()}


def describe(model: NanoChatForCausalLM, script: PretrainArguments) -> str:
    """The model in a few words."""
    count = sum(value.numel() for value in model.parameters())
    streams = f", {script.mhc_num_streams} streams by {script.mhc_residual}" if script.mhc_enabled else ""
    return f"NanoChat of {script.depth} layers, {count / 1e6:.2f} M parameters{streams}, on {script.dataset}"
