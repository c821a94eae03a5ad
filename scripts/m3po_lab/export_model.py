# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as a model that stands alone: ``make export-model CHECKPOINT=runs/x/final OUT=dir``.

A LoRA adapter is merged into its base model, in float32 whatever dtype is written. `OUT` gets the weights as
safetensors, the tokenizer, the generation config, and `m3po.json` and `evaluation.json` of the checkpoint, once what
was written has been read again and computes what the checkpoint does.
Exit codes: 0 written, 2 a wrong input, a failing environment or another model than the checkpoint (one line says which;
nothing is written).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import shown_file
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import exit_code


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
        "--gating",
        default="on",
        choices=("on", "off"),
        help="keep a learnable gating function, or leave it out (default: on)",
    )
    return exit_code(lambda: export_and_say(parser.parse_args(argv)), "Stopped. Nothing is written.")


def export_and_say(options: argparse.Namespace) -> None:
    """Export, and say what was written and whether vLLM can serve it; the errors of `export`."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.evaluation.settings import SETTINGS_FILE, EvalSettings
    from m3po_lab.models.export import NOT_SERVABLE, SERVABLE, export

    EvalSettings.read(options.checkpoint)
    exported = export(
        options.checkpoint,
        options.out,
        options.dtype,
        aslr=options.aslr == "on",
        gating=options.gating == "on",
        beside=[SETTINGS_FILE],
    )
    print(exported.comparison)
    if exported.unknown:
        what, why = f"a checkpoint with {' and '.join(exported.unknown)}", "; ".join(exported.unknown.values())
    elif exported.mode in SERVABLE:
        what, why = "an ordinary checkpoint", ""
    else:
        what, why = "a checkpoint with its residual gate", ""
    print(f"written to {options.out}: {what}, {options.dtype}; trained in mode {exported.mode}")
    why = NOT_SERVABLE.get(exported.mode, why)
    if why:
        print(f"stock vLLM cannot serve it: {why}")
    else:
        print(f"stock vLLM can serve it (vllm serve {shown_file(options.out)}): {SERVABLE[exported.mode]}")
    if not exported.unknown:
        print(f"here, with make env EXTRA=vllm: bash scripts/serve.sh {shown_file(options.out)}")


if __name__ == "__main__":
    start(main)
