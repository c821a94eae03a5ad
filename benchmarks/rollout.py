# SPDX-License-Identifier: Apache-2.0
"""What a mode costs in a rollout: tokens/s and memory of `generate` in it over plain `generate`.

Same model, prompts, number of paths and lengths; the two run in turn in one process, plain and mode changing places
from pair to pair, after a warm-up of each, and the medians over the pairs are reported, for one mode after the other.
Memory is the largest number of bytes of tensors alive at once (`live_bytes.py`; on CUDA the allocator's own peak); what
a mode adds is shown at several lengths beside the size of its preallocated record, so that growth with the step would
be seen. A table goes to standard output, the figures with machine and command to `benchmarks/results/` (`make bench`).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from live_bytes import LiveBytes
from tqdm import tqdm
from transformers.m3po import M3POGenerationState, ThinkingSettings
from transformers.m3po.settings import RESIDUAL_MODES
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

RESULTS = Path(__file__).parent / "results"
KIB = 1 << 10


def peak_bytes(function: Any, *arguments: Any, device: torch.device) -> tuple[Any, int]:
    """What the call returns, and the peak of the tensors it made."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(*arguments), torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        result = function(*arguments)
    return result, memory.peak


def rollout(model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace, length: int, mode: str) -> Any:
    """One `generate` of exactly `length` new tokens per path: its output, and the state of a mode other than `none`."""
    torch.manual_seed(args.seed)
    state = None
    if mode != "none":
        state = M3POGenerationState(settings=ThinkingSettings(mode=mode), tokenizer=tokenizer)
    model.config.thinking_residual_enabled = mode in RESIDUAL_MODES
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=args.num_paths,
        max_new_tokens=length,
        min_new_tokens=length,
        return_dict_in_generate=True,
        m3po=state,
    )
    if inputs["input_ids"].device.type == "cuda":
        torch.cuda.synchronize()
    return output, state


def seconds(function: Any, *arguments: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def in_turn(plain: Any, other: Any, pairs: int) -> dict[str, Any]:
    """Seconds of two calls that run in turn after a warm-up of each, and their ratio pair by pair."""
    calls = {"plain": plain, "other": other}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for pair in tqdm(range(pairs), desc="pairs", disable=None):
        for name in calls if pair % 2 == 0 else reversed(calls):
            times[name].append(seconds(calls[name]))
    ratios = [plain / other for plain, other in zip(times["plain"], times["other"], strict=True)]
    return {
        "plain_seconds": statistics.median(times["plain"]),
        "mode_seconds": statistics.median(times["other"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def measure_memory(
    model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace, mode: str
) -> list[dict[str, Any]]:
    """Peak memory of both at several lengths, with the size of the record."""
    rows = []
    for length in tqdm((args.length // 2, args.length, args.length * 2), desc="memory", disable=None):
        peaks = {}
        for kind in ("none", mode):
            (_, state), peaks[kind] = peak_bytes(
                rollout, model, tokenizer, inputs, args, length, kind, device=model.device
            )
        rows.append(
            {
                "length": length,
                "plain_bytes": peaks["none"],
                "mode_bytes": peaks[mode],
                "record_bytes": state.record_bytes,
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    tokens = result["num_prompts"] * result["num_paths"] * result["length"]
    lines = [
        f"| mode | plain, tokens/s | mode, tokens/s | ratio, median of {result['pairs']} pairs (min to max) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{mode}` | {tokens / speed['plain_seconds']:.1f} | {tokens / speed['mode_seconds']:.1f} | "
        f"{speed['ratio_median']:.3f} ({speed['ratio_min']:.3f} to {speed['ratio_max']:.3f}) |"
        for mode, speed in result["speed"].items()
    ]
    lines += [
        "",
        "| mode | new tokens per path | plain peak, MiB | added, KiB | of it the record, KiB | the rest, KiB |",
        "|---|---|---|---|---|---|",
    ]
    for mode, rows in result["memory"].items():
        for row in rows:
            added = row["mode_bytes"] - row["plain_bytes"]
            lines.append(
                f"| `{mode}` | {row['length']} | {row['plain_bytes'] / KIB / KIB:.1f} | {added / KIB:.1f} | "
                f"{row['record_bytes'] / KIB:.1f} | {(added - row['record_bytes']) / KIB:.1f} |"
            )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit of the project, with a mark when files differ from it."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def write_results(name: str, result: dict[str, Any], lines: list[str]) -> None:
    """Writes the figures as JSON and Markdown under `benchmarks/results/`, and prints the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(lines)
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modes", nargs="+", default=["m3po", "hrpo", "h3po"])
    parser.add_argument("--num_prompts", type=int, default=1)
    parser.add_argument("--num_paths", type=int, default=8, help="N, the paths of a group")
    parser.add_argument("--length", type=int, default=64, help="new tokens per path")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs, at least 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="rollout-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    attach_residual_gate(model, r_min=0.99, r_max=0.999, seed=args.seed)  # off but in the modes that have it
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prompts = [f"What is {3 * i + 17} + {5 * i + 8}? Explain it step by step." for i in range(args.num_prompts)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(model.device)
    given = (model, tokenizer, inputs, args)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/rollout.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "model": args.model_name_or_path,
        "dtype": args.dtype,
        "num_prompts": args.num_prompts,
        "num_paths": args.num_paths,
        "length": args.length,
        "pairs": args.pairs,
        "speed": {
            mode: in_turn(
                partial(rollout, *given, args.length, "none"), partial(rollout, *given, args.length, mode), args.pairs
            )
            for mode in args.modes
        },
        "memory": {mode: measure_memory(*given, mode) for mode in args.modes},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = (
        f"`{result['command']}` at {result['commit']}: {args.model_name_or_path} {args.dtype}, {args.num_prompts} "
        f"prompt(s) x {args.num_paths} paths x {args.length} tokens, {result['machine']['device']}, "
        f"{result['machine']['threads']} threads, torch {result['machine']['torch']}.\n\n"
    )
    (RESULTS / f"{args.name}.md").write_text(head + table(result) + "\n", encoding="utf-8")
    print(head + table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
