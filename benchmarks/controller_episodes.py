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


def build(problems: int, max_new_tokens: int) -> Episodes:
    """The episodes of the configuration, a gate for each layer."""
    values = yaml.safe_load((PROJECT_ROOT / CONFIG).read_text(encoding="utf-8"))
    names = [name for name in values if name in PretrainArguments.__dataclass_fields__]
    script = PretrainArguments(mhc_enabled=True, **{name: values[name] for name in names})
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = make_model(script, 320, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(script.dataset_config, dict)
    chosen, _ = load_problems(
        DataArguments(dataset=script.dataset, dataset_config=script.dataset_config, num_train_problems=problems)
    )
    return Episodes(model, tokenizer, chosen, GateSpace("layer", script.depth), max_new_tokens)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs_at_once", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements")
    parser.add_argument("--name", default="controller-episodes-cpu", help="of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    episodes = build(args.pairs_at_once, args.max_new_tokens)
    embeddings = episodes.embeddings()
    seen = Standard.of(embeddings)(embeddings)
    actions = np.random.default_rng(0).uniform(-1, 1, (args.pairs_at_once, episodes.space.size)).astype(np.float32)
    speed: dict[str, Any] = {}
    for reward in SHOWN:
        one = GSM8KMHCEnv(episodes, seen, reward)
        many = GateVecEnv(episodes, seen, args.pairs_at_once, reward)
        many.reset()

        def sequential(env: GSM8KMHCEnv = one) -> None:
            for problem, action in enumerate(actions):
                env.reset(options={"problem": problem})
                env.step(action)

        def batched(env: GateVecEnv = many) -> None:
            env.step_async(actions)
            env.step_wait()

        speed[reward] = in_turn(sequential, batched, args.pairs)
    result = {
        "command": " ".join(["python benchmarks/controller_episodes.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "load_average_before": load,
        **{name: getattr(args, name) for name in ("pairs_at_once", "max_new_tokens", "pairs")},
        "target": TARGET,
        "speed": speed,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: the model of {CONFIG} in float32, {args.pairs_at_once} pairs of "
        f"problem and gate; {result['machine']['device']}, {result['machine']['threads']} threads, torch "
        f"{result['machine']['torch']}; load average before {load:.1f}.",
        "",
        "| reward | one at a time, episodes/s | batched, episodes/s | batched over one at a time, median of "
        f"{args.pairs} (min to max) | target |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {reward}, {SHOWN[reward].format(args.max_new_tokens)} | {args.pairs_at_once / one['plain_seconds']:.0f} | "
        f"{args.pairs_at_once / one['mode_seconds']:.0f} | {one['ratio_median']:.1f} ({one['ratio_min']:.1f} to "
        f"{one['ratio_max']:.1f}) | {TARGET if reward == 'dense' else '-'} |"
        for reward, one in speed.items()
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
