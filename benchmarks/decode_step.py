# SPDX-License-Identifier: Apache-2.0
"""What a decode step spends its time on, operation by operation, with torch's profiler.

A rollout of groups by `generate` as a training with `shared_prefix` makes it, and one as TRL makes it, each from the
cache of its own prefill, which is left out.
"""

import argparse
import sys
import time
from typing import Any

import torch
from rollout import commit, machine, write_results
from torch.profiler import profile
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.shared_prefix import shared_prefill
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

# What an operation is for, by the beginning of its name; the rest is the sum of small ones.
KINDS = {
    "linear layers and head": ("aten::mm", "aten::addmm", "mkl::_mkl_linear"),
    "packing of their weights, once a rollout": ("mkl::_mkl_reorder_linear_weight",),
    "attention": ("aten::_scaled_dot_product", "aten::bmm"),
    "growth of the cache and other joining": ("aten::cat",),
    "copies": ("aten::copy_",),
    "the draw: one number for each token of each row": ("aten::exponential_", "aten::multinomial", "aten::argmax"),
    "the draw: running sums": ("aten::cumsum", "aten::sum", "aten::searchsorted"),
    "softmax": ("aten::_softmax",),
    "norms, activations, rotary positions": ("aten::mul", "aten::add", "aten::pow", "aten::mean", "aten::silu"),
}


def decode(model: Any, prompts: dict[str, torch.Tensor], args: argparse.Namespace, tokenizer: Any, mine: bool) -> Any:
    """One rollout from a cache; its seconds and the profiler's events."""
    settings = ThinkingSettings(mode="m3po", cross_path_phase="all")
    groups = torch.arange(len(prompts["input_ids"])) // args.num_paths
    state = M3POGenerationState(settings=settings, tokenizer=tokenizer, group_ids=groups, inverse_cdf=mine)
    if mine:
        given = prompts | shared_prefill(model, prompts["input_ids"], prompts["attention_mask"], args.num_paths)
    else:
        with torch.no_grad():
            read = model(input_ids=prompts["input_ids"][:, :-1], use_cache=True, logits_to_keep=1)
        given = prompts | {"past_key_values": read.past_key_values}
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    with profile() as events:
        model.generate(**given, m3po=state, do_sample=True, top_k=0, max_new_tokens=args.length, eos_token_id=-1)
    return time.perf_counter() - start, events.key_averages()


def shares(events: Any) -> dict[str, float]:
    """The share of each kind of operation in the time that operations take."""
    total = sum(event.self_cpu_time_total for event in events)
    found = {
        kind: sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / total
        for kind, names in KINDS.items()
    }
    return found | {"the rest": 1.0 - sum(found.values())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_paths", type=int, default=8, help="N")
    parser.add_argument("--prompt", type=int, default=70, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=20, help="new tokens per path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="decode-step-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    torch.manual_seed(args.seed)
    ids = torch.randint(1000, 4000, (args.num_prompts, args.prompt)).repeat_interleave(args.num_paths, 0)
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    figures = {}
    for name, mine in (("warm-up", True), ("false", False), ("auto", True)):
        seconds, events = decode(model, prompts, args, tokenizer, mine)
        figures[name] = {"seconds": seconds, "shares": shares(events)}
    del figures["warm-up"]
    result = {
        "command": " ".join(["python benchmarks/decode_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        **{name: getattr(args, name) for name in ("num_prompts", "num_paths", "prompt", "length", "dtype")},
        "figures": figures,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: {len(ids)} rows, {args.length} steps, mode `m3po`, "
        f"{args.model_name_or_path} {args.dtype}; {result['machine']['device']}, {result['machine']['threads']} "
        f"threads, torch {result['machine']['torch']}. `auto` attends by products, softmax and joining.",
        "",
        "| operations | `shared_prefix: false` | `auto` |",
        "|---|---|---|",
        *(
            f"| {kind} | {figures['false']['shares'][kind]:.1%} | {figures['auto']['shares'][kind]:.1%} |"
            for kind in figures["auto"]["shares"]
        ),
        f"| seconds a step, under the profiler | {figures['false']['seconds'] / args.length:.3f} | "
        f"{figures['auto']['seconds'] / args.length:.3f} |",
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
