# SPDX-License-Identifier: Apache-2.0
"""One pretraining run of a NanoChat, with hyper-connections or without, by Transformers' Trainer.

A run that was stopped goes on from its last checkpoint; a finished one has `result.json` and is not run again.
"""

from __future__ import annotations

import dataclasses
import time
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.report import full_report
from transformers.trainer_utils import get_last_checkpoint

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.core.files import check_writable, read_json, shown_path, write_json
from m3po_lab.core.identity import RUN_FILE, SaveRunFile
from m3po_lab.core.observe import unchanged
from m3po_lab.core.provenance import git_state
from m3po_lab.core.saving import ObeyUmask, save_model
from m3po_lab.pretraining.arguments import Pretraining, check_folder, of_pretraining
from m3po_lab.pretraining.data import load_text, load_tokenizer
from m3po_lab.pretraining.measures import matrices_of, nats_of_rows, peak_bytes, summary
from m3po_lab.pretraining.model import describe, make_model

KEY = "eval_bits_per_byte"  # in Trainer's log
REPORTED_ROWS = 4  # validation rows on which the routing matrices and the effect of the routing gate are measured


class PretrainingTrainer(Trainer):
    """Transformers' Trainer, but for evaluations that leave the model and the random generators as they were.

    Its own draw from torch's generator, and with `mhc_gate_noise` the training would depend on how often it evaluates.
    """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        with unchanged(self.model):
            return super().evaluate(*args, **kwargs)


class Watch(TrainerCallback):
    """Seconds of each step, and what the hyper-connections do at each evaluation, in the log as `mhc/...`."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.seconds: list[float] = []
        self.trainer: Trainer | None = None
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not has_hyper_connections(model):
            return
        report = full_report(model, {name: value.to(model.device) for name, value in self.inputs.items()})
        self.trainer.log({f"mhc/{name}": value for name, value in summary(report).items()})


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
        compute_metrics=lambda output: {"bits_per_byte": float(output.predictions.sum()) / bits},
        callbacks=[watch, SaveRunFile({"flags": flags}), ObeyUmask()],
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
