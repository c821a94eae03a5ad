# SPDX-License-Identifier: Apache-2.0
"""How good and how fast soft thoughts of k entries are, and how far a fresh residual gate moves the model.

On the distributions of real rollouts of the embedded model: the relative error |h_k - h| / |h| of a thought of the k
likeliest tokens against the whole vocabulary's; the time of a softmax, of the whole product p E and of the k entries'
way; and, for several bounds of the gate's start, how far the log-probs of the sampled tokens and the next-token
distribution of the gated model are from the plain one's. Writes `benchmarks/results/thoughts-cpu.md` and `.json`.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from rollout import RESULTS, commit, machine
from transformers.m3po.bag_vectors import bag_vectors
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_MODULES, attach_residual_gate
from transformers.m3po.thinking.thoughts import thought_bags
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

SIZES = (8, 16, 32, 64, 128, 256, 512)
BOUNDS = ((0.95, 0.999), (0.98, 0.999), (0.99, 0.999))
QUESTIONS = ("34 + 21", "What is 17 + 8? Explain it step by step.", "A train has 12 cars of 40 seats. How many seats?")


def rollouts(model: Any, tokenizer: Any, temperature: float, args: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """A plain sampled rollout: its output and the distributions p (steps * B, V) it was sampled from."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    torch.manual_seed(args.seed)
    output = model.generate(
        **inputs, do_sample=True, top_k=0, temperature=temperature, num_return_sequences=args.num_paths,
        max_new_tokens=args.length, min_new_tokens=args.length, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    output.prompt_mask = inputs["attention_mask"].repeat_interleave(args.num_paths, 0)
    return output, torch.cat([scores.softmax(-1) for scores in output.scores])


def errors(probs: torch.Tensor, embedding: Any) -> dict[int, dict[str, float]]:
    """By k, the relative error of the thoughts: mean, 95th percentile and largest."""
    weight, found = embedding.weight, {}
    whole = (probs @ weight) / probs.norm(dim=-1, keepdim=True)
    for size in SIZES:
        ids, shares = thought_bags(probs, size, weight.shape[0])
        cut = bag_vectors(embedding, ids[:, None], shares[:, None], weight.shape[1])[:, 0]
        relative = (cut - whole).norm(dim=-1) / whole.norm(dim=-1)
        found[size] = {
            "mean": relative.mean().item(),
            "p95": relative.quantile(0.95).item(),
            "max": relative.max().item(),
        }
    return found


def milliseconds(function: Any, repeats: int = 30) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def times(scores: torch.Tensor, embedding: Any) -> dict[str, float]:
    """Milliseconds of a decoding step's parts, for scores (B, V)."""
    weight, probs = embedding.weight, scores.softmax(-1)

    def cut(size: int) -> torch.Tensor:
        ids, shares = thought_bags(probs, size, weight.shape[0])
        return bag_vectors(embedding, ids[:, None], shares[:, None], weight.shape[1])

    found = {"softmax": milliseconds(lambda: scores.softmax(-1)), "whole": milliseconds(lambda: probs @ weight)}
    return found | {f"top {size}": milliseconds(lambda size=size: cut(size)) for size in SIZES}


def closeness(model: Any, output: Any, probs: torch.Tensor, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By the bounds of the gate's start, the distance of the gated model from the plain one on the same tokens."""
    ids = output.sequences
    mask = torch.cat([output.prompt_mask, torch.ones_like(ids[:, -args.length :])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    steps = probs.view(args.length, len(ids), -1).transpose(0, 1)
    bag_ids, bag_weights = thought_bags(steps.flatten(0, 1), args.thought_top_k, model.config.vocab_size)
    bags = {
        "thinking_bag_ids": bag_ids.view(*steps.shape[:2], -1),
        "thinking_bag_weights": bag_weights.view(*steps.shape[:2], -1),
    }

    def distribution(**more: Any) -> torch.Tensor:
        return model(**inputs, **more, logits_to_keep=args.length + 1).logits[:, :-1].log_softmax(-1)

    plain = distribution()
    chosen = ids[:, -args.length :, None]
    found = {}
    for r_min, r_max in BOUNDS:
        attach_residual_gate(model, r_min, r_max, args.seed)
        gated = distribution(**bags)
        for name in RESIDUAL_GATE_MODULES:
            delattr(model.base_model, name)
        model.config.thinking_residual_enabled = False
        apart = (gated.gather(-1, chosen) - plain.gather(-1, chosen)).abs()
        found[f"{r_min} to {r_max}"] = {
            "logp_mean": apart.mean().item(),
            "logp_max": apart.max().item(),
            "kl": (plain.exp() * (plain - gated)).sum(-1).mean().item(),
            "same_argmax": (plain.argmax(-1) == gated.argmax(-1)).float().mean().item(),
        }
    return found


def report(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    heads = list(result["errors"])
    lines = [
        f"`{result['command']}` at {result['commit']}: {EMBEDDED_MODEL} float32, {result['distributions']} "
        f"distributions a temperature; {result['machine']['device']}, {result['machine']['threads']} threads, torch "
        f"{result['machine']['torch']}.",
        "",
        "| k | " + " | ".join(f"error at T = {head}: mean / 95th percentile / largest" for head in heads) + " | ms |",
        "|---|" + "---|" * len(heads) + "---|",
    ]
    for size in SIZES:
        cells = [result["errors"][head][size] for head in heads]
        told = " | ".join(f"{cell['mean']:.1%} / {cell['p95']:.1%} / {cell['max']:.1%}" for cell in cells)
        lines.append(f"| {size} | {told} | {result['times'][f'top {size}']:.2f} |")
    lines += [
        f"| whole | 0 | {'0 | ' * (len(heads) - 1)}{result['times']['whole']:.2f} |",
        "",
        f"A softmax of the same 8 rows takes {result['times']['softmax']:.2f} ms.",
        "",
        "| r_min to r_max | log-prob of the sampled token, apart: mean / largest | KL, nats | same likeliest token |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {bounds} | {far['logp_mean']:.4f} / {far['logp_max']:.3f} | {far['kl']:.2e} | {far['same_argmax']:.2%} |"
        for bounds, far in result["closeness"].items()
    ]
    return "\n".join(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_paths", type=int, default=4, help="paths of each of the three questions")
    parser.add_argument("--length", type=int, default=48, help="new tokens per path")
    parser.add_argument("--thought_top_k", type=int, default=64, help="k of the gate's thoughts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=EMBEDDED_MODEL, dtype="float32"))
    model.eval()
    embedding, found = model.get_input_embeddings(), {}
    for temperature in (0.5, 1.0):
        output, probs = rollouts(model, tokenizer, temperature, args)
        found[str(temperature)] = errors(probs, embedding)
    result = {
        "command": " ".join(["python benchmarks/thoughts.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "distributions": len(probs),
        "errors": found,
        "times": times(output.scores[-1][:8], embedding),
        "closeness": closeness(model, output, probs, args),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "thoughts-cpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "thoughts-cpu.md").write_text(report(result) + "\n", encoding="utf-8")
    print(report(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
