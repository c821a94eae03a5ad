# SPDX-License-Identifier: Apache-2.0
"""GRPO with thinking inputs and with ASLR: what the hooks in `grpo_trainer.py` call.

The rollout leaves a `RolloutRecord` (`transformers.m3po.thinking.record`); the policy, old and reference passes get its
bags, each through its own model's embeddings and residual gate, because eq. 8 of the M3PO paper conditions the policy
gradient on the blended inputs. With ASLR they get the rows' seeds too, from which each pass makes the same noise, and
ASLR runs in all of them. Mode `none` is plain GRPO on the same code path: it records log-probs and nothing else.

Axes: B rows of this process, C completion positions of the padded batch, L input positions, K bag entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers.m3po import M3POGenerationState, write_checkpoint_info
from transformers.m3po.aslr.settings import ASLRHyperparameters
from transformers.m3po.settings import CROSS_PATH_MODES, ThinkingSettings
from transformers.m3po.shared_prefix import shared_prefill
from transformers.m3po.thinking.record import RolloutRecord
from transformers.utils import logging

from .aslr import latent_parameters, latent_statistics
from .checks import check_trainer
from .config import checkpoint_info, thinking_settings
from .effect import is_due, peers_differ, thinking_effects
from .gating import (
    as_groups,
    as_rows,
    blended_scores,
    gating_statistics,
    trained_gating_parameters,
    zero_other_gradients,
)
from .metrics import MetricsLog, distinct_answers
from .modules import prepare_modules, prepare_reference
from .sharing import check_prompts, choose_sharing, shared_inputs
from .vllm_rollouts import check_whole

logger = logging.get_logger(__name__)

# Attributes of the trainer that move the rollouts out of a single call of `generate`, be it the model's or vLLM's.
_OTHER_ROLLOUTS = ("use_transformers_continuous_batching", "tools", "rollout_func", "environment_factories")


class GRPORollouts:
    """The trainer's side of the rollouts: states to `generate`, records to the scoring passes, numbers to the log.

    Args:
        trainer: the `GRPOTrainer`, after its arguments and models are set.

    Raises:
        ValueError: the model or a feature of the trainer cannot be combined with the mode.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.mode = trainer.args.mode
        self.settings: ThinkingSettings | None = thinking_settings(trainer.args)  # None in mode `none`
        self.aslr = bool(trainer.args.aslr_enabled)
        # Rollouts that do not come from one call of `generate` leave no record that fits the batch.
        elsewhere = [name for name in _OTHER_ROLLOUTS if getattr(trainer, name, None)]
        # Of TRL's own use of vLLM there is no record.
        self._vllm = trainer.vllm_generation.m3po if trainer.args.rollout_engine == "vllm" else None
        if trainer.use_vllm and self._vllm is None:
            elsewhere.append("use_vllm")
        if not elsewhere and self._vllm is None:
            # The settings come with the state; what a model's own generation_config says of them does not count.
            trainer.generation_config.update(enable_cross_path=False, return_thinking_embeds=False)
            if self.aslr:
                trainer.generation_config.update(is_m3po_inference=False)
            if trainer.generation_config.get_generation_mode() not in ("greedy_search", "sample"):
                elsewhere = ["generation_kwargs"]  # beams, or an assistant
        if self.settings is not None or self.aslr:
            check_trainer(trainer, self.settings, elsewhere)
        self.shares_prefix, self._sharing = choose_sharing(trainer, elsewhere)
        prepare_modules(trainer.model, trainer.args)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            prepare_reference(trainer.accelerator.unwrap_model(trainer.model), reference, trainer.args)
        self.learns = self.settings is not None and self.settings.learns and self.settings.crosses
        self._blends_logits = self.learns and trainer.args.gating_training == "logits"
        start = trained_gating_parameters(trainer.model) if self.learns else {}
        self._gating_start = {name: value.detach().clone() for name, value in start.items()}
        latent = latent_parameters(trainer.model) if self.aslr else {}
        self._latent_start = {name: value.detach().float().clone() for name, value in latent.items()}
        self._records = not elsewhere
        # Unsloth's forward makes no logits.
        self._measures = not type(trainer).__name__.startswith("Unsloth")
        self._generated = M3POGenerationState()
        self._metrics = MetricsLog(trainer)
        asked = self.settings is not None or self.aslr or trainer.args.shared_prefix != "false"
        if asked:  # shown by default: a run says with which values it trains
            logger.warning(self.describe())
        else:
            logger.info(self.describe())

    def describe(self) -> str:
        """The mode, its hyperparameters and those of ASLR, in one line."""
        parts = [f"mode={self.mode}" if self.settings is None else f"mode={self.mode}: {self.settings.describe()}"]
        if self.settings is not None and self.settings.learns:
            parts.append(f"gating_training={self._trainer.args.gating_training}")
        if self.aslr:
            parts.append(f"ASLR: {ASLRHyperparameters.of(self._trainer.args, {}).describe()}")
        if self._trainer.args.shared_prefix != "false":
            parts.append(self._sharing)
        return "; ".join(parts)

    def generate_kwargs(self, model: Any, inputs: dict[str, Any], num_generations: int) -> dict[str, Any]:
        """Extra arguments of `generate` for the prompts of this process.

        Args:
            model: as `generate` is called on it.
            inputs: of `generate`; `input_ids` and `attention_mask` (B, P), the copies of a prompt side by side.
            num_generations: N, copies of a prompt.

        Raises:
            ValueError: the mode needs whole groups, and N does not divide B.
        """
        if not self._records:
            return {}
        num_rows = len(inputs["input_ids"])
        if self.mode in CROSS_PATH_MODES:
            check_whole(num_rows, num_generations)
        first = self._trainer.accelerator.process_index * num_rows
        self._generated = M3POGenerationState(
            group_ids=torch.arange(first, first + num_rows) // num_generations,
            settings=self.settings,
            tokenizer=self._trainer._tokenizer,
            inverse_cdf=self.shares_prefix and inputs["input_ids"].device.type == "cpu",
        )
        arguments: dict[str, Any] = {"m3po": self._generated}
        if self.shares_prefix and num_rows % num_generations == 0:
            base = getattr(model, "_orig_mod", model)  # what generate calls of a compiled model, and of an adapter's
            base = base.get_base_model() if isinstance(base, PeftModel) else base
            split = self._trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            rows = inputs["input_ids"], inputs["attention_mask"]
            arguments |= shared_prefill(base, *rows, num_generations, find_common=not split)
        return arguments

    def scoring_kwargs(self, num_positions: int) -> dict[str, Any]:
        """For the old and reference passes over a rollout that is C = `num_positions` long; {} where they are plain."""
        record = self._handed_on(num_positions).without_gradient()
        return {"m3po_inputs": record} if self._is_read(record) else {}

    def policy_inputs(self, batch: dict[str, Any]) -> RolloutRecord | None:
        """The record of a micro-batch for the policy pass; None where it is plain.

        Without gradient, a learnable gating function takes the weights as they were rolled out.
        """
        record = RolloutRecord.from_batch(batch)
        if record is None or not self._is_read(record):
            return None
        return record if torch.is_grad_enabled() else record.without_gradient()

    def model_inputs(self, rows: slice, attention_mask: torch.Tensor, record: RolloutRecord | None) -> dict[str, Any]:
        """Extra inputs of the forward in a scoring pass over some rows; {} where it is plain.

        Args:
            rows: which rows of the batch the pass is over.
            attention_mask: (b, L) of these rows; the position ids of the rollout follow from it.
            record: of the whole batch.
        """
        if record is None:
            return {}
        record = record.rows(rows)
        settings = self.settings
        arguments = record.forward_kwargs(
            0.0 if settings is None else settings.cross_path_lambda, settings is not None and settings.has_thoughts
        )
        if self._blends_logits:
            arguments["m3po_blend"] = record
        arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        return arguments

    def score(self, model: Any, model_inputs: dict[str, Any], labels: torch.Tensor, completion_length: int) -> Any:
        """The forward of a scoring pass over some rows, with what `model_inputs` adds.

        It is TRL's, unless the prompts of the groups are shared or the output distributions of the groups are blended.

        Returns:
            An object with log_probs and entropy, (B, C) or (B, P + C - 1) float32, whose last C columns are those of
            the completions.
        """
        num_paths = self._num_paths
        if self.shares_prefix and num_paths > 1 and len(labels) % num_paths == 0:
            model_inputs, labels = shared_inputs(model_inputs, labels, completion_length, num_paths)
        record = model_inputs.pop("m3po_blend", None)
        if record is None or self.settings is None:
            return model(**model_inputs, labels=labels, fused_lm_head=True)
        base = self._trainer.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        temperature = self._trainer.temperature
        return blended_scores(model, base.base_model, model_inputs, labels, record, self.settings, temperature)

    @property
    def _state(self) -> M3POGenerationState:
        """Of the last rollout."""
        return self._generated if self._vllm is None else self._vllm.state

    @property
    def _num_paths(self) -> int:
        """N, the rows of a group, in a training or in an evaluation, as the trainer tells them apart."""
        trainer = self._trainer
        return trainer.num_generations if trainer.model.training else trainer.num_generations_eval

    def as_groups(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Before a rollout is shuffled: where a pass reads whole groups, they are what is shuffled."""
        return as_groups(batch, self._trainer.num_generations) if self._reads_groups else batch

    def as_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """After it: rows again."""
        return as_rows(batch) if self._reads_groups else batch

    @property
    def _reads_groups(self) -> bool:
        return self.learns or self.shares_prefix

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Puts the record beside the batch (every tensor has B rows) and logs the rollout.

        Raises:
            ValueError: prompts are shared, and rows of a group have different ones.
        """
        if not self._records:
            return
        if self.shares_prefix and len(batch["prompt_ids"]) % self._num_paths == 0:
            check_prompts(batch["prompt_ids"], self._num_paths)
        record = self._handed_on(batch["completion_ids"].size(1))
        batch.update(record.to_batch())
        # In the batch, because an evaluation may roll out between this rollout and the policy passes that read it.
        batch["rollout_step"] = torch.tensor(self._trainer.state.global_step)
        self._log_answers(batch["completion_ids"], batch["completion_mask"])
        self._metrics.log_rollout(record, self._state.statistics, batch["completion_mask"])
        self._log_effects(batch)

    def _handed_on(self, num_positions: int) -> RolloutRecord:
        """The record of the last rollout as the scoring passes take it, C = `num_positions` long.

        Where output distributions are blended, they read plain tokens; where whole groups are read, it says them.
        """
        record = self._state.record.pad(num_positions)
        if self.learns:
            record.group_ids = self._state.group_ids.to(record.logps.device)
        return replace(record, bag_ids=None, bag_weights=None, gating=None) if self._blends_logits else record

    def _is_read(self, record: RolloutRecord) -> bool:
        """Whether a scoring pass over these rows is another than the plain one."""
        return record.has_bags or record.row_seeds is not None or self._blends_logits

    def after_backward(self, model: Any) -> None:
        """When all gradients of an optimizer step are there: logs our modules' own, and holds back what waits.

        For the first `gating_warmup_steps` steps only a learnable gating function keeps its gradients.
        """
        accelerator, args = self._trainer.accelerator, self._trainer.args
        if not accelerator.sync_gradients:
            return
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()  # fp16 scales the loss
        statistics: dict[str, torch.Tensor] = {}
        if self.aslr and ASLRHyperparameters.of(args, {}).runs:
            statistics |= latent_statistics(accelerator.unwrap_model(model), scale, self._latent_start)
        if self._gating_start:
            policy = accelerator.unwrap_model(model)
            statistics |= gating_statistics(policy, self._gating_start, scale)
            if self._trainer.state.global_step < args.gating_warmup_steps:
                zero_other_gradients(policy)
        for name, value in statistics.items():
            self._metrics.log(name, value)

    def log_rollout_diff(self, inputs: dict[str, Any], per_token_logps: torch.Tensor, mask: torch.Tensor) -> None:
        """Logs how far the policy pass is from the rollout, (B, C) log-probs each, while the weights are the same."""
        if inputs.get("rollout_step") != self._trainer.state.global_step:
            return  # no record, or an optimizer step lies between the two and the difference is meant
        record = RolloutRecord.from_batch(inputs)
        if record is not None:
            self._metrics.log_rollout_diff(record.logps, per_token_logps, mask)

    def save(self, folder: str | None) -> None:
        """Writes `m3po.json` beside weights that were just saved to `folder` (None: the output directory)."""
        write_checkpoint_info(folder or self._trainer.args.output_dir, checkpoint_info(self._trainer.args))

    def _log_effects(self, batch: dict[str, Any]) -> None:
        """What thinking does to the next token; see `effect`."""
        trainer, settings = self._trainer, self.settings
        thinking = self._state.record.thinking_mask
        if settings is not None and settings.crosses and thinking is not None:
            thinks = self._state.record.pad(batch["completion_ids"].size(1)).thinking_mask
            self._metrics.log("peer_differs", peers_differ(batch["completion_ids"], thinks, self._num_paths))
        if self._measures and trainer.model.training and is_due(trainer.args, trainer.state):
            record = self._handed_on(batch["completion_ids"].size(1))
            effects = thinking_effects(trainer, batch, record, settings, shares_prefix=self.shares_prefix)
            for name, value in effects.items():
                self._metrics.log(name, value)

    def _log_answers(self, completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> None:
        completions = zip(completion_ids.cpu(), completion_mask.bool().cpu(), strict=True)
        tokens = [ids[mask].tolist() for ids, mask in completions]
        texts = self._trainer._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        number = distinct_answers(texts, self._trainer.args.answer_start, self._state.group_ids.tolist())
        self._metrics.log("distinct_answers", torch.tensor(number, device=completion_ids.device))
