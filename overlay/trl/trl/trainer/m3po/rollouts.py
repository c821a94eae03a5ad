# SPDX-License-Identifier: Apache-2.0
"""GRPO with thinking inputs and with ASLR: what the hooks in `grpo_trainer.py` call.

The rollout records one bag per thinking position (`transformers.m3po`); the policy, old and reference passes get the
same bags, each through its own model's embeddings and residual gate, because eq. 8 of the M3PO paper conditions the
policy gradient on the blended inputs (erratum E5). With ASLR they get the rows' seeds too, from which each pass makes
the same noise (E9), and ASLR runs in all of them (`is_m3po_inference` is False, E14). Mode `none` is plain GRPO on the
same code path: it records log-probs and nothing else.

Axes: B rows of this process, C completion positions of the padded batch, L input positions, K bag entries.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import MinPLogitsWarper, TemperatureLogitsWarper
from transformers.m3po import M3POGenerationState, write_checkpoint_info
from transformers.m3po.aslr.settings import ASLR_NUMBERS, ASLRNumbers
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES
from transformers.m3po.thinking.policy_gating import PREFIX, GatingRecord
from transformers.utils import logging

from .aslr import latent_parameters, latent_statistics
from .config import GATE_START, check_model_type, thinking_settings, what_needs_generate
from .gating import as_groups, as_rows, blended_scores, gate_parameters, gate_statistics, hold_back_the_rest
from .modules import prepare_reference, settle_modules

logger = logging.get_logger(__name__)

# What the trainer does with a rollout, `compute_loss` aside; whoever does it in its own way does not know of bags.
_SCORING = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")
# What every scoring pass reads of a rollout, by its name in the batch.
_SCORED = ("thinking_bag_ids", "thinking_bag_weights", "aslr_row_seeds", "thinking_mask", "gating_group_ids")
# Attributes of the trainer that move the rollouts out of a single call of `generate`.
_OTHER_ROLLOUTS = ("use_vllm", "use_transformers_continuous_batching", "tools", "rollout_func", "environment_factories")


class GRPORollouts:
    """The trainer's side of the rollouts: hands states to `generate`, bags to the scoring passes, numbers to the log.

    Args:
        trainer: the `GRPOTrainer`, after its arguments and models are set.

    Raises:
        ValueError: the model or a feature of the trainer cannot be combined with the mode.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.mode = trainer.args.mode
        self.settings: Any = thinking_settings(trainer.args)  # ThinkingSettings, None in mode `none`
        self.aslr = bool(trainer.args.aslr_enabled)
        # Rollouts that do not come from one call of `generate` leave no record that fits the batch.
        elsewhere = [name for name in _OTHER_ROLLOUTS if getattr(trainer, name, None)]
        if not elsewhere:
            # The settings come with the state; what a model's own generation_config says of them does not count.
            trainer.generation_config.update(enable_cross_path=False, return_thinking_embeds=False)
            if self.aslr:
                trainer.generation_config.update(is_m3po_inference=False)
            if trainer.generation_config.get_generation_mode() not in ("greedy_search", "sample"):
                elsewhere = ["generation_kwargs"]  # beams, or an assistant
        if self.settings is not None or self.aslr:
            self._check_trainer(elsewhere)
        settle_modules(trainer.model, trainer.args)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            prepare_reference(trainer.accelerator.unwrap_model(trainer.model), reference, trainer.args)
        self.learns = self.settings is not None and self.settings.learns and self.settings.crosses
        start = gate_parameters(trainer.model) if self.learns else {}
        self._gate_start = {name: value.detach().clone() for name, value in start.items()}
        latent = latent_parameters(trainer.model) if self.aslr else {}
        self._latent_start = {name: value.detach().float().clone() for name, value in latent.items()}
        self._records = not elsewhere
        self._state = M3POGenerationState()
        self._group_ids = torch.arange(0)
        if self.settings is not None or self.aslr:  # shown by default: a run says which numbers it uses
            logger.warning(self.describe())
        else:
            logger.info(self.describe())

    def describe(self) -> str:
        """The mode, its numbers and those of ASLR, in one line."""
        told = [f"mode={self.mode}"] if self.settings is None else [f"mode={self.mode}: {self.settings.describe()}"]
        if self.settings is not None and self.settings.learns:
            told.append(f"gating_training={self._trainer.args.gating_training}")
        if self.aslr:
            told.append(f"ASLR: {ASLRNumbers.of(self._trainer.args, {}).describe()}")
        return "; ".join(told)

    def _check_trainer(self, elsewhere: list[str]) -> None:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        what = what_needs_generate(self._trainer.args)
        record = "bags" if self.mode != "none" else "seeds"
        mend = " and ".join(["set mode='none'"] * (self.mode != "none") + ["train without ASLR"] * self.aslr)
        check_model_type(model, what)
        if elsewhere:
            why = "where the paths interact" if self.mode != "none" else "which records the seeds of its noise"
            raise ValueError(
                f"{elsewhere[0]} cannot be combined with {what}: its rollouts are not decoded in one call of generate, "
                f"{why}. Leave it out, or {mend}."
            )
        kind = type(self._trainer)
        if (own := _unaware(kind)) is not None:
            way = "take GRPOTrainer"
            if kind.__name__.startswith("Unsloth"):
                way = "this Unsloth lacks the patches of this overlay; take those of `make env EXTRA=unsloth`"
            raise ValueError(
                f"{kind.__name__} has its own {own}, which does not hand the {record} of {what} to the policy pass; "
                f"{way}, or {mend}."
            )
        if self.settings is not None:
            self._check_distribution(model)
            if self.settings.learns:
                self._check_gating()

    def _check_gating(self) -> None:
        args = self._trainer.args
        engine = self._trainer.accelerator.distributed_type
        if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"gating_type={args.gating_type!r} cannot be trained with {engine.value}: a rollout reads the gate "
                "outside the forward pass, where its parameters are split over the processes. Take DDP "
                "(configs/accelerate), or a gate without parameters."
            )
        if args.gating_training == "logits" and type(self._trainer).__name__.startswith("Unsloth"):
            raise ValueError(
                "gating_training='logits' blends output distributions, which Unsloth's log-prob pass never makes; "
                "train with TRL's own trainer, or set gating_training='embeddings'."
            )
        if args.gating_training == "logits" and args.cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32 is a feature of the fused head, which gating_training='logits' does not use; set "
                "it to False."
            )

    def _check_distribution(self, model: Any) -> None:
        """Refuses what makes rollout and policy pass two distributions, wherever it was set."""
        rates = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)]
        if any([*rates, getattr(model.config, "attention_dropout", 0.0)]):
            raise ValueError(
                f"dropout draws other numbers in the policy pass than in the rollout; mode={self.mode!r} needs none of "
                "it: set lora_dropout to 0 (or disable_dropout=True), and attention_dropout of the model config to 0."
            )
        # Fields that are None here are filled from the model's generation_config, then from upstream's defaults.
        config, _ = model._prepare_generation_config(self._trainer.generation_config)
        model._prepare_special_tokens(config, True, device="cpu")
        processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
        cut = [part for part in processors if not (isinstance(part, TemperatureLogitsWarper) or _keeps_all(part))]
        if cut:
            raise ValueError(
                f"{', '.join(type(part).__name__ for part in cut)} would change the distribution that rollouts are "
                f"sampled from, which the policy pass does not see; it comes from a flag set to null or from the "
                f"model's generation_config. mode={self.mode!r} needs top_k=0, top_p=1.0, min_p=0.0, "
                "repetition_penalty=1.0 and none of its kin in model.generation_config."
            )

    def generate_kwargs(self, num_rows: int, num_generations: int) -> dict[str, Any]:
        """Extra arguments of `generate` for `num_rows` prompts of this process, the copies of a prompt side by side."""
        if not self._records:
            return {}
        if self.mode in CROSS_PATH_MODES and num_rows % num_generations:
            raise ValueError(
                f"{num_rows} rollouts at a time are not whole groups of {num_generations}: make "
                "per_device_eval_batch_size a multiple of num_generations_eval (or of num_generations)."
            )
        first = self._trainer.accelerator.process_index * num_rows
        self._group_ids = torch.arange(first, first + num_rows) // num_generations
        self._state = M3POGenerationState(
            group_ids=self._group_ids,
            settings=self.settings,
            tokenizer=self._trainer._tokenizer,
        )
        return {"m3po": self._state}

    def scoring_kwargs(self, num_positions: int) -> dict[str, Any]:
        """For the passes over a rollout that is C = `num_positions` long; {} where they are plain.

        Returns:
            `m3po_inputs`: tensors of B rows, bags or what a blend of output distributions needs, and the rows' seeds.
        """
        state = self._state
        given: dict[str, torch.Tensor] = {}
        if self.learns and self._trainer.args.gating_training == "logits":
            if state.thinking_mask is not None:
                given["thinking_mask"] = _fit(state.thinking_mask, num_positions)
                given["gating_group_ids"] = self._group_ids.to(given["thinking_mask"].device)
        elif state.bag_ids is not None and state.bag_weights is not None:
            given["thinking_bag_ids"] = _fit(state.bag_ids, num_positions)
            given["thinking_bag_weights"] = _fit(state.bag_weights, num_positions)
        if state.row_seeds is not None:
            given["aslr_row_seeds"] = _ordinary(state.row_seeds)
        return {"m3po_inputs": given} if given else {}

    def policy_inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The same for the policy pass over a micro-batch; with gradient, also what a learnable gate needs."""
        record = torch.is_grad_enabled()
        return {
            name: value
            for name, value in batch.items()
            if name in _SCORED or (record and name.startswith(PREFIX)) and value is not None
        }

    def model_inputs(
        self, rows: slice, attention_mask: torch.Tensor, inputs: dict[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        """Extra inputs of the forward in a scoring pass over some rows; {} where it is plain.

        Args:
            rows: which rows of the batch the pass is over.
            attention_mask: (b, L) of these rows; the position ids of the rollout follow from it.
            inputs: of the whole batch, see `scoring_kwargs` and `policy_inputs`.
        """
        part = {name: value[rows] for name, value in (inputs or {}).items()}
        given: dict[str, Any] = {}
        if "thinking_bag_ids" in part:
            given |= {name: part[name] for name in ("thinking_bag_ids", "thinking_bag_weights")}
        if f"{PREFIX}ids" in part:
            given["thinking_gating"] = {
                "record": GatingRecord.of(part),
                "group_ids": part["gating_group_ids"],
                "lambda_blend": self.settings.cross_path_lambda,
                "has_thoughts": self.settings.has_thoughts,
            }
        if "aslr_row_seeds" in part:
            given |= {"aslr_row_seeds": part["aslr_row_seeds"], "is_m3po_inference": False}
        if given or "thinking_mask" in part:
            given["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if "thinking_mask" in part:
            given["m3po_blend"] = {"thinking_mask": part["thinking_mask"], "group_ids": part["gating_group_ids"]}
        return given

    def score(self, model: Any, model_inputs: dict[str, Any], labels: torch.Tensor) -> Any:
        """The forward of a scoring pass: TRL's, unless the output distributions of the groups are blended."""
        blend = model_inputs.pop("m3po_blend", None)
        if blend is None:
            return model(**model_inputs, labels=labels, fused_lm_head=True)
        base = self._trainer.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        given = base.base_model, model_inputs, labels, blend, self.settings, self._trainer.temperature
        return blended_scores(model, *given)

    def as_groups(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Before a rollout is shuffled: where a gate learns from whole groups, they are what is shuffled."""
        return as_groups(batch, self._trainer.num_generations) if self.learns else batch

    def as_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """After it: rows again."""
        return as_rows(batch) if self.learns else batch

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Puts what the policy pass needs beside the batch (every tensor has B rows) and logs the rollout."""
        if not self._records:
            return
        num_positions = batch["completion_ids"].size(1)
        batch.update(self.scoring_kwargs(num_positions).get("m3po_inputs", {}))
        if self._state.gating is not None and "thinking_bag_ids" in batch:
            record = self._state.gating.tensors()
            batch.update({name: _fit(value, num_positions) for name, value in record.items()})
            batch["gating_group_ids"] = self._group_ids.to(batch["completion_ids"].device)
        batch["rollout_per_token_logps"] = _fit(self._state.rollout_logps, num_positions)
        # In the batch, because an evaluation may roll out between this rollout and the policy passes that read it.
        batch["rollout_step"] = torch.tensor(self._trainer.state.global_step)
        self._log("distinct_answers", self._distinct_answers(batch["completion_ids"], batch["completion_mask"]))
        for name, value in self._state.statistics.items():
            self._log(name, value)
        if self._state.thinking_mask is None:
            return
        tokens = batch["completion_mask"].bool()
        thinking = _fit(self._state.thinking_mask, num_positions) & tokens
        self._log("thinking_fraction", thinking.sum() / tokens.sum())
        self._log("thinking_length", thinking.sum(1).float().mean())

    def after_backward(self, model: Any) -> None:
        """When all gradients of an optimizer step are there: logs our modules' own, and holds back what waits.

        For the first `gating_warmup_steps` steps only a learnable gate keeps its gradients.
        """
        accelerator, args = self._trainer.accelerator, self._trainer.args
        if not accelerator.sync_gradients:
            return
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()  # fp16 scales the loss
        found: dict[str, torch.Tensor] = {}
        if self.aslr and ASLRNumbers.of(args, {}).runs:
            found |= latent_statistics(accelerator.unwrap_model(model), scale, self._latent_start)
        if self._gate_start:
            policy = accelerator.unwrap_model(model)
            found |= gate_statistics(policy, self._gate_start, scale)
            if self._trainer.state.global_step < args.gating_warmup_steps:
                hold_back_the_rest(policy)
        for name, value in found.items():
            self._log(name, value)

    def log_rollout_diff(self, inputs: dict[str, Any], per_token_logps: torch.Tensor, mask: torch.Tensor) -> None:
        """Logs how far the policy pass is from the rollout, (B, C) log-probs each, while the weights are the same."""
        if inputs.get("rollout_step") != self._trainer.state.global_step:
            return  # no record, or an optimizer step lies between the two and the difference is meant
        difference = (per_token_logps.detach() - inputs["rollout_per_token_logps"]).abs() * mask
        gather = self._trainer.accelerator.gather
        total = gather(torch.stack([difference.sum(), mask.sum()]).float().unsqueeze(0)).sum(0)
        metrics = self._metrics
        metrics["m3po/rollout_logp_diff"].append((total[0] / total[1].clamp_min(1)).item())
        # TRL averages what is logged between two log lines; the largest value must stay the largest.
        largest = gather(difference.max()).max().item()
        metrics["m3po/rollout_logp_diff_max"] = [max([largest, *metrics["m3po/rollout_logp_diff_max"]])]

    def save(self, folder: str | None) -> None:
        """Writes `m3po.json` beside weights that were just saved to `folder` (None: the output directory)."""
        write_checkpoint_info(folder or self._trainer.args.output_dir, checkpoint_info(self._trainer.args))

    @property
    def _metrics(self) -> dict[str, list[float]]:
        return self._trainer._metrics["train" if self._trainer.model.training else "eval"]

    def _log(self, name: str, value: torch.Tensor) -> None:
        """Mean over the processes that have the number; nothing is logged where none has it."""
        mean = self._trainer.accelerator.gather(value.float().reshape(1)).nanmean().item()
        if mean == mean:
            self._metrics[f"m3po/{name}"].append(mean)

    def _distinct_answers(self, completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """Number of different answers in a group, mean over the groups: texts behind the first marker, () float32."""
        tokenizer, marker = self._trainer._tokenizer, self._trainer.args.answer_start
        completions = zip(completion_ids.cpu(), completion_mask.bool().cpu(), strict=True)
        texts = tokenizer.batch_decode([ids[kept].tolist() for ids, kept in completions], skip_special_tokens=True)
        answers = [text.split(marker, 1)[1].strip() if marker in text else None for text in texts]
        groups: dict[int, set[str | None]] = {}
        for group, answer in zip(self._group_ids.tolist(), answers, strict=True):
            groups.setdefault(group, set()).add(answer)
        counts = [len(found - {None}) for found in groups.values()]
        return torch.tensor(counts, dtype=torch.float32, device=completion_ids.device).mean()


def _unaware(kind: type) -> str | None:
    """The first function between a rollout and its loss that knows nothing of its record; None if all do.

    Unsloth writes the trainer anew, with a loss of its own: looked at is the code that runs, whoever wrote it.
    """
    functions = {name: getattr(kind, name) for name in _SCORING}
    loss = inspect.unwrap(kind.compute_loss)  # type: ignore[attr-defined]
    if "grpo_accumulated_loss" in loss.__code__.co_names:
        functions |= {"compute_loss": loss, "grpo_accumulated_loss": loss.__globals__["grpo_accumulated_loss"]}
    else:
        functions["_compute_loss"] = kind._compute_loss  # type: ignore[attr-defined]
    return next((name for name, function in functions.items() if not _mentions_us(function)), None)


def _mentions_us(function: Any) -> bool:
    """Whether the code of a function, or of one that it wraps, has a name of ours in it."""
    function = inspect.unwrap(function)
    code = function.__code__
    words = (*code.co_names, *code.co_varnames, *code.co_consts)
    if any("m3po" in word for word in words if isinstance(word, str)):
        return True
    wrapped = [cell.cell_contents for cell in function.__closure__ or ()]
    return any(_mentions_us(inner) for inner in wrapped if inspect.isfunction(inner))


def _keeps_all(processor: Any) -> bool:
    return isinstance(processor, MinPLogitsWarper) and processor.min_p == 0


def checkpoint_info(args: Any) -> dict[str, Any]:
    """What `m3po.json` says of a checkpoint of a run with these arguments (a `GRPOConfig`)."""
    settings = thinking_settings(args)
    return {
        **({"mode": args.mode, "answer_start": args.answer_start} if settings is None else settings.numbers()),
        **({name: getattr(args, name) for name in GATE_START} if args.mode in RESIDUAL_MODES else {}),
        **({name: getattr(args, name) for name in ("aslr_enabled", *ASLR_NUMBERS)} if args.aslr_enabled else {}),
        **({"gating_training": args.gating_training} if settings is not None and settings.learns else {}),
        "num_generations": args.num_generations,
        "sampling_temperature": args.temperature,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def _fit(record: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Cuts or zero-pads a record (B, T, ...) to (B, num_positions, ...)."""
    fitted = _ordinary(record[:, :num_positions])
    missing = num_positions - fitted.size(1)
    if missing <= 0:
        return fitted
    return torch.cat([fitted, fitted.new_zeros(fitted.size(0), missing, *fitted.shape[2:])], dim=1)


def _ordinary(value: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd may keep: an engine that generates in inference mode leaves ones that it may not."""
    return value.clone() if value.is_inference() else value
