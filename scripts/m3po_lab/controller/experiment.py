# SPDX-License-Identifier: Apache-2.0
"""The whole of a controller's training: pre-flight, what gates are worth, controller and controls, report."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.report import mean_matrices

from m3po_lab.controller.arguments import ControllerRun, check_folder
from m3po_lab.controller.effects import grid_effects, layer_effects, preflight
from m3po_lab.controller.environment import Standard
from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.fits import Splits, fit_seed
from m3po_lab.controller.gates import GateSpace
from m3po_lab.controller.report import effect_table, write_report
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import check_writable, read_json, shown_path, write_json
from m3po_lab.core.identity import RUN_FILE
from m3po_lab.core.provenance import git_state
from m3po_lab.models.loading import load_base_model
from m3po_lab.problems.data import load_problems

EFFECTS = "effects.json"
REPORTED = 64  # test problems on which H_res is drawn


def run_controller(run: ControllerRun) -> None:
    """Do what is not done yet and report.

    Raises:
        UserError: for a wrong input, or where the gate does nothing; nothing is trained then.
    """
    check_writable(run.folder)
    model, tokenizer = load_base_model(run.checkpoint)
    if not has_hyper_connections(model):
        raise UserError(f"{run.checkpoint} has no hyper-connections: give a model with mhc_enabled.")
    check_folder(run)
    train, test = load_problems(run.script)
    before, files = weights_digest(model), run.flags()["checkpoint"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def episodes(problems: Any, kind: str) -> Episodes:
        space = GateSpace(kind, model.config.num_hidden_layers)
        return Episodes(model, tokenizer, problems, space, run.script.max_new_tokens)

    effect = preflight(episodes(train, "global"))
    print(f"pre-flight: {effect:.2e} nats between routing gates 0 and 1, on {shown_path(run.folder)}", flush=True)
    commit, dirty = git_state(PROJECT_ROOT)
    write_json(run.folder / RUN_FILE, {"flags": run.flags(), "commit": commit, "dirty": dirty})
    effects = read_json(run.folder / EFFECTS)
    if effects is None:
        wide, deep = episodes(test, "global"), episodes(test, "layer")
        effects = {
            "preflight": effect,
            "grid": grid_effects(wide, run.script.control_grid),
            "layers": layer_effects(deep),
            "matrices": {name: matrix.tolist() for name, matrix in mean_matrices(model, wide.inputs(REPORTED)).items()},
        }
        write_json(run.folder / EFFECTS, effects)
    print(effect_table(effects), flush=True)
    results = []
    for kind in run.script.gates:
        fitted, tried = episodes(train, kind), episodes(test, kind)
        embeddings = fitted.embeddings()
        standard = Standard.of(embeddings)
        splits = Splits(fitted, tried, standard, standard(embeddings), standard(tried.embeddings()), files)
        for seed in run.script.seeds:
            start = time.perf_counter()
            results.append(fit_seed(splits, run.script, seed, run.folder / f"{kind}-seed{seed}"))
            tqdm.write(f"{kind}, seed {seed}: {time.perf_counter() - start:.0f} s")
    if weights_digest(model) != before:
        raise RuntimeError("the model's weights have changed")
    print(f"\n{write_report(run, effects, results, before)}\n")
    print(f"report  {shown_path(run.folder)}/report.md  and its figures")


def weights_digest(model: Any) -> str:
    """Sixteen digits that differ where a weight does."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:16]
