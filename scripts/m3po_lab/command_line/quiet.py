# SPDX-License-Identifier: Apache-2.0
"""Messages of libraries that say nothing about a run, kept off the terminal and the net.

Each one is named; anything else a library has to say is shown.
"""

import logging
import os
import warnings


def silence_known_noise() -> None:
    """Let known chatterers report errors only, and show no bars for reading and writing weights.

    To be called before the libraries are imported: some speak then, or read these variables.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a command sends nothing anywhere
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning at a fork
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a hundred lines on an engine at its start
    for name in (
        "torchao",
        "bitsandbytes.backends.cpu.ops",  # which of its parts a CPU lacks
        "torch.utils._pytree",
        "trl.trainer.m3po.rollouts",  # says the mode and its numbers, which the start line of a run says too
        "lm_eval",  # what it would change is refused in evaluation/model.py
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar  # its import is when the first of them speak

    disable_progress_bar()  # that of the training is not one of these
    # A dependency of reasoning-gym compares with `is`; Python says so when it first compiles the file.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*cellpylib")
    # Each time it asks whether vLLM is there; the plugin is tested with the pinned one.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils.*")
