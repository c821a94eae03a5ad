# SPDX-License-Identifier: Apache-2.0
"""GRPO steps of one engine, timed. `engines.py` starts a process of this for each engine, since Unsloth changes others.

python benchmarks/engine_steps.py ENGINE SETTINGS.json RESULT.json

ENGINE is `trl`, `unsloth`, or `unpatched`: Unsloth on the pristine upstreams, with nothing of ours imported. A killed
process goes on behind the last run in RESULT.json. A mode's rollouts are scored before its first step too; those of
`unsloth` are kept beside the result, and `trl` scores them again, in the run's precision and in float32.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINE = sys.argv[1] if __name__ == "__main__" else ""
if ENGINE in ("unsloth", "unpatched"):
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    import unsloth  # noqa: F401  # before the libraries that it changes

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback  # noqa: E402

LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 32, 64
DIFFERENCE = "m3po/rollout_logp_diff_max"


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """The share of different words in a completion: rewards that differ, so that every gradient is one."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [len(set(words)) / max(1, len(words)) for words in texts]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    """Seconds of each step, generation included."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        synchronize()
        self._last = time.perf_counter()

    def on_step_end(self, *given: Any, **more: Any) -> None:
        synchronize()
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self._last = now


def arguments(settings: dict[str, Any], mode: str | None, folder: str) -> Any:
    """The arguments of a run; `mode` None is for a TRL without our flags."""
    rows, half = settings["prompts"] * settings["paths"], settings["dtype"] == "bfloat16"
    return trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        num_generations=settings["paths"],
        gradient_accumulation_steps=1,
        max_completion_length=settings["length"],
        max_steps=settings["warmup"] + settings["steps"],
        learning_rate=1e-5,
        temperature=1.0,
        beta=0.0,
        bf16=half,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **({} if mode is None else {"mode": mode}),
    )


def model_of(engine: str, settings: dict[str, Any], args: Any) -> tuple[Any, Any, Any]:
    """A fresh model, its tokenizer, and the adapter that the trainer lays on; None where the model has it."""
    place, dtype = settings["model"], settings["dtype"]
    if engine == "unpatched":
        from unsloth import FastLanguageModel

        net, words = FastLanguageModel.from_pretrained(
            place,
            max_seq_length=None,
            dtype=getattr(torch, dtype),
            load_in_4bit=False,
            use_exact_model_name=True,
            use_gradient_checkpointing=False,
        )
        words.padding_side = "left"
        sizes = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": sorted(LORA)}
        net = FastLanguageModel.get_peft_model(net, use_gradient_checkpointing=False, random_state=0, **sizes)
        return net, words, None
    from m3po_lab.models.loading import load_model
    from m3po_lab.models.unsloth_model import load_with_unsloth

    flags = {"use_peft": True, "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target_modules": LORA}
    model = trl.ModelConfig(model_name_or_path=place, dtype=dtype, **flags)
    if engine == "unsloth":
        return (*load_with_unsloth(model, args), None)
    return (*load_model(model), trl.get_peft_config(model))


def trainer_of(engine: str, settings: dict[str, Any], mode: str | None, folder: str, clock: Clock) -> Any:
    """A fresh trainer of the engine in a mode."""
    args = arguments(settings, mode, folder)
    net, words, adapter = model_of(engine, settings, args)
    count = settings["prompts"] * (settings["warmup"] + settings["steps"])
    told = [f"Tell a long and detailed story about the number {index}." for index in range(count)]
    trainer = trl.GRPOTrainer(
        model=net,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in told]}),
        processing_class=words,
        peft_config=adapter,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def timed(engine: str, settings: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """One run of a mode: seconds, seconds of the rollout and tokens of each step behind the warm-up; peak memory."""
    clock, rollouts = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(engine, settings, mode, folder, clock)
        upstream = trainer._generate_and_score_completions

        def generate(inputs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            found = upstream(inputs)
            synchronize()
            rollouts.append(time.perf_counter() - start)
            return found

        trainer._generate_and_score_completions = generate
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    rows, first = settings["prompts"] * settings["paths"], settings["warmup"]
    logged = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    lengths = [row["completions/mean_length"] for row in logged]
    return {
        "seconds": clock.steps[first:],
        "rollout_seconds": rollouts[first:],
        "tokens": [length * rows for length in lengths[first:]],
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "rollout_logp_diff_max": [row[DIFFERENCE] for row in logged if DIFFERENCE in row],
    }


def log_probs(trainer: Any, batch: dict[str, Any], half: bool) -> torch.Tensor:
    """(B, C) float32: the policy pass of an engine on a batch; 0 where nothing was sampled."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    trainer.model.train()
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=half):
        inputs = {"m3po_inputs": trainer.m3po.policy_inputs(batch)}
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, **inputs)[0].float()
    if found.shape[1] != length:  # Unsloth's rows are packed to the left: each begins its prompt's padding earlier
        shift = found.shape[1] - length - (batch["prompt_mask"] == 0).sum(1)
        found = found.gather(1, shift[:, None] + torch.arange(length, device=ids.device))
    return found * batch["completion_mask"]


def scored(engine: str, settings: dict[str, Any], mode: str, place: Path) -> dict[str, float]:
    """Rolls out and scores a batch (`unsloth`; kept in `place`), or scores the kept one (`trl`): differences."""
    half = settings["dtype"] == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(engine, settings, mode, folder, Clock())
        device = trainer.accelerator.device
        trainer.model.to(device)
        if engine == "unsloth":
            trainer.model.train()
            batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
            batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            found = log_probs(trainer, batch, half)
            torch.save({"batch": batch, "logps": found}, place)
            return difference(found, batch["rollout_logps"], batch, "rollout")
        kept = torch.load(place, weights_only=True, map_location=device)
        batch = kept["batch"]
        found = log_probs(trainer, batch, half)
        exact = trainer_of(engine, {**settings, "dtype": "float32"}, mode, folder, Clock())
        exact.model.to(device)
        true = log_probs(exact, batch, False)
    return difference(kept["logps"], true, batch, "unsloth") | difference(found, true, batch, "trl")


def difference(found: torch.Tensor, wanted: torch.Tensor, batch: dict[str, Any], name: str) -> dict[str, float]:
    mask = batch["completion_mask"].bool()
    delta = (found - wanted)[mask].abs()
    return {f"{name}_mean": delta.mean().item(), f"{name}_max": delta.max().item()}


def machine() -> dict[str, str]:
    """What the steps were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "python": sys.version.split()[0]}


def main(argv: list[str]) -> int:
    """argv: engine, the file with the settings, the file for the result."""
    engine, given, result = argv
    settings = json.loads(Path(given).read_text())
    modes = [None] if engine == "unpatched" else settings["modes"]
    AutoTokenizer.from_pretrained(settings["model"])  # a wrong folder is told before anything is measured
    before = json.loads(Path(result).read_text()) if Path(result).exists() else {"runs": [], "scores": {}}
    runs, scores = before["runs"], before["scores"]
    plan = [(number, mode) for number in range(settings["rounds"]) for mode in modes]
    for number, mode in tqdm(plan[len(runs) :], desc=engine, unit="run"):
        kept = Path(result).with_name(f"batch-{mode}.pt")
        if number == 0 and mode is not None and (engine == "unsloth" or kept.exists()):
            scores[mode] = scored(engine, settings, mode, kept)
        runs.append({"mode": mode or "none", "round": number, **timed(engine, settings, mode)})
        packages = {
            name: sys.modules[name].__file__ for name in ("transformers", "trl", "unsloth") if name in sys.modules
        }
        found = {"runs": runs, "scores": scores, "packages": packages, "machine": machine()}
        Path(result).write_text(json.dumps(found, indent=1))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
