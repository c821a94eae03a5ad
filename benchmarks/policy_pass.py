# SPDX-License-Identifier: Apache-2.0
"""What a mode costs in the policy pass: forward and backward of the scoring pass with bags over the same without.

The same rows of the trainer's shape, in turn in one process as in `rollout.py`. Bags are those of a rollout of the mode
(`make bench`); the model is fully trained, so gradient flows through the bags into the embeddings and into the gate.
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch
from rollout import commit, in_turn, machine, rollout, write_results
from transformers.m3po.settings import RESIDUAL_MODES
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model


def scoring_pass(model: Any, inputs: dict[str, torch.Tensor], completion: int, gated: bool) -> None:
    """Log-probs of the completion and their gradient."""
    model.config.thinking_residual_enabled = gated
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, logits_to_keep=completion + 1).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -completion:, None])
    logps.mean().backward()
    if logits.device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modes", nargs="+", default=["m3po", "hrpo", "h3po"])
    parser.add_argument("--num_paths", type=int, default=8, help="N, the rows of the pass")
    parser.add_argument("--length", type=int, default=64, help="completion tokens per row")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of passes, at least 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="policy-pass-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    attach_residual_gate(model, r_min=0.99, r_max=0.999, seed=args.seed)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    chat = [{"role": "user", "content": "What is 17 + 8? Explain it step by step."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    speed = {}
    for mode in args.modes:
        with torch.no_grad():
            output, state = rollout(model, tokenizer, prompt.to(model.device), args, args.length, mode)
        plain = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
        bags = {"thinking_bag_ids": state.bag_ids, "thinking_bag_weights": state.bag_weights}
        one = partial(scoring_pass, model, completion=args.length)
        speed[mode] = in_turn(
            partial(one, inputs=plain, gated=False),
            partial(one, inputs=plain | bags, gated=mode in RESIDUAL_MODES),
            args.pairs,
        )
    result = {
        "command": " ".join(["python benchmarks/policy_pass.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        **{name: getattr(args, name) for name in ("model_name_or_path", "dtype", "num_paths", "length", "pairs")},
        "speed": speed,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: {args.model_name_or_path} {args.dtype}, {args.num_paths} rows "
        f"of {plain['input_ids'].shape[1]} tokens, {args.length} of them the completion; "
        f"{result['machine']['device']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}.",
        "",
        f"| mode | plain, s | with bags, s | ratio, median of {args.pairs} pairs (min to max) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{mode}` | {one['plain_seconds']:.2f} | {one['mode_seconds']:.2f} | "
        f"{one['ratio_median']:.3f} ({one['ratio_min']:.3f} to {one['ratio_max']:.3f}) |"
        for mode, one in speed.items()
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
