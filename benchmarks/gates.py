# SPDX-License-Identifier: Apache-2.0
"""How sharp each gate's attention is over its temperature, on real rollouts, and what a gate costs a decoding step.

Groups of paths are sampled on generated word problems; at every step each gate's similarity of the same distributions
is kept. The temperature at which a gate's attention has, in the mean, the entropy of the baseline's at 0.1 is its
matched one: the defaults in `transformers.m3po.gating`. A step is timed against one softmax over the same tensor, in
turn in one process.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reasoning_gym
import torch
from matplotlib.figure import Figure
from rollout import RESULTS, commit, in_turn, machine, write_results
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.gating import BaseM3POGating, create_gating_function, list_gating_functions
from transformers.m3po.gating.base import attention_weights
from trl import ModelConfig

from m3po_lab.models import EMBEDDED_MODEL, load_model

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "gate-entropy.png"
TEMPERATURES = np.logspace(-4.5, 1, 67)
EXACT_EVERY = 8  # steps; the exact Jensen-Shannon divergence is slow


class Recorder:
    """A gating function that keeps the similarity of every gate and answers with the baseline's."""

    def __init__(self, gates: dict[str, BaseM3POGating]):
        self.gates, self.steps = gates, 0
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in gates}
        self.errors: list[float] = []
        self.exact = create_gating_function("kl_divergence", {"exact": True})

    def __call__(self, probs: torch.Tensor) -> torch.Tensor:
        found = {name: gate(probs) for name, gate in self.gates.items()}
        for name, similarity in found.items():
            self.kept[name].append(similarity.cpu())
        if self.steps % EXACT_EVERY == 0:
            off = ~torch.eye(probs.shape[1], dtype=torch.bool, device=probs.device)
            self.errors.append((found["kl_divergence"] - self.exact(probs)).abs()[:, off].max().item())
        self.steps += 1
        return found["baseline"]


def entropy(similarity: torch.Tensor, temperature: float) -> float:
    """Mean entropy of the attention over the peers, in nats: (G, N, N)."""
    weights, _ = attention_weights(similarity, torch.ones(similarity.shape[:-1], dtype=torch.bool), temperature)
    return torch.special.entr(weights).sum(-1).mean().item()


def matched(similarity: torch.Tensor, target: float) -> float:
    """The temperature at which the mean entropy is `target`, by bisection: the entropy rises with the temperature."""
    low, high = 1e-7, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(similarity, middle) < target else (low, middle)
    return (low * high) ** 0.5


def draw(curves: dict[str, list[float]], temperatures: dict[str, float], target: float, paths: int, file: Path) -> None:
    """The figure of the docs."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(TEMPERATURES, values, label=name, color=f"C{index}", linewidth=1.8)
        axes.plot(temperatures[name], target, "o", color=f"C{index}", markersize=5)
    axes.axhline(target, color="0.6", linewidth=1, linestyle="dotted")
    axes.axhline(np.log(paths - 1), color="0.8", linewidth=1)
    right = {"x": TEMPERATURES[-1], "ha": "right", "fontsize": 8, "color": "0.4"}
    axes.text(y=np.log(paths - 1), s="uniform over the peers", va="bottom", **right)
    axes.text(y=target, s="baseline at T = 0.1", va="bottom", **right)
    axes.set_xscale("log")
    axes.set_xlabel("temperature T")
    axes.set_ylabel("entropy of the attention, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_paths", type=int, default=8, help="N")
    parser.add_argument("--length", type=int, default=48, help="tokens per path")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of timings, at least 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="gates-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype="float32"))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=args.num_prompts, seed=args.seed)
    questions = [problems[index]["question"] for index in range(args.num_prompts)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(model.device)
    recorder = Recorder({name: create_gating_function(name) for name in list_gating_functions()})
    torch.manual_seed(args.seed)
    model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        temperature=args.temperature,
        num_return_sequences=args.num_paths,
        max_new_tokens=args.length,
        min_new_tokens=args.length,
        m3po=M3POGenerationState(
            settings=ThinkingSettings(cross_path_phase="all"), tokenizer=tokenizer, gating_function=recorder
        ),
    )
    kept = {name: torch.cat(parts) for name, parts in recorder.kept.items()}
    target = entropy(kept["baseline"], 0.1)
    temperatures = {name: matched(similarity, target) for name, similarity in kept.items()}
    curves = {name: [entropy(similarity, float(t)) for t in TEMPERATURES] for name, similarity in kept.items()}
    draw(curves, temperatures, target, args.num_paths, FIGURE if args.name == "gates-cpu" else RESULTS / "tmp.png")
    bound = recorder.gates["kl_divergence"].statistics()["similarity_error"].item()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logits = 4 * torch.randn(32, 151936)
    groups = logits.softmax(-1).view(4, 8, -1)
    speed = {
        name: in_turn(partial(torch.softmax, logits, -1), partial(create_gating_function(name), groups), args.pairs)
        for name in list_gating_functions()
    }
    torch.set_num_threads(threads)
    rows: dict[str, dict[str, Any]] = {}
    off = ~torch.eye(args.num_paths, dtype=torch.bool)
    for name, similarity in kept.items():
        pairs = similarity[:, off]
        rows[name] = {
            "similarity_5_50_95": torch.quantile(pairs.flatten(), torch.tensor([0.05, 0.5, 0.95])).tolist(),
            "entropy_at_0.1": entropy(similarity, 0.1),
            "matched_temperature": temperatures[name],
            "default_temperature": recorder.gates[name].temperature,
            "entropy_at_default": entropy(similarity, recorder.gates[name].temperature),
            "time_over_softmax": 1 / speed[name]["ratio_median"],
            "time_over_softmax_max": 1 / speed[name]["ratio_min"],
        }
    result = {
        "command": " ".join(["python benchmarks/gates.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "baseline_entropy": target,
        "divergence_error_seen": max(recorder.errors),
        "divergence_error_bound": bound,
        "gates": rows,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: {args.model_name_or_path}, {len(kept['baseline'])} groups of "
        f"{args.num_paths} paths at temperature {args.temperature:g}; entropy of the baseline at 0.1: {target:.3f} of "
        f"at most {np.log(args.num_paths - 1):.3f} nats. Similarity of `kl_divergence`: off by at most "
        f"{max(recorder.errors):.4f} from the exact one, bound {bound:.4f}. Time: 4 groups of 8, V = 151,936, one "
        f"thread, median of {args.pairs} pairs; {machine()['device']}, torch {machine()['torch']}.",
        "",
        "| gate | similarity: 5 %, median, 95 % | entropy at T = 0.1 | matched T | default T, its entropy | time over "
        "one softmax (largest) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, median, high = row["similarity_5_50_95"]
        lines.append(
            f"| `{name}` | {low:.3g}, {median:.3g}, {high:.3g} | {row['entropy_at_0.1']:.3f} | "
            f"{row['matched_temperature']:.3g} | {row['default_temperature']:.3g}, {row['entropy_at_default']:.3f} | "
            f"{row['time_over_softmax']:.2f} ({row['time_over_softmax_max']:.2f}) |"
        )
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
