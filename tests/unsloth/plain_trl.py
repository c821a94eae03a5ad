# SPDX-License-Identifier: Apache-2.0
"""TRL's own GRPO on the tiny models, in a process that never imports Unsloth: what its trainer is compared with.

python plain_trl.py RESULT.pt     writes, per case: a batch, its log-probs, the loss, the gradients
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
assert _spec is not None and _spec.loader is not None
cases = sys.modules.setdefault("cases", importlib.util.module_from_spec(_spec))
if not hasattr(cases, "CASES"):
    _spec.loader.exec_module(cases)

RUN = {
    **cases.tiny_grpo.FLAGS,
    "per_device_train_batch_size": 6,
    "num_generations": 3,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 6,
    "max_steps": 1,
    "seed": 6,  # with it paths of a group differ enough for a learnable gating function to have a gradient
}


def prompts() -> Dataset:
    """Four prompts of 1 to 4 tokens: each batch of two is padded on the left."""
    return Dataset.from_dict({"prompt": ["7", "2+b=", "c", "3+="]})


def arguments(case: str, folder: str, **more: Any) -> Any:
    """The arguments of a run of a case."""
    return trl.GRPOConfig(output_dir=folder, **{**RUN, **cases.flags(case), **more})


def scored(run: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The log-prob pass, the loss and its gradients on a batch, with the log-probs' difference to the rollout."""
    run.current_gradient_accumulation_steps = 1
    run.model.train()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        inputs = {"m3po_inputs": run.m3po.policy_inputs(batch)}
        logps = run._get_per_token_logps_and_entropies(run.model, ids, mask, batch["completion_ids"].shape[1], **inputs)
    run.model.zero_grad()
    loss = run.compute_loss(run.model, batch)
    loss.backward()
    trained = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    return {
        "logps": logps[0],
        "loss": loss.detach(),
        "gradients": {name: value.grad.clone() for name, value in trained.items() if value.grad is not None},
        "rollout_logp_diff_max": run._metrics["train"]["m3po/rollout_logp_diff_max"][-1],
    }


def plain(kind: str, case: str, folder: str) -> dict[str, Any]:
    """A batch of rollouts in a case and what TRL makes of it."""
    run = trl.GRPOTrainer(
        model=cases.model(kind, case),
        args=arguments(case, folder, beta=0.0),
        reward_funcs=cases.tiny_grpo.reward,
        train_dataset=prompts(),
        processing_class=cases.tokenizer(),
        peft_config=LoraConfig(**cases.LORA, task_type="CAUSAL_LM"),
    )
    cases.lively(run.model)
    run.model.train()
    batch = run._generate_and_score_completions(next(iter(run.get_train_dataloader())))
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    # Rewards of two paths are often equal; advantages that are not 0 give every token a gradient.
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.3, 0.5, 0.2, -0.7])
    return {"batch": batch, **scored(run, batch)}


def main(argv: list[str]) -> int:
    """argv: the file for the results."""
    torch.set_num_threads(1)
    cases.tiny_grpo.use_plain_scoring()
    torch.save({f"{kind} {case}": plain(kind, case, f"{argv[0]}.run") for kind, case in cases.BY_TURNS}, argv[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
