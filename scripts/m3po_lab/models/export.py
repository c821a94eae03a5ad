# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a model that stands alone: its adapter merged, and the result compared with the checkpoint."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.m3po import read_checkpoint_info, write_checkpoint_info
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.flags import has_aslr, has_residual_gate
from transformers.m3po.modules import ADDED_MODULES, ASLR, GATING, HYPER_CONNECTIONS
from trl import ModelConfig

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.core.files import check_writable
from m3po_lab.core.saving import obey_umask
from m3po_lab.models.export_check import Comparison, merged
from m3po_lab.models.loading import load_model

# Whether stock vLLM can serve a mode, and why: it decodes token embeddings, one path, on the plain architecture.
SERVABLE = {
    "none": "plain GRPO changes the weights only",
    "m3po": "its paths interact in training only; at inference it is plain, one path (M3PO paper, section 6)",
}
NOT_SERVABLE = {
    mode: "its soft thoughts stay on at inference, and vLLM feeds back the sampled token's embedding alone and has no "
    "residual gate; use scripts/serve.sh or model.generate of this overlay, or scripts/eval_gsm8k.sh"
    for mode in ("hrpo", "h3po")
}
# Why a model that keeps some modules cannot be served, whatever its mode.
MODULES_NOT_SERVABLE = {
    ASLR: "it has the modules of ASLR, which vLLM does not know; with ASLR=off they are left out, as they are when the "
    "checkpoint is evaluated",
    GATING: "it has a learnable gating function, which vLLM does not know and a single path does not use; with "
    "GATING=off it is left out, and with it the way to decode its groups",
    HYPER_CONNECTIONS: "it has hyper-connections, which vLLM does not know; use model.generate of this overlay",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        mode: of the checkpoint.
        unknown: what vLLM does not know of the model, each with why it cannot be served.
        comparison: how the model that was written compares with the checkpoint, in a line.
    """

    mode: str
    unknown: dict[str, str]
    comparison: str


def export(
    checkpoint: Path, out: Path, dtype: str, *, aslr: bool, gating: bool, beside: Sequence[str] = ()
) -> Exported:
    """Write a checkpoint to a new folder, whole or not at all.

    Args:
        checkpoint: folder of full weights or of an adapter, with `m3po.json`.
        out: the folder to make.
        dtype: of the weights.
        aslr: keep the modules of ASLR where the checkpoint has them.
        gating: keep a learnable gating function.
        beside: names of files that are copied from the checkpoint where it has them.

    Raises:
        UserError: the checkpoint is none of ours or of a mode that cannot stand alone, `out` is in use, or what was
            written computes something else.
    """
    try:
        hyperparameters = read_checkpoint_info(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"CHECKPOINT={checkpoint}: {one_line(error)}") from error
    mode, modes = hyperparameters["mode"], [*SERVABLE, *NOT_SERVABLE]
    if mode not in modes:
        raise UserError(f"CHECKPOINT={checkpoint}: mode {mode} is unknown; known: {', '.join(modes)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT={out} exists already: name a new folder.")
    check_writable(out, "OUT")
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(checkpoint), dtype="float32"))
    if has_residual_gate(model) != (mode in NOT_SERVABLE):
        has = "a" if has_residual_gate(model) else "no"
        raise UserError(f"CHECKPOINT={checkpoint} has {has} residual gate, which does not fit mode {mode}.")
    comparison = Comparison.of(model, tokenizer, aslr)
    plain = merged(model)
    comparison.check_merged(plain)
    for modules, keep in ((ASLR, aslr), (GATING, gating)):
        if modules.on(plain) and not keep:
            modules.remove(plain)
    if not has_aslr(plain):
        left_out = (ASLR.switch, *ASLR_HYPERPARAMETERS)
        hyperparameters = {name: value for name, value in hyperparameters.items() if name not in left_out}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for name, weight in plain.named_parameters():
            if not any(modules.among([name]) for modules in ADDED_MODULES):  # those are float32 in any model
                weight.data = weight.data.to(getattr(torch, dtype))
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        obey_umask(part)
        line = comparison.check_written(plain, part)
        write_checkpoint_info(part, hyperparameters)
        for name in beside:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, part / name)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    unknown = {modules.article: why for modules, why in MODULES_NOT_SERVABLE.items() if modules.on(plain)}
    return Exported(mode, unknown, line)
