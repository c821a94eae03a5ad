# SPDX-License-Identifier: Apache-2.0
"""What the hyper-connections of a checkpoint do on a text: a table for each sublayer, and a figure of H_res."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.report import full_report, gate_effect, gradient_norms, mean_matrices

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import check_writable, shown_path, write_text
from m3po_lab.core.identity import short_digest
from m3po_lab.core.observe import unchanged
from m3po_lab.evaluation.folder import claim_results, weights_of
from m3po_lab.models.loading import load_base_model
from m3po_lab.pretraining.data import documents, rows
from m3po_lab.pretraining.report import draw_routing
from m3po_lab.pretraining.routing_gates import gates_of
from m3po_lab.problems.data import GYM_PREFIX

ROWS, LENGTH = 4, 256
COLUMNS = {"row error": "row_error", "column error": "column_error", "from its start": "from_start"}
COLUMNS |= {"from identity": "from_identity", "stream cosine": "stream_cosine"}
GRADIENTS = {"gradient of b, pre": "pre", "b, post": "post", "b, res": "res"}
GRADIENTS |= {"φ, pre": "phi_pre", "φ, post": "phi_post", "φ, res": "phi_res", "α": "scale"}


def tokens(tokenizer: Any, dataset: str, length: int) -> Any:
    """(ROWS, length) long: the first tokens of the first documents that have as many; solved problems one by another.

    Raises:
        UserError: there are no such documents.
    """
    texts = documents(dataset, None)
    if dataset.startswith(GYM_PREFIX):
        return torch.stack(list(islice(rows(texts, tokenizer, length), ROWS)))
    firsts = (next(rows([text], tokenizer, length), None) for text in texts)
    chosen = list(islice((row for row in firsts if row is not None), ROWS))
    if not chosen:
        raise UserError(f"--dataset {dataset} has no document of {length} tokens; give another text.")
    return torch.stack(chosen)


def measure(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The report on the model's hyper-connections and the norms of their gradients; the model is left as it was."""
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


def run(options: argparse.Namespace) -> None:
    """Report.

    Raises:
        UserError: the checkpoint cannot be read or has no hyper-connections, or there is no text.
    """
    check_writable(Path(options.output_dir) if options.output_dir else PROJECT_ROOT / "evals")
    model, tokenizer = load_base_model(options.checkpoint)
    if not has_hyper_connections(model):
        raise UserError(f"{options.checkpoint} has no hyper-connections: give a model with mhc_enabled.")
    gate = None if options.gate is None else gates_of(model, options.gate, options.checkpoint)
    length = min(LENGTH, model.config.max_position_embeddings)
    inputs = {"input_ids": tokens(tokenizer, options.dataset, length).to(model.device)}
    name = "-".join(Path(options.checkpoint).parts[-2:])
    digest = short_digest(inputs["input_ids"].tolist())
    depends_on = {
        **weights_of(options.checkpoint),
        "dataset": options.dataset,
        "tokens": digest,
        "gate": options.gate,
    }
    folder = claim_results(options.output_dir, f"{name}-routing", depends_on)
    text = text_of(*measure(model, inputs))
    if gate is not None:
        effect = gate_effect(model, inputs, (gate, 1.0))
        text += f"\n\nRouting gate {options.gate} against 1: {effect:.2e} nats."
    write_text(folder / "report.md", text + "\n")
    matrices = {name: matrix.tolist() for name, matrix in mean_matrices(model, inputs).items()}
    draw_routing(matrices, f"H_res of {name} on {options.dataset}", folder / "routing.png")
    print(f"{text}\n\nwritten to {shown_path(folder)}/report.md and routing.png")
