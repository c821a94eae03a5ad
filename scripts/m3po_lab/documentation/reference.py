# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/flags.md and docs/metrics.md, written from the code (make reference)."""

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.aslr.settings import ASLRHyperparameters
from transformers.m3po.flags import FIELDS
from transformers.utils.chat_template_utils import parse_google_format_docstring
from trl.trainer.m3po.config import M3POArguments
from trl.trainer.m3po.metrics import METRICS

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.grpo.arguments import RunArguments

Row = tuple[str, ...]

# Arguments of `generate` that are no hyperparameters of a mode; none has a default.
GENERATE_ARGUMENTS = {
    "enable_cross_path": "Let the paths of a group interact: mode `h3po` on a model with a residual gate, else `m3po`.",
    "tokenizer": "Finds the answer marker. `processing_class` is taken for it too.",
    "return_thinking_embeds": "Return the dense inputs that the model read as well, (B, T, H).",
    "m3po": "A `transformers.m3po.M3POGenerationState`, which carries all of this in and the record out.",
    "is_m3po_inference": "Skip ASLR (`True`) or run it (`False`); unset, it runs and one log line says so.",
    "mhc_gate": (
        "Routing gate of the hyper-connections, in [0, 1]: a number, or a tensor that broadcasts to (rows, layers, 2)."
    ),
}
# Fields of a model configuration whose meaning no other class states.
MODEL_FIELDS = {
    "thinking_residual_enabled": "The model has HRPO's residual gate.",
    "aslr_enabled": "The model has the modules of ASLR. The hidden size must be a multiple of 8.",
    "m3po_gating_enabled": "The model has a learnable gating function.",
    "m3po_gating_type": "Which one: `luong` or `bahdanau`.",
    "m3po_gating_config": "The options that say its size.",
    "mhc_enabled": "The model has hyper-connections.",
    "mhc_num_streams": "S, the number of residual streams, 1 or more.",
    "mhc_residual": "What makes H_res doubly stochastic: `sinkhorn`, or `birkhoff` with at most 4 streams.",
    "mhc_sinkhorn_iters": "Rounds of Sinkhorn, 1 or more.",
    "mhc_sinkhorn_tau": "What divides the logits of Sinkhorn, above 0. At 0.05 they lose their gradient.",
    "mhc_alpha": "Start of the three α.",
    "mhc_diagonal_bias": (
        "How far the logits of H_res's diagonal stand above the others at the start, in [0, 100]; `birkhoff` starts "
        "from the same H_res. 2 mixes at once (0.71 on the diagonal), from 12 on H_res hardly learns."
    ),
    "mhc_stream_offset": "RMS of the streams' offsets over that of the state, 0 or more.",
    "mhc_gate_noise": (
        "In training, the probability that a row draws its routing gate from U(0, 1), one for all its layers. A "
        "checkpoint whose routing gate is to be tuned wants it; it is no part of the papers' method."
    ),
}


def arguments_of(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each of its arguments, as sentences."""
    docstring = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes")[0]
    described = parse_google_format_docstring(docstring)[1] or {}
    return {name: f"{text[0].upper() if text[0].isascii() else text[0]}{text[1:]}" for name, text in described.items()}


def shown(value: Any) -> str:
    """A default as a YAML file has it; nothing where a flag is unset."""
    if value is None or value is dataclasses.MISSING:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}`"


def fields_of(cls: type) -> list[Row]:
    """Flag, default and help of each field of a dataclass of arguments."""
    return [(f"`{entry.name}`", shown(entry.default), entry.metadata["help"]) for entry in dataclasses.fields(cls)]


def generate_arguments() -> list[Row]:
    """Argument, default and meaning: of a call, of a mode, of ASLR."""
    settings, described = ThinkingSettings(), arguments_of(ThinkingSettings)
    rows: list[Row] = [(f"`{name}`", "", text) for name, text in GENERATE_ARGUMENTS.items()]
    rows += [
        (f"`{entry.name}`", shown(getattr(settings, entry.name)), described[entry.name])
        for entry in dataclasses.fields(settings)
        if entry.name != "mode"
    ]
    latent = latent_arguments()
    return rows + [(f"`{name}`", "", text) for name, text in latent.items() if name != "aslr_num_paths"]


def latent_arguments() -> dict[str, str]:
    """Flag and meaning of each hyperparameter of ASLR."""
    return {f"aslr_{name}": text for name, text in arguments_of(ASLRHyperparameters).items()}


def model_fields() -> list[Row]:
    """Field, default and meaning."""
    helps = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(M3POArguments)}
    described = helps | latent_arguments() | MODEL_FIELDS
    return [(f"`{name}`", shown(default), described[name]) for name, (_, default) in FIELDS.items()]


def state_arguments() -> list[Row]:
    """Argument and meaning."""
    return [(f"`{name}`", text) for name, text in arguments_of(M3POGenerationState).items()]


def metrics() -> list[Row]:
    """Metric, modes, unit and definition."""
    return [(f"`m3po/{name}`", metric.modes, metric.unit, metric.definition) for name, metric in METRICS.items()]


# Page -> block -> its columns and rows.
TABLES: dict[str, dict[str, tuple[Row, Callable[[], Iterable[Row]]]]] = {
    "docs/flags.md": {
        "GRPOConfig": (("flag", "default", "meaning"), lambda: fields_of(M3POArguments)),
        "run": (("flag", "default", "meaning"), lambda: fields_of(RunArguments)),
        "generate": (("argument", "default", "meaning"), generate_arguments),
        "state": (("argument", "meaning"), state_arguments),
        "model": (("field", "default", "meaning"), model_fields),
    },
    "docs/metrics.md": {"metrics": (("metric", "modes", "unit", "definition"), metrics)},
}


def marks(name: str) -> tuple[str, str]:
    """The lines between which a block of a page is written."""
    return f"<!-- begin: {name}, written by make reference -->", f"<!-- end: {name} -->"


def table(columns: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def filled(page: str, text: str) -> str:
    """The text of a page with its tables as the code has them now."""
    for name, (columns, rows) in TABLES[page].items():
        begin, end = marks(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{table(columns, rows())}\n{end}{after}"
    return text


def stale(root: Path = PROJECT_ROOT) -> dict[Path, str]:
    """The pages whose tables are out of date, with their text as it should be."""
    wanted = {root / page: filled(page, (root / page).read_text(encoding="utf-8")) for page in TABLES}
    return {path: text for path, text in wanted.items() if text != path.read_text(encoding="utf-8")}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check say which are out of date. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="m3po_lab.documentation.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is out of date")
    check = parser.parse_args(argv).check
    for path, text in (pages := stale()).items():
        print(f"{path}: {'out of date, run make reference' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
