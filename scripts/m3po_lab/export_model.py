# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as a model that stands alone: ``make export-model CHECKPOINT=runs/x/final OUT=dir``.

A LoRA adapter is merged into its base model, in float32 whatever dtype is written. `OUT` gets the weights as
safetensors, the tokenizer, the generation config, and `m3po.json` and `evaluation.json` of the checkpoint, once what
was written has been read again and computes what the checkpoint does.
Exit codes: 0 written, 2 a wrong input, a failing environment or another model than the checkpoint (one line says which;
nothing is written).
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.entry import start
from m3po_lab.core.errors import OneLineFlags, exit_code

# Whether stock vLLM can serve a mode, and why: it decodes token embeddings, one path, on the plain architecture.
SERVABLE = {
    "none": "plain GRPO changes the weights only",
    "m3po": "its paths interact in training only; at inference it is plain, one path (M3PO paper, section 6)",
}
NOT_SERVABLE = {
    mode: "its soft thoughts stay on at inference, and vLLM feeds back the sampled token's embedding alone and has no "
    "residual gate; use model.generate of this overlay, or scripts/eval_gsm8k.sh"
    for mode in ("hrpo", "h3po")
}


# Why a model that keeps the modules of ASLR cannot be served, whatever its mode.
ASLR_NOT_SERVABLE = (
    "it has the modules of ASLR, which vLLM does not know; with ASLR=off they are left out, as they are when the "
    "checkpoint is evaluated"
)


GATING_NOT_SERVABLE = (
    "it has a learnable gate, which vLLM does not know and a single path does not use; with GATING=off it is left out, "
    "and with it the way to decode its groups"
)


MHC_NOT_SERVABLE = "it has hyper-connections, which vLLM does not know; use model.generate of this overlay"


def export(checkpoint: Path, out: Path, dtype: str, aslr: bool, gating: bool) -> tuple[str, dict[str, str], str]:
    """Write `checkpoint` to `out`, whole or not at all.

    With `aslr` the modules of ASLR are kept where the checkpoint has them, with `gating` a learnable gate.

    Returns:
        Its mode; what vLLM does not know of it, with why; how the written model compares with it.

    Raises:
        UserError: the checkpoint is none of ours or of a mode that cannot stand alone, `out` is in use, or what was
            written computes something else.
    """
    import torch
    from transformers.m3po import read_checkpoint_info, write_checkpoint_info
    from transformers.m3po.aslr.settings import ASLR_NUMBERS
    from transformers.m3po.flags import has_aslr, has_residual_gate
    from transformers.m3po.modules import ASLR, GATING, HYPER_CONNECTIONS, OWN_MODULES
    from trl import ModelConfig

    from m3po_lab.core.files import check_writable
    from m3po_lab.core.saving import obey_umask
    from m3po_lab.evaluation.settings import EvalSettings
    from m3po_lab.grpo.config import UserError, one_line
    from m3po_lab.models.export_check import Comparison, merged
    from m3po_lab.models.loading import load_model

    try:
        numbers = read_checkpoint_info(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"CHECKPOINT={checkpoint}: {one_line(error)}") from error
    known = [*SERVABLE, *NOT_SERVABLE]
    if numbers["mode"] not in known:
        raise UserError(f"CHECKPOINT={checkpoint}: mode {numbers['mode']} is unknown; known: {', '.join(known)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT={out} exists already: name a new folder.")
    check_writable(out, "OUT")
    settings = EvalSettings.read(checkpoint)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(checkpoint), dtype="float32"))
    if has_residual_gate(model) != (numbers["mode"] in NOT_SERVABLE):
        has = "a" if has_residual_gate(model) else "no"
        raise UserError(f"CHECKPOINT={checkpoint} has {has} residual gate, which does not fit mode {numbers['mode']}.")
    comparison = Comparison.of(model, tokenizer, aslr)
    plain = merged(model)
    comparison.check_merged(plain)
    for own, keep in ((ASLR, aslr), (GATING, gating)):
        if own.on(plain) and not keep:
            for name in own.names:
                delattr(plain.base_model, name)
            setattr(plain.config, own.switch, False)
    if not has_aslr(plain):
        numbers = {name: value for name, value in numbers.items() if name not in (ASLR.switch, *ASLR_NUMBERS)}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for name, weight in plain.named_parameters():
            if not any(own.among([name]) for own in OWN_MODULES):  # those are float32 in any model
                weight.data = weight.data.to(getattr(torch, dtype))
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        obey_umask(part)
        found = comparison.check_written(plain, part)
        write_checkpoint_info(part, numbers)
        if settings is not None:
            settings.write(part)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    unknown = {ASLR: ASLR_NOT_SERVABLE, GATING: GATING_NOT_SERVABLE, HYPER_CONNECTIONS: MHC_NOT_SERVABLE}
    return str(numbers["mode"]), {own.article: why for own, why in unknown.items() if own.on(plain)}, found


def main(argv: Sequence[str] | None = None) -> int:
    """Export as command-line words say (those of the process by default); returns the exit code."""
    parser = OneLineFlags(prog="m3po_lab.export_model", description="Write a standalone model.")
    parser.add_argument("checkpoint", type=Path, help="folder of full weights or of a LoRA adapter, with m3po.json")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument(
        "--aslr", default="on", choices=("on", "off"), help="keep the modules of ASLR, or leave them out (default: on)"
    )
    parser.add_argument(
        "--gating", default="on", choices=("on", "off"), help="keep a learnable gate, or leave it out (default: on)"
    )
    return exit_code(lambda: export_and_say(parser.parse_args(argv)), "Stopped. Nothing is written.")


def export_and_say(given: argparse.Namespace) -> None:
    """Export, and say what was written and whether vLLM can serve it; the errors of `export`."""
    from m3po_lab.command_line.commands import shown_file
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    asked = given.dtype, given.aslr == "on", given.gating == "on"
    mode, unknown, found = export(given.checkpoint, given.out, *asked)
    print(found)
    if unknown:
        print(
            f"written to {given.out}: a checkpoint with {' and '.join(unknown)}, {given.dtype}; trained in mode {mode}"
        )
        print(f"stock vLLM cannot serve it: {NOT_SERVABLE.get(mode) or '; '.join(unknown.values())}")
    elif mode in SERVABLE:
        print(f"written to {given.out}: an ordinary checkpoint, {given.dtype}; trained in mode {mode}")
        print(f"stock vLLM can serve it (vllm serve {shown_file(given.out)}): {SERVABLE[mode]}")
    else:
        print(f"written to {given.out}: a checkpoint with its residual gate, {given.dtype}; trained in mode {mode}")
        print(f"stock vLLM cannot serve it: {NOT_SERVABLE[mode]}")


if __name__ == "__main__":
    start(main)
