# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: `results.md`, `results.json` and one `<task>.jsonl` of samples a task."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from m3po_lab.config import PROJECT_ROOT
from m3po_lab.eval_agreement import agreement_line
from m3po_lab.files import shown_path, write_json, write_text
from m3po_lab.provenance import git_state

PACKAGES = ("torch", "transformers", "peft", "lm-eval", "math-verify", "reasoning-gym")
COLUMNS = {
    "strict_match": "strict match",
    "flexible_match": "flexible match",
    "well_formed": "well-formed",
    "majority_vote": "majority@{n}",
    "pass_at_n": "pass@{n}",
}


def results_table(results: dict[str, Any], num_paths: int) -> str:
    """Markdown: a row a task, each score in % with its standard error."""
    shown = [name for name in COLUMNS if num_paths > 1 or name not in ("majority_vote", "pass_at_n")]
    titles = [COLUMNS[name].format(n=num_paths) for name in shown]
    if num_paths > 1:
        titles[:3] = [f"{title}, mean of paths" for title in titles[:3]]
    lines = [
        f"| task | version | examples | problems | {' | '.join(titles)} |",
        f"|---|---|---|---|{'---|' * len(titles)}",
    ]
    for task, scores in results["results"].items():
        cells = [percent(scores[f"{name},all"], scores[f"{name}_stderr,all"]) for name in shown]
        count = results["n-samples"][task]["effective"]
        start = f"| {task} | {results['versions'][task]} | {results['n-shot'][task]} | {count} |"
        lines.append(f"{start} {' | '.join(cells)} |")
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


def write_report(results: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """Write the files into `folder` and print the table; `about` says what was evaluated and how."""
    table = results_table(results, about["num_paths"])
    commit, dirty = git_state(PROJECT_ROOT)
    for task, samples in results["samples"].items():
        write_text(folder / f"{task}.jsonl", sample_lines(samples))
    write_json(
        folder / "results.json",
        {
            **about,
            **{key: results[key] for key in ("results", "versions", "n-shot", "n-samples", "configs")},
            "git_commit": commit,
            "git_dirty": dirty,
            "package_versions": {name: metadata.version(name) for name in PACKAGES},
        },
    )
    told = "" if about["agreement"] is None else f"\n{agreement_line(about['agreement'])}\n"
    write_text(folder / "results.md", f"`{about['command']}`\n\n{table}\n{told}")
    print(f"\n{table}\n\nstrict: one answer marker and the right answer behind it; flexible: the last one in the text")
    if told:
        print(told.strip())
    names = ["results.md", "results.json", *(f"{task}.jsonl" for task in results["samples"])]
    print(f"written to {shown_path(folder)}: {'  '.join(names)}")
