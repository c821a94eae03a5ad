# SPDX-License-Identifier: Apache-2.0
"""How sharp each gate's attention is over its temperature, on real rollouts, and whom one real group listens to.

Groups of paths are sampled on generated word problems; at every step each gate's similarity of the same distributions
is kept. The temperature at which a gate's attention has, in the mean, the entropy of the baseline's at 0.1 is its
matched one: the defaults in `transformers.m3po.gating`. Gates that learn are taken as they start (seed 0).
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
from rollout import RESULTS, commit, machine, write_results
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.gating import LearnableGating, create_gating_function, list_gating_functions
from transformers.m3po.gating.base import attention_weights
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.settings import DEFAULT_THOUGHT_TOP_K
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
TEMPERATURES = np.logspace(-4.5, 1, 67)
EXACT_EVERY = 8  # steps; the exact Jensen-Shannon divergence is slow


def all_gates(model: Any) -> dict[str, Any]:
    """Every gate as a function of whole distributions (..., N, V); those that learn read their likeliest tokens."""
    gates: dict[str, Any] = {}
    sizes = {"vocab_size": model.config.vocab_size, "hidden_size": model.config.hidden_size}
    for name in list_gating_functions():
        if not gating_class(name).learnable:
            gates[name] = create_gating_function(name)
            continue
        for projects in (False, True):
            gate: Any = create_gating_function(name, {**sizes, "project_embeddings": projects})
            gate.start(torch.Generator().manual_seed(0), model.get_input_embeddings())
            gates[name + ", embeddings" * projects] = partial(_likeliest, gate, model.get_input_embeddings())
    return gates


@torch.no_grad()
def _likeliest(gate: LearnableGating, embed_tokens: Any, probs: torch.Tensor) -> torch.Tensor:
    entries, ids = probs.topk(DEFAULT_THOUGHT_TOP_K, dim=-1)
    return gate(entries, ids=ids, embed_tokens=embed_tokens)


class Recorder:
    """A gating function that keeps the similarity of every gate and answers with the baseline's."""

    def __init__(self, gates: dict[str, Any]):
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
    colours = {name: f"C{index}" for index, name in enumerate(list_gating_functions())}
    for name, values in curves.items():
        gate, *other = name.split(", ")
        axes.plot(
            TEMPERATURES, values, label=name, color=colours[gate], linewidth=1.8, linestyle="dashed" if other else "-"
        )
        axes.plot(temperatures[name], target, "o", color=colours[gate], markersize=5)
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


def draw_group(kept: dict[str, torch.Tensor], file: Path) -> int:
    """Whom the paths of one group listen to in one step: a picture a gate. Returns which of the groups it is.

    The group is the one whose attention by the baseline has the median entropy of all.
    """
    everyone = torch.ones(kept["baseline"].shape[:-1], dtype=torch.bool)
    weights = {
        name: attention_weights(similarity, everyone, _default(name))[0]
        for name, similarity in kept.items()
        if "," not in name
    }
    sharpness = torch.special.entr(weights["baseline"]).sum((-2, -1))
    chosen = int(sharpness.argsort()[len(sharpness) // 2])
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.9), dpi=150, layout="constrained")
    for place, (name, value) in zip(axes.flat, weights.items(), strict=False):
        image = place.imshow(value[chosen], vmin=0, vmax=1, cmap="viridis")
        place.set_title(name, fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
    for place in axes.flat[len(weights) :]:
        place.axis("off")
    axes[0, 0].set_ylabel("path i that listens", fontsize=8)
    axes[1, 0].set_ylabel("path i that listens", fontsize=8)
    for place in axes[1]:
        place.set_xlabel("path j that is heard", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight A")
    figure.savefig(file)
    return chosen


def _default(name: str) -> float:
    return gating_class(name.split(",")[0]).default_temperature


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_paths", type=int, default=8, help="N")
    parser.add_argument("--length", type=int, default=48, help="tokens per path")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
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
    recorder = Recorder(all_gates(model))
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
    figures = FIGURES if args.name == "gates-cpu" else RESULTS
    draw(curves, temperatures, target, args.num_paths, figures / "gate-entropy.png")
    draw_group(kept, figures / "gate-weights.png")
    bound = recorder.gates["kl_divergence"].statistics()["similarity_error"].item()
    rows: dict[str, dict[str, Any]] = {}
    off = ~torch.eye(args.num_paths, dtype=torch.bool)
    for name, similarity in kept.items():
        pairs = similarity[:, off]
        rows[name] = {
            "similarity_5_50_95": torch.quantile(pairs.flatten(), torch.tensor([0.05, 0.5, 0.95])).tolist(),
            "entropy_at_0.1": entropy(similarity, 0.1),
            "matched_temperature": temperatures[name],
            "correlation_with_dot_product": torch.corrcoef(
                torch.stack([pairs.flatten(), kept["raw_dot"][:, off].flatten()])
            )[0, 1].item(),
            "default_temperature": _default(name),
            "entropy_at_default": entropy(similarity, _default(name)),
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
        f"{max(recorder.errors):.4f} from the exact one, bound {bound:.4f}. {machine()['device']}, torch "
        f"{machine()['torch']}.",
        "",
        "| gate | similarity: 5 %, median, 95 % | correlation with p · q | entropy at T = 0.1 | matched T | default T, "
        "its entropy |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, median, high = row["similarity_5_50_95"]
        lines.append(
            f"| `{name}` | {low:.3g}, {median:.3g}, {high:.3g} | {row['correlation_with_dot_product']:.3f} | "
            f"{row['entropy_at_0.1']:.3f} | {row['matched_temperature']:.3g} | {row['default_temperature']:.3g}, "
            f"{row['entropy_at_default']:.3f} |"
        )
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
