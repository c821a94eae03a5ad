# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: `results.md`, `results.json` and one `<task>.jsonl` of samples a task."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.core.files import shown_path, write_json, write_text
from m3po_lab.core.provenance import git_state
from m3po_lab.core.stats import compare
from m3po_lab.evaluation.agreement import agreement_line
from m3po_lab.evaluation.decoding import router_line

PACKAGES = ("torch", "transformers", "peft", "lm-eval", "math-verify", "reasoning-gym")
KEPT = ("results", "versions", "n-shot", "n-samples", "configs", "router")  # of lm-eval's results
COLUMNS = {
    "strict_match": "strict match",
    "flexible_match": "flexible match",
    "well_formed": "well-formed",
    "majority_vote": "majority@{n}",
    "pass_at_n": "pass@{n}",
}


def results_table(evaluations: dict[str, dict[str, Any]], num_paths: int) -> str:
    """Markdown: a row a task, each score in % with its standard error; of several evaluations a row each a task.

    Args:
        evaluations: lm-eval's results, by how ASLR ran.
    """
    several = len(evaluations) > 1
    shown = [name for name in COLUMNS if num_paths > 1 or name not in ("majority_vote", "pass_at_n")]
    titles = [COLUMNS[name].format(n=num_paths) for name in shown]
    if num_paths > 1:
        titles[:3] = [f"{title}, mean of paths" for title in titles[:3]]
    heads = ["task", "version", "examples", "problems", *(["ASLR"] * several), *titles]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for task in next(iter(evaluations.values()))["results"]:
        for name, results in evaluations.items():
            scores = results["results"][task]
            cells = [percent(scores[f"{column},all"], scores[f"{column}_stderr,all"]) for column in shown]
            count = str(results["n-samples"][task]["effective"])
            about = [task, str(results["versions"][task]), str(results["n-shot"][task]), count, *([name] * several)]
            lines.append(f"| {' | '.join([*about, *cells])} |")
    return "\n".join(lines)


def paired_rows(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every two evaluations of the same problems, task by task: what the second one gained and lost by strict match."""
    rows = []
    for one, other in combinations(evaluations, 2):
        for task in evaluations[one]["samples"]:
            verdicts = []
            for name in (one, other):
                samples = sorted(evaluations[name]["samples"][task], key=lambda sample: sample["doc_id"])
                verdicts.append([sample["strict_match"] == 1.0 for sample in samples])
            rows.append({"task": task, "from": one, "to": other, **asdict(compare(*verdicts))})
    return rows


def paired_table(rows: Sequence[dict[str, Any]]) -> str:
    """These as Markdown."""
    lines = [
        "| task | ASLR | problems | strict match | gained | lost | p | 95 % of change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        lines.append(
            f"| {row['task']} | {row['from']} → {row['to']} | {row['n']} | {row['before']:.1%} → {row['after']:.1%} | "
            f"{row['gained']} | {row['lost']} | {row['p_value']:.2g} | {low:+.1f} to {high:+.1f} points |"
        )
    return "\n".join(lines)


def percent(value: float, error: float | str) -> str:
    """A share and its standard error in %; of a single problem there is no error."""
    return f"{value:.1%}" if isinstance(error, str) else f"{100 * value:.1f} ± {100 * error:.1f} %"


def sample_lines(samples: list[dict[str, Any]]) -> str:
    """One problem a line: question, prompt as text, reference, completions and scores."""
    lines = [
        {
            "question": sample["doc"]["question"],
            "prompt": sample["arguments"][0][0],
            "reference": sample["doc"]["reference"],
            "completions": sample["resps"][0],
            **{name: sample[name] for name in COLUMNS if name in sample},
        }
        for sample in samples
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_report(evaluations: dict[str, dict[str, Any]], header: dict[str, Any], folder: Path) -> None:
    """Write the files into `folder` and print the table.

    Args:
        evaluations: lm-eval's results, by how ASLR ran.
        header: what was evaluated and how.
        folder: for the files.
    """
    several = len(evaluations) > 1
    commit, dirty = git_state(PROJECT_ROOT)
    files = []
    for name, results in evaluations.items():
        for task, samples in results["samples"].items():
            files.append(f"{task}-{name}.jsonl" if several else f"{task}.jsonl")
            write_text(folder / files[-1], sample_lines(samples))
    written = {name: {key: results[key] for key in KEPT if results.get(key)} for name, results in evaluations.items()}
    paired = paired_rows(evaluations) if several else []
    write_json(
        folder / "results.json",
        {
            **header,
            **({"evaluations": written, "paired": paired} if several else next(iter(written.values()))),
            "git_commit": commit,
            "git_dirty": dirty,
            "package_versions": {name: metadata.version(name) for name in PACKAGES},
        },
    )
    tables = [results_table(evaluations, header["num_paths"]), *([paired_table(paired)] * several)]
    lines = [router_line(name, results["router"]) for name, results in evaluations.items() if results.get("router")]
    if header["agreement"] is not None:
        lines.append(agreement_line(header["agreement"]))
    notes = "".join(f"\n{line}\n" for line in lines)
    text = "\n\n".join(tables)
    write_text(folder / "results.md", f"`{header['command']}`\n\n{text}\n{notes}")
    print(f"\n{text}\n\nstrict: one answer marker and the right answer behind it; flexible: the last one in the text")
    for line in lines:
        print(line)
    print(f"written to {shown_path(folder)}: {'  '.join(['results.md', 'results.json', *files])}")
