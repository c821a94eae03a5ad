# SPDX-License-Identifier: Apache-2.0
"""Rollouts by vLLM and by `generate`, plain and in each mode, at full length and with ragged ends, on a CPU.

Every engine of vLLM is a process of its own with the weights of the one model; plain is vLLM's own worker. All take
turns, a round after the other, with the same prompts, number of paths and lengths; tokens/s are of the medians, ratios
are taken round by round. `generate` reads a group's prompt once and draws by inverting the distribution function, as a
training does. A table goes to standard output, the figures to `benchmarks/results/`, both after each round. Needs
`make env EXTRA=vllm`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rollout import commit, machine, write_results
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.settings import RESIDUAL_MODES
from transformers.m3po.shared_prefix import shared_prefill
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

MODES = ("none", "m3po", "hrpo", "h3po")


class Lengths(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, prompt: int, lengths: torch.Tensor) -> None:
        self.prompt, self.lengths = prompt, lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1] - self.prompt


def by_generate(model: Any, tokenizer: Any, rows: list[list[int]], lengths: list[int], paths: int, mode: str) -> None:
    """One rollout of Transformers."""
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = None if mode == "none" else ThinkingSettings(mode=mode)
    groups = torch.arange(len(rows)) // paths
    state = M3POGenerationState(settings=settings, tokenizer=tokenizer, group_ids=groups, inverse_cdf=True)
    model.config.thinking_residual_enabled = mode in RESIDUAL_MODES
    inputs = {"input_ids": ids, "attention_mask": mask} | shared_prefill(model, ids, mask, paths, find_common=True)
    model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=max(lengths),
        eos_token_id=model.config.vocab_size,  # a token that there is not
        stopping_criteria=StoppingCriteriaList([Lengths(inputs["input_ids"].shape[1], torch.tensor(lengths))]),
        m3po=state,
    )


def by_vllm(llm: Any, rows: list[list[int]], lengths: list[int], paths: int, mode: str) -> None:
    """One rollout of an engine."""
    from m3po_vllm.requests import GROUP, PATH, PATHS
    from vllm import SamplingParams

    number = getattr(llm, "rollouts", 0)
    llm.rollouts = number + 1
    params = []
    for row, length in enumerate(lengths):
        tag = {PATHS: paths, GROUP: f"{number} {row // paths}", PATH: row % paths} if mode != "none" else {}
        params.append(SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, extra_args=tag))
    llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)


def engine(folder: str, mode: str, args: argparse.Namespace, architecture: str) -> Any:
    """An engine of vLLM, in a process of its own."""
    from m3po_vllm import engine_arguments
    from vllm import LLM

    thinking = {}
    if mode != "none":
        thinking = engine_arguments(ThinkingSettings(mode=mode).hyperparameters(), architecture)
    rows = args.num_prompts * args.num_paths
    size = {"max_model_len": 512, "max_num_seqs": rows, "max_num_batched_tokens": 64 * rows, "seed": args.seed}
    return LLM(folder, dtype=args.dtype, enforce_eager=True, **{**size, **thinking})


def table(result: dict[str, Any]) -> list[str]:
    """The figures as Markdown."""
    lines = []
    for shape, calls in result["seconds"].items():
        tokens = result["tokens"][shape]
        lines += [
            f"| {shape} | tokens/s | of plain vLLM | of `generate` in this mode |",
            "|---|---|---|---|",
        ]
        for name, times in calls.items():
            kind, mode = name.split(" ")
            ratios = [
                statistics.median([b / a for a, b in zip(times, calls[other], strict=True)]) if other in calls else None
                for other in ("vllm none", f"generate {mode}")
            ]
            shown = [f"{ratio:.2f}" if ratio is not None else "" for ratio in ratios]
            speed = tokens / statistics.median(times)
            lines.append(f"| {kind}, mode `{mode}` | {speed:.0f} | {shown[0]} | {shown[1]} |")
        lines.append("")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_paths", type=int, default=8, help="N, the paths of a group")
    parser.add_argument(
        "--length", type=int, default=128, help="new tokens per path; ragged ends are from an eighth on"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="vllm-rollouts-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    made = commit()  # before the files of the first round change the tree
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    model = model.eval()
    prompts = [f"What is {3 * i + 17} + {5 * i + 8}? Explain it step by step." for i in range(args.num_prompts)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    rows = [ids for ids in asked for _ in range(args.num_paths)]
    ragged = torch.linspace(args.length // 8, args.length, len(rows)).round().long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    shapes = {"full length": [args.length] * len(rows), "ragged ends": ragged[order].tolist()}
    with TemporaryDirectory() as folders:
        for name in ("plain", "gated"):
            if name == "gated":
                attach_residual_gate(model, r_min=0.99, r_max=0.999, seed=args.seed)
            model.save_pretrained(f"{folders}/{name}")
            tokenizer.save_pretrained(f"{folders}/{name}")
        calls: dict[str, Callable[[list[int]], None]] = {}
        for mode in tqdm(args.modes, desc="engines", disable=None):
            folder = f"{folders}/{'gated' if mode in RESIDUAL_MODES else 'plain'}"
            llm = engine(folder, mode, args, type(model).__name__)
            calls[f"vllm {mode}"] = partial(by_vllm, llm, rows, paths=args.num_paths, mode=mode)
            calls[f"generate {mode}"] = partial(by_generate, model, tokenizer, rows, paths=args.num_paths, mode=mode)
        with torch.inference_mode():
            for done, seconds in enumerate(measure(calls, shapes, args.rounds), 1):
                write(args, sys.argv[1:] if argv is None else argv, made, done, shapes, seconds)
    return 0


def write(
    args: argparse.Namespace,
    argv: list[str],
    made: str,
    rounds: int,
    shapes: dict[str, list[int]],
    seconds: dict[str, dict[str, list[float]]],
) -> None:
    """The figures of the rounds that are done, of the commit `made`."""
    result = {
        "command": " ".join(["python benchmarks/vllm_rollouts.py", *argv]),
        "commit": made,
        "machine": machine(),
        **vars(args),
        "rounds": rounds,
        "tokens": {shape: sum(lengths) for shape, lengths in shapes.items()},
        "seconds": seconds,
    }
    head = (
        f"`{result['command']}` at {made}: {args.model_name_or_path} {args.dtype}, {args.num_prompts} "
        f"prompts x {args.num_paths} paths x {args.length} tokens, {result['machine']['device']}, "
        f"{result['machine']['threads']} threads, torch {result['machine']['torch']}; {rounds} rounds."
    )
    write_results(args.name, result, [head, "", *table(result)[:-1]])


def measure(
    calls: dict[str, Callable[[list[int]], None]], shapes: dict[str, list[int]], rounds: int
) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Seconds of each call at each shape, after each round. All take turns behind a short warm-up, in turned order in
    every second round.
    """
    for call in calls.values():
        call([2] * len(next(iter(shapes.values()))))
    seconds: dict[str, dict[str, list[float]]] = {shape: {name: [] for name in calls} for shape in shapes}
    steps = [(number, shape, name) for number in range(rounds) for shape in shapes for name in calls]
    with tqdm(total=len(steps), desc="rollouts", disable=None) as bar:
        for number in range(rounds):
            for shape, lengths in shapes.items():
                for name in calls if number % 2 == 0 else reversed(calls):
                    start = time.perf_counter()
                    calls[name](lengths)
                    seconds[shape][name].append(time.perf_counter() - start)
                    bar.update()
            yield seconds


if __name__ == "__main__":
    raise SystemExit(main())
