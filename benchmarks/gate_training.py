# SPDX-License-Identifier: Apache-2.0
"""Whether the gates that learn do: twenty steps on the demo's problems, in every way they can be trained.

Each run is one of `m3po_lab.train`. Then the trained gate and its start read the same distributions, of real rollouts
of the start model: how far have the parameters moved, and how far the attention weights, in units of float noise (the
largest difference between fp32 and float64)?
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from rollout import commit, machine, write_results
from transformers import AutoModelForCausalLM
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.gating import create_gating_function, list_gating_functions
from transformers.m3po.gating.base import attention_weights
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.gating.module import attach_gating
from transformers.m3po.settings import DEFAULT_THOUGHT_TOP_K
from trl import ModelConfig

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

CONFIG = "configs/demo_short.yaml"


def real_distributions(model: Any, tokenizer: Any, num_paths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of two groups of paths over 24 steps: probabilities and ids (T * G, N, K)."""
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=2, seed=0)
    chats = [[{"role": "user", "content": problems[index]["question"]}] for index in range(2)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    kept: list[Any] = []
    baseline = create_gating_function("baseline")

    def keep(probs: torch.Tensor) -> torch.Tensor:
        kept.append(probs.topk(DEFAULT_THOUGHT_TOP_K, dim=-1))
        return baseline(probs)

    torch.manual_seed(0)
    settings = ThinkingSettings(cross_path_phase="all")
    model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=num_paths,
        max_new_tokens=24,
        min_new_tokens=24,
        m3po=M3POGenerationState(settings=settings, tokenizer=tokenizer, gating_function=keep),
    )
    return torch.cat([part.values for part in kept]), torch.cat([part.indices for part in kept])


@torch.no_grad()
def attention(gate: Any, embed: Any, probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A at the gate's default temperature, in the dtype of the gate."""
    similarity = gate.compute_similarity_matrix(probs, ids, embed)
    everyone = torch.ones(similarity.shape[:-1], dtype=torch.bool)
    return attention_weights(similarity, everyone, gate.default_temperature)[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num_paths", type=int, default=4, help="N; a step has two groups")
    parser.add_argument("--folder", type=Path, default=PROJECT_ROOT / "runs" / "gate-training", help="of the runs")
    parser.add_argument("--name", default="gate-training-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=EMBEDDED_MODEL, dtype="float32"))
    probs, ids = real_distributions(model.eval(), tokenizer, args.num_paths)
    embed = model.get_input_embeddings()
    rows: list[dict[str, Any]] = []
    for gating_name in (name for name in list_gating_functions() if gating_class(name).learnable):
        for projects in (False, True):
            options = {"project_embeddings": projects}
            attach_gating(model, gating_name, options, seed=0)
            start: Any = model.base_model.m3po_gating
            before = attention(start, embed, probs, ids)
            named = {name: value.detach().clone() for name, value in start.named_parameters()}
            exact = attention(start.double(), lambda rows: embed(rows).double(), probs.double(), ids)
            noise = (before - exact).abs().max().item()
            for training in ("embeddings", "logits"):
                folder = args.folder / f"{gating_name}-{'embeddings' if projects else 'vocabulary'}-{training}"
                if not (folder / "summary.json").is_file():
                    words = [sys.executable, "-m", "m3po_lab.train", CONFIG, "--mode", "m3po", "--overwrite", "true"]
                    words += ["--gating_type", gating_name, "--gating_config", json.dumps(options)]
                    words += ["--gating_training", training, "--max_steps", str(args.steps), "--save_steps", "20"]
                    words += ["--per_device_train_batch_size", str(2 * args.num_paths), "--num_eval_problems", "2"]
                    words += ["--num_generations", str(args.num_paths), "--output_dir", str(folder)]
                    subprocess.run(words, check=True, cwd=PROJECT_ROOT)
                trained = AutoModelForCausalLM.from_pretrained(folder / "final").base_model.m3po_gating
                moved = (attention(trained, embed, probs, ids) - before).abs().max().item()
                now = dict(trained.named_parameters())
                steps = {name: (now[name] - value).norm() for name, value in named.items()}
                distances = {name: (steps[name] / value.norm()).item() for name, value in named.items()}
                size = torch.stack([value.norm() for value in named.values()]).norm()
                rows.append(
                    {
                        "gate": gating_name,
                        "reads": "embeddings" if projects else "vocabulary",
                        "gating_training": training,
                        "gate_moved": (torch.stack([*steps.values()]).norm() / size).item(),
                        "parameters_moved": distances,
                        "attention_moved": moved,
                        "float_noise": noise,
                    }
                )
    result = {
        "command": " ".join(["python benchmarks/gate_training.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "rows": rows,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: {args.steps} steps of {CONFIG} with two groups of "
        f"{args.num_paths} completions each, seed 0. The distributions that both gates read are {len(probs)} groups of "
        f"the start model; {machine()['device']}, torch {machine()['torch']}.",
        "",
        "| gate | reads | `gating_training` | the gate moved, relative | each parameter | largest change of a weight "
        "of A | float noise | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parameters = ", ".join(f"{name} {value:.2g}" for name, value in row["parameters_moved"].items())
        moved, noise = row["attention_moved"], row["float_noise"]
        lines.append(
            f"| `{row['gate']}` | {row['reads']} | {row['gating_training']} | {row['gate_moved']:.2g} | {parameters} | "
            f"{moved:.2g} | {noise:.1g} | {moved / noise:.0f} |"
        )
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
