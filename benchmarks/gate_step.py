# SPDX-License-Identifier: Apache-2.0
"""What one step of a gate costs, against one softmax over the same tensor in the same process.

Twice, each in a process of its own, because a softmax that has to get its 19 MB of memory from the system takes three
times as long as one that finds them: `fresh` as a short program allocates, `warm` with glibc told to keep what it has.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rollout import commit, in_turn, machine, write_results
from transformers.m3po.gating import create_gating_function, list_gating_functions
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.settings import DEFAULT_THOUGHT_TOP_K

# Bytes from which glibc maps memory anew, and from which it gives some back: its defaults at the start, and 1 GiB.
ALLOCATORS = {
    name: {"MALLOC_MMAP_THRESHOLD_": str(size), "MALLOC_TRIM_THRESHOLD_": str(size)}
    for name, size in (("fresh", 128 << 10), ("warm", 1 << 30))
}
TARGETS = {"baseline": 0.5, "raw_dot": 0.5, "scaled_dot": 0.5, "bhattacharyya": 0.8, "kl_divergence": 2.5}


@torch.no_grad()
def measure(pairs: int, groups: int, paths: int, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Time over that of a softmax, one thread: median, smallest and largest, by gate."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = 4 * torch.randn(groups * paths, vocabulary)
    probs = logits.softmax(-1).view(groups, paths, -1)
    found = {}
    for name in list_gating_functions():
        if gating_class(name).learnable:
            gate = create_gating_function(name, {"vocab_size": vocabulary})
            call = partial(_likeliest, gate, probs)
        else:
            call = partial(create_gating_function(name), probs)
        timed = in_turn(partial(torch.softmax, logits, -1), call, pairs)
        found[name] = {
            "softmax_ms": 1e3 * timed["plain_seconds"],
            "median": 1 / timed["ratio_median"],
            "smallest": 1 / timed["ratio_max"],
            "largest": 1 / timed["ratio_min"],
        }
    return found


def _likeliest(gate: Any, probs: torch.Tensor) -> torch.Tensor:
    entries, ids = probs.topk(DEFAULT_THOUGHT_TOP_K, dim=-1)
    return gate(entries, ids=ids)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=25, help="pairs of timings, at least 7")
    parser.add_argument("--num_groups", type=int, default=4, help="G")
    parser.add_argument("--num_paths", type=int, default=8, help="N")
    parser.add_argument("--vocabulary", type=int, default=151936, help="V")
    parser.add_argument("--name", default="gate-step-cpu", help="name of the files under benchmarks/results/")
    parser.add_argument("--measure", action="store_true", help="only measure in this process and print JSON")
    args = parser.parse_args(argv)
    shape = (args.num_groups, args.num_paths, args.vocabulary)
    if args.measure:
        print(json.dumps(measure(args.pairs, *shape)))
        return 0
    words = [sys.executable, str(Path(__file__).resolve()), *(sys.argv[1:] if argv is None else argv), "--measure"]
    found = {}
    for name, variables in ALLOCATORS.items():
        environment = {**os.environ, **variables}
        printed = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(printed.splitlines()[-1])
    result = {
        "command": " ".join(["python benchmarks/gate_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "ratios": found,
    }
    softmax = {name: next(iter(rows.values()))["softmax_ms"] for name, rows in found.items()}
    lines = [
        f"`{result['command']}` at {result['commit']}: {args.num_groups} groups of {args.num_paths}, V = "
        f"{args.vocabulary:,}, one thread; time over that of one softmax of the same tensor ({softmax['fresh']:.1f} ms "
        f"fresh, {softmax['warm']:.1f} ms warm), median (smallest to largest) of {args.pairs} pairs; "
        f"{machine()['device']}, torch {machine()['torch']}.",
        "",
        "| gate | fresh memory | warm memory | wanted |",
        "|---|---|---|---|",
    ]
    for name in found["fresh"]:
        cells = [
            f"{row['median']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
            for row in (found[kind][name] for kind in ALLOCATORS)
        ]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} | {TARGETS.get(name, '-')} |")
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
