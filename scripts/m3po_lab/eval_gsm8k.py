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
NUMBERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "mode": (str, "mode of a model without m3po.json: none or m3po"),
    "cross_path_lambda": (float, "λ of a model without m3po.json, with --mode m3po"),
    "cross_path_temp": (_temperature, "T, or match, likewise"),
    "cross_path_phase": (str, "thinking or all, likewise"),
    "cross_path_top_k": (int, "peers kept, likewise"),
    "gating_type": (str, "the gate, likewise"),
    "answer_start": (str, "answer marker of a model without m3po.json (default: ####)"),
    "sampling_temperature": (float, "of --num_paths, for a model without m3po.json (default: 1.0)"),
    "aslr_enabled": (_truth, "whether the model has ASLR; this and the next six only check that it is so"),
    "aslr_num_paths": (int, "latent paths"),
    "aslr_max_iterations": (int, "rounds; with --aslr on these in place of the model's, with both beside them"),
    "aslr_threshold": (float, "the router's threshold"),
    "aslr_gumbel_temp": (float, "scale of the noise"),
    "aslr_cross_path_lambda": (float, "share of the other latent paths"),
    "aslr_cross_path_temp": (float, "temperature among latent paths"),
}


def parser() -> OneLineFlags:
    """The flags of an evaluation."""
    flags = OneLineFlags(
        prog="bash scripts/eval_gsm8k.sh",
        description="Evaluate a checkpoint or model with lm-eval.",
        epilog="Flags that name a number of the checkpoint must agree with its m3po.json.",
    )
    flags.add_argument(
        "model",
        nargs="?",
        default="smollm2-135m",
        help="folder of a checkpoint or adapter, .gguf file or Hub id (default: the embedded model, smollm2-135m)",
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
        "--problems_of", help="checkpoint whose problems and prompt are meant (default: the model itself)"
    )
    flags.add_argument("--num_fewshot", type=int, default=0, choices=(0, 8), help="solved problems shown before each")
    flags.add_argument("--limit", type=int, help="evaluate the first so many problems of each dataset")
    flags.add_argument("--num_paths", type=int, default=1, help="paths sampled for each problem (default: 1, greedy)")
    flags.add_argument(
        "--aslr",
        default="off",
        choices=("on", "off", "both"),
        help="run the loop of a model trained with ASLR, or leave it out and see what training has internalised, or "
        "both and compare them problem by problem (default: off)",
    )
    flags.add_argument("--batch_size", type=int, help="rows decoded together (default: the run's, else the demo's)")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    flags.add_argument("--seed", type=int, default=0, help="seed of sampled paths and of ASLR's noise")
    flags.add_argument("--output_dir", help="folder of the results (default: evals/<model and options>-<their digest>)")
    for name, (kind, text) in NUMBERS.items():
        flags.add_argument(f"--{name}", type=kind, help=text)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as command-line words say (those of the process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.evaluation.session import run_evaluation

    def evaluate() -> None:
        given = parser().parse_args(words)
        numbers = {name: getattr(given, name) for name in NUMBERS}
        if given.aslr != "off":
            del numbers[ROUNDS]  # not a number of the checkpoint that is checked, but one that is set
        run_evaluation(given, numbers, shlex.join(["bash", EVAL, *words]))

    return exit_code(evaluate, "Stopped. The same command goes on behind the batches that are done.")


EVAL = "scripts/eval_gsm8k.sh"

if __name__ == "__main__":
    start(main)
