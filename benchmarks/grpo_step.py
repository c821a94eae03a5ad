# SPDX-License-Identifier: Apache-2.0
"""What a whole optimizer step of GRPO costs with the prompts of the groups shared (`shared_prefix`).

Rollout, scoring, backward and update by the real trainer, in turn: pristine TRL in a process of its own (the peer), and
the patched one with `auto` and, where asked for, with `false`. One process works at a time. The medians over the rounds
are reported, with the ratio to pristine TRL in the same round, the share of each phase and the peak of the tensors that
a step makes. No step is left out: the first of each process allocates what the others have, in the peer too.
The model is full fine-tuned. On a CPU pristine TRL cannot score at all: it gets our scoring function and nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rollout import commit, machine, write_results
from tqdm import tqdm
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("grpo_step_worker.py")
# Groups, rows of a micro-batch, tokens of a prompt, of these the same in all prompts (three quarters, as 36 of 48 in
# configs/demo.yaml), tokens of a completion. With one group it does not matter what prompts have in common.
SHAPES: dict[str, dict[str, int]] = {
    "demo": {"groups": 8, "micro_batch": 64, "prompt": 70, "common": 52, "completion": 20},
    "gsm8k": {"groups": 1, "micro_batch": 8, "prompt": 150, "common": 0, "completion": 200},
    "few-shot": {"groups": 1, "micro_batch": 8, "prompt": 700, "common": 0, "completion": 100},
}
# The answer marker is one that no random text meets, so that all positions think.
THINKING = {"answer_start": "####", "cross_path_phase": "all"}
MODES: dict[str, dict[str, Any]] = {
    "m3po": {"mode": "m3po", **THINKING},
    "none": {"mode": "none"},
    "hrpo": {"mode": "hrpo", **THINKING},
    "h3po": {"mode": "h3po", **THINKING},
    "m3po with ASLR": {"mode": "m3po", "aslr_enabled": True, **THINKING},
}
PHASES = ("rollout", "scoring", "backward", "update")


class Worker:
    """A trainer in a process of its own, see `grpo_step_worker.py`."""

    def __init__(self, spec: dict[str, Any], path: str | None) -> None:
        env = os.environ | ({} if path is None else {"PYTHONPATH": os.pathsep.join([path, str(WORKER.parent)])})
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(spec)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "QUIET" in os.environ else None,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def step(self, words: str) -> dict[str, float]:
        """One step; its seconds by phase."""
        self._to.write(words + "\n")
        self._to.flush()
        for line in self._from:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"a worker ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        self._to.close()
        self._process.wait()


def pristine_path(folder: Path) -> str:
    """The pinned wheels, unpacked."""
    for name in ("transformers", "trl"):
        (wheel,) = sorted((ROOT / ".cache" / "wheels").glob(f"{name}-*.whl"))[-1:]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return str(folder)


def measure(peer: Worker, ours: Worker, kinds: list[str], rounds: int, with_memory: bool) -> dict[str, Any]:
    """The figures of one mode and shape: rounds of a step of each kind, in an order that rotates.

    Memory takes another step of each, which is several times slower.
    """
    calls = {"TRL": (peer, "plain")} | {kind: (ours, kind) for kind in kinds}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        turn = number % len(calls)
        for name in [*calls][turn:] + [*calls][:turn]:
            worker, word = calls[name]
            times[name].append(worker.step(word))
    figures: dict[str, Any] = {}
    for name, (worker, word) in calls.items():
        steps = times[name]
        figures[name] = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in ("seconds", *PHASES)}
        if with_memory:
            figures[name]["bytes"] = worker.step(f"memory {word}")["bytes"]
        ratios = [base["seconds"] / step["seconds"] for base, step in zip(times["TRL"], steps, strict=True)]
        figures[name] |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return figures


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        f"`{result['command']}` at {result['commit']}: {result['model_name_or_path']} {result['dtype']}"
        f"{' with bf16 autocast' if result['bf16'] else ''}, groups of {result['num_paths']}; "
        f"{result['machine']['device']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}. "
        f"Median of {result['rounds']} interleaved rounds; speed is pristine TRL's time over this one's in the same "
        "round (smallest to largest); peak is what the tensors made in a step hold at most.",
    ]
    for name, modes in result["figures"].items():
        shape = result["shapes"][name]
        lines += [
            "",
            f"{name}: {shape['groups']} prompts of {shape['prompt']} tokens, the first {shape['common']} the same in "
            f"all, completions of {shape['completion']}",
            "",
            "| mode | `shared_prefix` | s a step | speed | "
            + " | ".join(f"{phase}, s" for phase in PHASES)
            + " | peak |",
            "|---|---|---|---|" + "---|" * len(PHASES) + "---|",
        ]
        for mode, figures in modes.items():
            for kind, one in figures.items():
                spread = (
                    "1" if kind == "TRL" else f"{one['ratio']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"
                )
                lines.append(
                    f"| {mode if kind != 'TRL' else 'pristine TRL'} | {kind if kind != 'TRL' else ''} | "
                    f"{one['seconds']:.2f} | {spread} | "
                    + " | ".join(f"{one[phase]:.2f}" for phase in PHASES)
                    + (f" | {one['bytes'] / 2**30:.2f} GiB |" if "bytes" in one else " | |")
                )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--modes", nargs="+", default=[*MODES], choices=[*MODES])
    parser.add_argument("--shared_prefix", nargs="+", default=["auto"], choices=["false", "auto"], help="of our steps")
    parser.add_argument("--num_paths", type=int, default=8, help="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="count tensors too, in steps that take minutes")
    parser.add_argument("--name", default="grpo-step-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        wheels = pristine_path(Path(folder, "wheels"))
        figures: dict[str, Any] = {}
        for name in tqdm(args.shapes, desc="shapes", disable=None):
            spec = {"model": folder, "dtype": args.dtype, "bf16": args.bf16, "paths": args.num_paths, **SHAPES[name]}
            spec |= {"folder": str(Path(folder, "run")), "flags": {}}
            peer = Worker(spec, wheels)
            figures[name] = {}
            for mode in tqdm(args.modes, desc=name, disable=None):
                ours = Worker(spec | {"flags": MODES[mode] | {"shared_prefix": "true"}}, None)
                figures[name][mode] = measure(
                    peer, ours, args.shared_prefix, args.rounds, args.memory and mode == args.modes[0]
                )
                ours.close()
            peer.close()
    result = {
        "command": " ".join(["python benchmarks/grpo_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        **{name: getattr(args, name) for name in ("model_name_or_path", "dtype", "bf16", "num_paths", "rounds")},
        "shapes": {name: SHAPES[name] for name in args.shapes},
        "figures": figures,
    }
    write_results(args.name, result, table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
