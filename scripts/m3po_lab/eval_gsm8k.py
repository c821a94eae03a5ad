# SPDX-License-Identifier: Apache-2.0
"""Entry point of an evaluation: ``bash scripts/eval_gsm8k.sh [checkpoint or model] [--flag value ...]``.

Exit codes: 0 done, 2 a wrong input or a failing environment (one line says which), 130 interrupted by Ctrl-C.
The libraries are imported inside `main`, after the environment variables that they read at import are set.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import exit_code


def _truth(word: str) -> bool:
    """true or false, as flags of a training say it."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word} is neither true nor false")
    return word.lower() == "true"


def _temperature(word: str) -> float | str:
    """A number, or the one word that a temperature may be."""
    return word if word == "match" else float(word)


ROUNDS = "aslr_max_iterations"
CROSS_PATH = "of a model without m3po.json, with --mode m3po"
CHECKED = "it has to be what the configuration of the model says"
HYPERPARAMETERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "mode": (str, "the mode of a model without m3po.json: none or m3po"),
    "cross_path_lambda": (float, f"λ, the share of the peers, {CROSS_PATH}"),
    "cross_path_temp": (_temperature, f"the temperature of the gating function, a number or match, {CROSS_PATH}"),
    "cross_path_phase": (str, f"where paths interact, thinking or all, {CROSS_PATH}"),
    "cross_path_top_k": (int, f"the number of peers that each path reads, {CROSS_PATH}"),
    "gating_type": (str, f"the gating function, {CROSS_PATH}"),
    "answer_start": (str, "the answer marker of a model without m3po.json (default: ####)"),
    "sampling_temperature": (float, "for --num_paths with a model without m3po.json (default: 1.0)"),
    "aslr_enabled": (_truth, f"whether the model has ASLR; {CHECKED}"),
    "aslr_num_paths": (int, f"the number of latent paths; {CHECKED}"),
    "aslr_max_iterations": (
        int,
        f"the number of rounds; {CHECKED}. With --aslr on these rounds take the place of the model's, with --aslr both "
        "they are a third evaluation",
    ),
    "aslr_threshold": (float, f"the threshold of the router; {CHECKED}"),
    "aslr_gumbel_temp": (float, f"the scale of the noise; {CHECKED}"),
    "aslr_cross_path_lambda": (float, f"the share of the other latent paths; {CHECKED}"),
    "aslr_cross_path_temp": (float, f"the temperature among latent paths; {CHECKED}"),
}


def parser() -> OneLineFlags:
    """The flags of an evaluation."""
    flags = OneLineFlags(
        prog="bash scripts/eval_gsm8k.sh",
        description="Evaluate a checkpoint or model with lm-eval.",
        epilog="A flag that names a hyperparameter of the checkpoint must agree with its m3po.json.",
    )
    flags.add_argument(
        "model",
        nargs="?",
        default="smollm2-135m",
        help="the folder of a checkpoint or adapter, a .gguf file or a Hub id (default: the embedded smollm2-135m)",
    )
    flags.add_argument(
        "--dataset",
        action="append",
        default=[],
        help="openai/gsm8k (from the Hub), a .jsonl in its format, gsm_symbolic (generated), problems (the held-out "
        "ones of the checkpoint's run, else those of configs/demo.yaml), math500, mmlu_stem or arc_challenge; may be "
        "given several times. Default: openai/gsm8k, or gsm_symbolic and problems where the Hub cannot be reached",
    )
    flags.add_argument(
        "--problems_of",
        help="the checkpoint that --dataset problems takes its problems and prompt from (default: the model)",
    )
    flags.add_argument(
        "--num_fewshot",
        type=int,
        default=0,
        choices=(0, 8),
        help="the number of solved problems shown before each problem (default: 0)",
    )
    flags.add_argument("--limit", type=int, help="evaluate only the first N problems of each dataset")
    flags.add_argument(
        "--num_paths", type=int, default=1, help="the number of paths sampled for each problem (default: 1, greedy)"
    )
    flags.add_argument(
        "--aslr",
        default="off",
        choices=("on", "off", "both"),
        help="run the loop of a model trained with ASLR, or leave it out and see what training has internalised, or "
        "both and compare them problem by problem (default: off)",
    )
    flags.add_argument(
        "--batch_size",
        type=int,
        help="the number of rows decoded together (default: as the run of the checkpoint, else as configs/demo.yaml)",
    )
    flags.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="the dtype of the weights"
    )
    flags.add_argument(
        "--engine",
        default="transformers",
        choices=("transformers", "vllm"),
        help="what decodes: generate of Transformers, or vLLM, which needs the extra vllm of the environment",
    )
    flags.add_argument("--seed", type=int, default=0, help="the random seed of sampled paths and of ASLR's noise")
    flags.add_argument(
        "--output_dir", help="the folder of the results (default: evals/<model and options>-<their digest>)"
    )
    for name, (kind, text) in HYPERPARAMETERS.items():
        flags.add_argument(f"--{name}", type=kind, help=text)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as command-line words say (those of the process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.evaluation.session import run_evaluation

    def evaluate() -> None:
        options = parser().parse_args(words)
        hyperparameters = {name: getattr(options, name) for name in HYPERPARAMETERS}
        if options.aslr != "off":
            del hyperparameters[ROUNDS]  # it is set then, not compared with the checkpoint
        run_evaluation(options, hyperparameters, shlex.join(["bash", EVAL, *words]))

    return exit_code(evaluate, "Stopped. The same command goes on behind the batches that are done.")


EVAL = "scripts/eval_gsm8k.sh"

if __name__ == "__main__":
    start(main)
