# SPDX-License-Identifier: Apache-2.0
"""Serve a checkpoint: ``bash scripts/serve.sh CHECKPOINT [flag of vllm serve ...]``.

vLLM's OpenAI-compatible server, with our plugin where the mode of the checkpoint's `m3po.json` thinks: every request
does then, the `n` paths of one as a group where the mode has peers; `"vllm_xargs": {"m3po_paths": 0}` makes one plain.
Exit codes: those of the server, or 2 for a wrong input or a failing environment (one line says which).
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import UserError, exit_code, one_line
from m3po_lab.core.files import read_json

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for a package vllm, which the CPU build has not


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as command-line words say (those of the process by default): this process becomes the server."""
    parser = OneLineFlags(
        prog="bash scripts/serve.sh",
        usage="bash scripts/serve.sh CHECKPOINT [flag of vllm serve ...]",
        description="Serve a checkpoint by vLLM, thinking as its mode does.",
    )
    parser.add_argument("checkpoint", type=Path, help="the folder of a checkpoint with full weights")

    def serve() -> None:
        options, flags = parser.parse_known_args(argv)
        if find_spec("vllm") is None:
            raise UserError("the server is vLLM's, which is not installed: make env EXTRA=vllm.")
        words = ["--model", str(options.checkpoint), *server_flags(options.checkpoint), *flags]
        print(f"python -m {SERVER} {shlex.join(words)}", flush=True)
        # The runner whose hooks the plugin has; without the other most of a CPU's memory would have to be free.
        own = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
        os.execve(sys.executable, [sys.executable, "-m", SERVER, *words], own)

    return exit_code(serve, "Stopped.")


def server_flags(folder: Path) -> list[str]:
    """The flags that make vLLM think as a checkpoint does; without a GPU, those that make it start in seconds too.

    Raises:
        UserError: the folder is no checkpoint that vLLM can serve.
    """
    import torch
    from m3po_vllm import engine_arguments
    from transformers.m3po.flags import ADD_A_FAMILY

    from m3po_lab.evaluation.checkpoint import Checkpoint

    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is a LoRA adapter; merge it first: make export-model CHECKPOINT={folder} OUT=DIR, and serve DIR."
        )
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} has no config.json: give the folder of a checkpoint, e.g. runs/X/final.")
    for switch, noun in (("aslr_enabled", "ASLR"), ("mhc_enabled", "hyper-connections")):
        if config.get(switch):
            mend = " (make export-model ... ASLR=off leaves it out)" if noun == "ASLR" else ""
            raise UserError(f"{folder} has {noun}, which vLLM's forward has not{mend}.")
    checkpoint = Checkpoint.read(str(folder), {})
    common: dict[str, Any] = {"dtype": config.get("dtype") or "auto"}  # vLLM would take bfloat16 for float32
    if not torch.cuda.is_available():
        common["enforce_eager"] = True  # its compiler takes minutes on a CPU
    if checkpoint.settings is None:
        return _words(common)
    try:
        arguments = engine_arguments(
            checkpoint.settings.hyperparameters(),
            next(iter(config["architectures"])),
            sampling_temperature=checkpoint.sampling_temperature,
            every_request=True,
        )
    except ValueError as error:
        raise UserError(f"{folder}: {one_line(error)} ({ADD_A_FAMILY})") from error
    # What a model's own generation config cuts off a distribution would be refused in every request. One that says no
    # temperature has that of the training.
    temperature = {"temperature": checkpoint.sampling_temperature}
    return _words({**common, **arguments, "generation_config": "vllm", "override_generation_config": temperature})


def _words(arguments: dict[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as words of `vllm serve`."""
    words = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *value]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


if __name__ == "__main__":
    start(main)
