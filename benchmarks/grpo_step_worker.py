# SPDX-License-Identifier: Apache-2.0
"""One trainer of `grpo_step.py` in a process of its own: it makes an optimizer step when it is told to.

It runs on the patched trees and on the pristine wheels alike, so it imports nothing of ours at the top. On standard
input it reads `false`, `auto` or `plain` and makes one step so, or `memory false` and the like for a step whose tensors
are counted, which is slow; it answers each with one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from live_bytes import LiveBytes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SCORING = Path(__file__).parents[1] / "overlay" / "trl" / "trl" / "trainer" / "chunked_logprob_torch.py"
FLAGS: dict[str, Any] = {
    "beta": 0.0,
    "learning_rate": 1e-6,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_steps": 10_000,
    "seed": 0,
}


def prompts(tokenizer: Any, length: int, common: int, number: int) -> Dataset:
    """Texts of exactly `length` tokens, of words that are one token each; the first `common` are the same in all."""
    texts = (tokenizer.decode([token]) for token in range(1000, 4000))
    words = [text for text in texts if text[0] == " " and text[1:].isalpha()]
    draws = torch.Generator().manual_seed(0)
    picked = torch.randint(len(words), (number, length), generator=draws)
    picked[:, :common] = picked[:1, :common]
    made = ["".join(words[at] for at in row) for row in picked.tolist()]
    assert all(len(tokenizer(text)["input_ids"]) == length for text in made)
    return Dataset.from_dict({"prompt": made})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group, a function of the text alone."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


class Phases:
    """Seconds of each phase of a step, by the trainer's methods."""

    def __init__(self, trainer: Any, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._wrap(trainer, "_generate", "rollout")
        self._wrap(trainer, "_get_per_token_logps_and_entropies", "scoring")
        self._wrap(trainer.accelerator, "backward", "backward")

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return call(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Adds the time of a block to a phase."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class OnCommand(TrainerCallback):
    """Waits for a line before a step, answers behind it."""

    def __init__(self, trainer: Any, cuda: bool) -> None:
        self.cuda, self.trainer = cuda, trainer
        self.phases = Phases(trainer, torch.cuda.synchronize if cuda else lambda: None)
        self.memory: Any = nullcontext()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        words = sys.stdin.readline().split()
        if not words:
            raise SystemExit(0)
        if words[-1] != "plain":
            self.trainer.m3po.shares_prefix = words[-1] == "auto"  # all that the flag decides
        self.counted = words[0] == "memory"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        elif self.counted:
            self.memory = LiveBytes()
            self.memory.__enter__()
        self.phases.seconds.clear()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.update = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        end = time.perf_counter()
        answer: dict[str, Any] = {"seconds": end - self.start}
        answer |= self.phases.seconds | {"update": end - self.update}
        if self.cuda:
            answer["bytes"] = torch.cuda.max_memory_allocated() - self.held
        elif self.counted:
            self.memory.__exit__(None, None, None)
            answer["bytes"] = self.memory.peak
        print("ANSWER " + json.dumps(answer), flush=True)


def main() -> None:
    spec = json.loads(sys.argv[1])
    cuda = torch.cuda.is_available()
    if importlib.util.find_spec("trl.trainer.m3po") is None and not cuda:
        # Pristine TRL scores by a Triton kernel alone. On a CPU it gets our scoring function and nothing else.
        import trl.trainer.utils as utils

        source = importlib.util.spec_from_file_location("trl.trainer.chunked_logprob_torch", SCORING)
        assert source is not None and source.loader is not None
        module = importlib.util.module_from_spec(source)
        source.loader.exec_module(module)
        utils._ChunkedLogProbFunction = module.scorer(None, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    rows = spec["groups"] * spec["paths"]
    args = GRPOConfig(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=rows // spec["micro_batch"],
        num_generations=spec["paths"],
        max_completion_length=spec["completion"],
        bf16=spec["bf16"],
        use_cpu=not cuda,
        **FLAGS,
        **spec["flags"],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=prompts(tokenizer, spec["prompt"], spec["common"], 64),
        processing_class=tokenizer,
    )
    trainer.generation_config.eos_token_id = None  # every completion has all its tokens
    trainer.eos_token_ids = [-1]
    trainer.add_callback(OnCommand(trainer, cuda))
    trainer.train()


if __name__ == "__main__":
    main()
