# SPDX-License-Identifier: Apache-2.0
"""What the hyper-connections of a checkpoint do: ``bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]``.

For each sublayer how far H_res is from doubly stochastic, from its start and from the identity, how alike the streams
are and how large the gradients; what the routing gate changes; and a line for whatever does nothing. Written to
`report.md` and `routing.png` too. Exit codes: 0 reported, 2 a wrong input or a failing environment, 130 interrupted by
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from m3po_lab.command_line.entry import start
from m3po_lab.pretraining.routing_gates import HELP, gates_of

ROWS, LENGTH = 4, 256
COLUMNS = {"row error": "row_error", "column error": "column_error", "from its start": "from_start"}
COLUMNS |= {"from identity": "from_identity", "stream cosine": "stream_cosine"}
GRADIENTS = {"gradient of b, pre": "pre", "b, post": "post", "b, res": "res"}
GRADIENTS |= {"φ, pre": "phi_pre", "φ, post": "phi_post", "φ, res": "phi_res", "α": "scale"}


def tokens(tokenizer: Any, dataset: str, length: int) -> Any:
    """(ROWS, length) long: the first tokens of the first documents that have as many.

    Raises:
        UserError: there are no such documents.
    """
    import torch

    from m3po_lab.core.errors import UserError
    from m3po_lab.pretraining.data import documents, rows

    firsts = (next(rows([text], tokenizer, length), None) for text in documents(dataset, None))
    found = list(islice((row for row in firsts if row is not None), ROWS))
    if not found:
        raise UserError(f"--dataset {dataset} has no document of {length} tokens; give another text.")
    return torch.stack(found)


def measure(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The report on the model's hyper-connections and the norms of their gradients; the model is left as it was."""
    from transformers.m3po.hyper_connections.report import full_report, gradient_norms

    from m3po_lab.core.observe import unchanged

    with unchanged(model):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return full_report(model, inputs), gradient_norms(model)


def text_of(report: dict[str, Any], gradients: dict[str, dict[str, float]]) -> str:
    """The report as Markdown: a row for each sublayer, then what is of the whole model."""
    names = ["sublayer", *COLUMNS, *GRADIENTS]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, numbers in report["sublayers"].items():
        cells = [f"{numbers[key]:.2e}" if "error" in key else f"{numbers[key]:.3f}" for key in COLUMNS.values()]
        cells += [f"{gradients[name][key]:.1e}" for key in GRADIENTS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    gains = report["composite_gain_rows"], report["composite_gain_columns"]
    lines += [
        "",
        f"Over all sublayers a signal grows by {gains[0]:.3f} at most and a gradient by {gains[1]:.3f} (composite "
        f"gain). Routing gate 0 against 1: {report['gate_effect']:.2e} nats.",
    ]
    return "\n".join([*lines, *(f"\nWARNING: {line}" for line in report["verdicts"])])


def run(given: argparse.Namespace) -> None:
    """Report.

    Raises:
        UserError: the checkpoint cannot be read or has no hyper-connections, or there is no text.
    """
    from transformers.m3po.flags import has_hyper_connections
    from transformers.m3po.hyper_connections.report import gate_effect, mean_matrices

    from m3po_lab.core.errors import PROJECT_ROOT, UserError
    from m3po_lab.core.files import check_writable, shown_path, write_text
    from m3po_lab.eval_mhc import load
    from m3po_lab.evaluation.folder import claim_results, weights_of
    from m3po_lab.grpo.identity import short_digest
    from m3po_lab.pretraining.report import draw_routing

    check_writable(Path(given.output_dir) if given.output_dir else PROJECT_ROOT / "evals")
    model, tokenizer = load(given.checkpoint)
    if not has_hyper_connections(model):
        raise UserError(f"{given.checkpoint} has no hyper-connections: give a model with mhc_enabled.")
    gate = None if given.gate is None else gates_of(model, given.gate, given.checkpoint)
    length = min(LENGTH, model.config.max_position_embeddings)
    inputs = {"input_ids": tokens(tokenizer, given.dataset, length).to(model.device)}
    name = "-".join(Path(given.checkpoint).parts[-2:])
    read = short_digest(inputs["input_ids"].tolist())
    about = {**weights_of(given.checkpoint), "dataset": given.dataset, "tokens": read, "gate": given.gate}
    folder = claim_results(given.output_dir, f"{name}-routing", about)
    text = text_of(*measure(model, inputs))
    if gate is not None:
        effect = gate_effect(model, inputs, (gate, 1.0))
        text += f"\n\nRouting gate {given.gate} against 1: {effect:.2e} nats."
    write_text(folder / "report.md", text + "\n")
    matrices = {name: matrix.tolist() for name, matrix in mean_matrices(model, inputs).items()}
    draw_routing(matrices, f"H_res of {name} on {given.dataset}", folder / "routing.png")
    print(f"{text}\n\nwritten to {shown_path(folder)}/report.md and routing.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Report as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.core.errors import OneLineFlags, exit_code

    flags = OneLineFlags(usage="bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]")
    flags.add_argument("checkpoint", help="a model folder, e.g. runs/mhc_small/mhc-seed0/final")
    flags.add_argument("--gate", help=f"its effect against 1 is told too; {HELP}")
    flags.add_argument(
        "--dataset",
        default="python:sympy",
        help="'python:<package>' (the files of an installed package), a .jsonl with 'text', or a Hub id",
    )
    flags.add_argument("--output_dir", help="default: evals/<run>-final-routing-<digest of the model and the text>")
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run(flags.parse_args(words)), "Stopped.")


if __name__ == "__main__":
    start(main)
