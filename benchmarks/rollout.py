# SPDX-License-Identifier: Apache-2.0
"""What cross-path interaction costs in a rollout: tokens/s and memory of `generate` with it over plain `generate`.

Same model, prompts, number of paths and lengths; the two run in turn in one process, plain and cross-path changing
places from pair to pair, after a warm-up of each, and the medians over the pairs are reported. Memory is the largest
number of bytes of tensors alive at once (`live_bytes.py`; on CUDA the allocator's own peak); what cross-path adds is
shown at several lengths beside the size of its preallocated record, so that growth with the step would be seen. A table
goes to standard output, the figures with machine and command to
`benchmarks/results/` (`make bench`).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from live_bytes import LiveBytes
from tqdm import tqdm
from trl import ModelConfig

from m3po_lab.models import EMBEDDED_MODEL, load_model

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


def rollout(model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace, length: int, cross_path: bool) -> Any:
    """One `generate` of exactly `length` new tokens per path; the state object when `cross_path` is set."""
    torch.manual_seed(args.seed)
    flags = {"enable_cross_path": True, "cross_path_lambda": 0.1, "tokenizer": tokenizer} if cross_path else {}
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=args.num_paths,
        max_new_tokens=length,
        min_new_tokens=length,
        return_dict_in_generate=True,
        **flags,
    )
    if inputs["input_ids"].device.type == "cuda":
        torch.cuda.synchronize()
    return output


def seconds(function: Any, *arguments: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure_speed(model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both, and their ratio pair by pair."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for cross_path in (False, True):
        rollout(model, tokenizer, inputs, args, args.length, cross_path)
    for pair in tqdm(range(args.pairs), desc="pairs", disable=None):
        for cross_path in (False, True) if pair % 2 == 0 else (True, False):
            times[cross_path].append(seconds(rollout, model, tokenizer, inputs, args, args.length, cross_path))
    tokens = args.num_prompts * args.num_paths * args.length
    ratios = [plain / crossed for plain, crossed in zip(times[False], times[True], strict=True)]
    return {
        "plain_tokens_per_second": tokens / statistics.median(times[False]),
        "cross_path_tokens_per_second": tokens / statistics.median(times[True]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def measure_memory(model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of both at several lengths, with the size of the record."""
    rows = []
    for length in tqdm((args.length // 2, args.length, args.length * 2), desc="memory", disable=None):
        peaks = {}
        for cross_path in (False, True):
            output, peaks[cross_path] = peak_bytes(
                rollout, model, tokenizer, inputs, args, length, cross_path, device=model.device
            )
        tensors = (output.bag_ids, output.bag_weights, output.rollout_logps, output.thinking_mask)
        rows.append(
            {
                "length": length,
                "plain_bytes": peaks[False],
                "cross_path_bytes": peaks[True],
                "record_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    speed = result["speed"]
    lines = [
        "| | tokens/s |",
        "|---|---|",
        f"| plain `generate` | {speed['plain_tokens_per_second']:.1f} |",
        f"| cross-path (`m3po`) | {speed['cross_path_tokens_per_second']:.1f} |",
        f"| ratio, median of {result['pairs']} pairs (min to max) | {speed['ratio_median']:.3f} "
        f"({speed['ratio_min']:.3f} to {speed['ratio_max']:.3f}) |",
        "",
        "| new tokens per path | plain peak, MiB | added by cross-path, KiB | of it the record, KiB | the rest, KiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["memory"]:
        added = row["cross_path_bytes"] - row["plain_bytes"]
        lines.append(
            f"| {row['length']} | {row['plain_bytes'] / KIB / KIB:.1f} | {added / KIB:.1f} | "
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


def _commit() -> str:
    """The commit of the project, with a mark when files differ from it."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_prompts", type=int, default=1)
    parser.add_argument("--num_paths", type=int, default=8, help="N, the paths of a group")
    parser.add_argument("--length", type=int, default=64, help="new tokens per path")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs, at least 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="rollout-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prompts = [f"What is {3 * i + 17} + {5 * i + 8}? Explain it step by step." for i in range(args.num_prompts)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(model.device)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/rollout.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": _commit(),
        "machine": machine(),
        "model": args.model_name_or_path,
        "dtype": args.dtype,
        "num_prompts": args.num_prompts,
        "num_paths": args.num_paths,
        "length": args.length,
        "pairs": args.pairs,
        "speed": measure_speed(model, tokenizer, inputs, args),
        "memory": measure_memory(model, tokenizer, inputs, args),
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
