# SPDX-License-Identifier: Apache-2.0
"""Episodes of a controller per second: many (problem, gate) pairs in one batch over one pair at a time.

A NanoChat of the size of configs/mhc_arithmetic.yaml with random weights (the time does not depend on them), and that
configuration's problems. Both sides are the environments that a controller is trained in, with the same pairs in turn
in one process as in `rollout.py`: `GateVecEnv`, and `GSM8KMHCEnv` step by step.
"""

import argparse
import os
import sys
from typing import Any

import numpy as np
import torch
import yaml
from rollout import commit, in_turn, machine, write_results

from m3po_lab.controller.environment import GateVecEnv, GSM8KMHCEnv, Standard
from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.gates import GateSpace
from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.pretraining.arguments import PretrainArguments
from m3po_lab.pretraining.data import byte_tokenizer
from m3po_lab.pretraining.model import make_model
from m3po_lab.problems.arguments import DataArguments
from m3po_lab.problems.data import load_problems

CONFIG = "configs/mhc_arithmetic.yaml"
TARGET = 10
SHOWN = {"dense": "one forward", "exact": "a generation of at most {} tokens"}


def build(problems: int, max_new_tokens: int, model_dim: int | None = None) -> Episodes:
    """The episodes of the configuration, a gate for each layer; another width than its on request."""
    values = yaml.safe_load((PROJECT_ROOT / CONFIG).read_text(encoding="utf-8"))
    names = [name for name in values if name in PretrainArguments.__dataclass_fields__]
    values |= {} if model_dim is None else {"model_dim": model_dim}
    script = PretrainArguments(mhc_enabled=True, **{name: values[name] for name in names})
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = make_model(script, 320, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(script.dataset_config, dict)
    chosen, _ = load_problems(
        DataArguments(dataset=script.dataset, dataset_config=script.dataset_config, num_train_problems=problems)
    )
    return Episodes(model, tokenizer, chosen, GateSpace("layer", script.depth), max_new_tokens)


def measure(episodes: Episodes, reward: str, pairs: int) -> dict[str, Any]:
    """The two environments in turn on the same pairs, one of each problem."""
    embeddings = episodes.embeddings()
    seen = Standard.of(embeddings)(embeddings)
    shape = len(embeddings), episodes.space.size
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    one, many = GSM8KMHCEnv(episodes, seen, reward), GateVecEnv(episodes, seen, len(embeddings), reward)
    many.reset()

    def sequential() -> None:
        for problem, action in enumerate(actions):
            one.reset(options={"problem": problem})
            one.step(action)

    def batched() -> None:
        many.step_async(actions)
        many.step_wait()

    return in_turn(sequential, batched, pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs_at_once", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[128, 64], help="hidden sizes; the first is the one of the target"
    )
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements")
    parser.add_argument("--name", default="controller-episodes-cpu", help="of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    speed: dict[str, dict[str, Any]] = {}
    for width in args.widths:
        episodes = build(args.pairs_at_once, args.max_new_tokens, width)
        speed[str(width)] = {reward: measure(episodes, reward, args.pairs) for reward in SHOWN}
    result = {
        "command": " ".join(["python benchmarks/controller_episodes.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "load_average_before": load,
        **{name: getattr(args, name) for name in ("pairs_at_once", "max_new_tokens", "widths", "pairs")},
        "target": TARGET,
        "speed": speed,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: the model of {CONFIG} in float32, {args.pairs_at_once} pairs of "
        f"problem and gate; {result['machine']['device']}, {result['machine']['threads']} threads, torch "
        f"{result['machine']['torch']}; load average before {load:.1f}.",
        "",
        "| width | reward | one at a time, episodes/s | batched, episodes/s | batched over one at a time, median of "
        f"{args.pairs} (min to max) | target |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {width} | {reward}, {SHOWN[reward].format(args.max_new_tokens)} | "
        f"{args.pairs_at_once / one['plain_seconds']:.0f} | {args.pairs_at_once / one['mode_seconds']:.0f} | "
        f"{one['ratio_median']:.1f} ({one['ratio_min']:.1f} to {one['ratio_max']:.1f}) | "
        f"{TARGET if reward == 'dense' and width == str(args.widths[0]) else '-'} |"
        for width, of in speed.items()
        for reward, one in of.items()
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
