# SPDX-License-Identifier: Apache-2.0
"""Tiny GRPO runs on a CPU: what the training tests share. As a program it makes some runs and saves their results.

The vocabulary has 24 tokens, so that a random model often draws the end token (ragged stops) and the answer marker; the
embeddings are scaled up, so that a blended input changes the log-probs by far more than rounding does. All is fp32.

    python tiny_grpo.py RESULT.pt '[{"name": "control", "kind": "llama", "flags": {}}, ...]'

A run with "replay": FILE gets its rollouts from there, a list of batches (`keep_batches`) of which each process takes
its rows. From a run with "fsdp_config": {...} on, the processes share the model (FSDP2).
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ALPHABET = "0123456789abcdef+=?"
FLAGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 5,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and `##`: the marker `####` is two tokens, three or four."""
    words = ["<pad>", "<eos>", *ALPHABET, "#", "##", " "]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("#", "#")]))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>", padding_side="left", model_max_length=128
    )


SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def families() -> Any:
    """The module `tests/reference/families.py`, by its path: this file is a program too."""
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "reference" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(kind: str = "llama") -> PreTrainedModel:
    """A model of 2 layers, the same one every time; inputs and outputs have their own embeddings."""
    torch.manual_seed(0)
    net = families().build(kind, SIZES)
    net.model.embed_tokens.weight.data.mul_(50)
    net.lm_head.weight.data.mul_(15)
    return net


def with_aslr(kind: str = "llama", scale: float = 0.2, **numbers: Any) -> PreTrainedModel:
    """The tiny model with modules of ASLR as if trained: every entry is off its start by `scale` or so."""
    from transformers.m3po.aslr.modules import ASLR_MODULES, attach_aslr  # this file runs on the pristine upstreams too

    net, draws = model(kind), torch.Generator().manual_seed(1)
    attach_aslr(net, **numbers)
    for name in ASLR_MODULES:
        for value in getattr(net.model, name).parameters():
            value.data += scale * torch.randn(value.shape, generator=draws)
    return net


def aslr_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of ASLR that are used, not their frozen copies, by their names on the base model."""
    return {
        name.split("model.")[-1].replace("modules_to_save.default.", ""): value
        for name, value in model.named_parameters()
        if "m3po_" in name and not any(part in name for part in ("original_module", "modules_to_save.ref"))
    }


class _Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({name: value.grad.clone() for name, value in aslr_of(model).items()})  # none is None


def aslr_gradients(run: GRPOTrainer) -> list[dict[str, torch.Tensor]]:
    """Trains; returns the gradients of ASLR's parameters at every step, not clipped if max_grad_norm is 0."""
    kept = _Gradients()
    run.add_callback(kept)
    run.train()
    return kept.steps


def prompts() -> Dataset:
    """16 prompts of 4 to 19 tokens."""
    return Dataset.from_dict({"prompt": ["12+" * (k % 6) + f"{k:x}+3=" for k in range(16)]})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group, a function of the text alone."""
    return [float(len(text) % 5 + text.count("1")) for text in completions]


def trainer(folder: Path, kind: str = "llama", *, flags: dict[str, Any], **given: Any) -> GRPOTrainer:
    """A GRPOTrainer on the tiny model; `flags` go to GRPOConfig, `given` to the trainer."""
    arguments = {
        "model": model(kind),
        "args": GRPOConfig(output_dir=str(folder), **{**FLAGS, **flags}),
        "reward_funcs": reward,
        "train_dataset": prompts(),
        "processing_class": tokenizer(),
        **given,
    }
    built = GRPOTrainer(**arguments)
    built.remove_callback(PrinterCallback)
    return built


def logged(run: GRPOTrainer, key: str) -> list[float]:
    """The values of one metric, in the order they were logged."""
    return [entry[key] for entry in run.state.log_history if key in entry]


class PlainLogProb(torch.autograd.Function):
    """The arguments and outputs of TRL's Triton kernel for log-probs and entropy, in four lines of torch."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, *more: Any):
        """hidden (N, H), weight (V, H), targets (N,), temperature -> log-probs and entropy (N,), None three times."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = more[0]
        with torch.no_grad():
            logps = torch.log_softmax(hidden @ weight.t() / more[0], -1)
        return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1), None, None, None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any):
        """Gradients of hidden and weight."""
        hidden, weight, targets = ctx.saved_tensors
        slope = -torch.softmax(hidden @ weight.t() / ctx.temperature, -1) * grad[:, None]
        slope[torch.arange(len(targets)), targets] += grad
        slope = slope / ctx.temperature
        return slope @ weight, slope.t() @ hidden, *[None] * 7


def use_plain_scoring() -> None:
    """Gives patched and pristine TRL the same scoring function: the pristine one cannot score without a GPU at all."""
    import trl.trainer.utils as utils

    utils._ChunkedLogProbFunction = PlainLogProb
    fallback = getattr(sys.modules["trl.trainer"], "chunked_logprob_torch", None)
    if fallback is not None:
        fallback.scorer = lambda kernel, device: PlainLogProb


def keep_batches(run: GRPOTrainer) -> list[dict[str, torch.Tensor]]:
    """A list that gets every batch of rollouts the run will make: completions, advantages, bags and the rest."""
    batches: list[dict[str, torch.Tensor]] = []
    make = run._generate_and_score_completions

    def make_and_keep(inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = make(inputs)
        batches.append({name: value.clone() for name, value in batch.items()})
        return batch

    run._generate_and_score_completions = make_and_keep
    return batches


def replay(run: GRPOTrainer, batches: list[dict[str, torch.Tensor]]) -> None:
    """Makes a run take its rollouts from `batches`: of what has rows, each process the rows of its own groups."""
    number, index = run.accelerator.num_processes, run.accelerator.process_index
    left = iter(batches)
    run._generate_and_score_completions = lambda inputs: {
        name: value.chunk(number)[index] if value.dim() else value for name, value in next(left).items()
    }


def record(build: Callable[..., GRPOTrainer]) -> dict[str, Any]:
    """Trains; returns every sampled token, every loss of a micro-batch, the last weights and RNG state, and the log.

    With ASLR, the seeds of the rows too, in the order of the rollouts.
    """
    tokens: list[list[int]] = []
    losses: list[float] = []

    def remember(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.extend(completion_ids)
        return reward(completions)

    run = build(reward_funcs=remember)
    plain_loss = run.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss

    run.compute_loss = compute_loss
    batches = keep_batches(run)
    run.train()
    weights = {name: whole(value).detach().clone() for name, value in run.model.state_dict().items()}
    return {
        "tokens": tokens,
        "losses": losses,
        "weights": weights,
        "rng": torch.get_rng_state(),
        "log": run.state.log_history,
        "seeds": [seed for batch in batches for seed in batch.get("rollout_row_seeds", torch.tensor([])).tolist()],
        "shared": all(hasattr(value, "full_tensor") for value in run.model.parameters()),
    }


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of a state dict, put together from its parts where the processes share it (FSDP2)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def trainer_of(folder: Path, spec: dict[str, Any], **given: Any) -> GRPOTrainer:
    """The trainer of a run as `main` gets it."""
    if "fsdp_config" in spec:
        use_fsdp_on_cpus(spec["fsdp_config"])
    run = trainer(folder, spec["kind"], flags=spec["flags"], **given)
    if "replay" in spec:
        replay(run, torch.load(spec["replay"], weights_only=True))
    return run


def use_fsdp_on_cpus(fsdp_config: dict[str, Any]) -> None:
    """Makes accelerate do on CPUs, from now on, what it does on GPUs when its launcher has been given `fsdp_config`."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.update({name.upper(): str(value).lower() for name, value in fsdp_config.items()})
    os.environ["FSDP_AUTO_WRAP_POLICY"] = fsdp_config["fsdp_auto_wrap_policy"]
    plain_init = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:  # upstream does this unless the type is MULTI_CPU
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(argv: list[str]) -> int:
    """argv: the file for the results, the runs as JSON. Of several processes each writes its own file, FILE.RANK."""
    gc.freeze()  # every training collects garbage; what the imports have made need not be looked through
    if "RANK" not in os.environ:  # else no pristine TRL is compared with
        use_plain_scoring()
    results: dict[str, Any] = {
        "patched": importlib.util.find_spec("trl.trainer.m3po") is not None,
        "defaults": {
            field.name: "a factory" if field.default is dataclasses.MISSING else repr(field.default)
            for field in dataclasses.fields(GRPOConfig)
        },
    }
    for run in json.loads(argv[1]):
        folder = Path(argv[0]).with_suffix(f".{run['name']}")
        results[run["name"]] = record(lambda run=run, folder=folder, **given: trainer_of(folder, run, **given))
    torch.save(results, argv[0] + ("." + os.environ["RANK"] if "RANK" in os.environ else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
