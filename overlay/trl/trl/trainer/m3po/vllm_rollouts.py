# SPDX-License-Identifier: Apache-2.0
"""Rollouts by vLLM in the trainer's process (`rollout_engine: vllm`): what the hooks in `vllm_generation.py` call.

In a thinking mode the engine has the plugin `m3po_vllm`, each row says its group, and the record of the rollout is
taken from the engine. In mode `none` the engine is vLLM's own and the record is of its log-probs.
"""

from __future__ import annotations

import os
from copy import copy
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.m3po import M3POGenerationState
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.modules import ASLR, GATING, HYPER_CONNECTIONS, RESIDUAL_GATE
from transformers.m3po.thinking.record import RolloutRecord

from .config import thinking_settings


class RolloutRefused(ValueError):
    """A rollout that the engine cannot make as it is set up; the text names the mend."""


class VLLMRollouts:
    """The rollouts of a trainer whose engine is vLLM.

    Args:
        args: the `GRPOConfig`.

    Attributes:
        state: record, statistics and groups of the last rollout, as `generate` leaves them.
    """

    def __init__(self, args: Any):
        self._args, self._settings = args, thinking_settings(args)
        self._begun = self._most_tokens = self._together = 0
        self.state = M3POGenerationState()

    def make_engine(self, kind: Any, generation: Any, **arguments: Any) -> Any:
        """The engine for a policy, of its dtype and with the mode.

        The policy's weights are given to it before every rollout, so that it reads none: only configuration and
        tokenizer are written for it, wherever the policy came from.

        Args:
            kind: `vllm.LLM`.
            generation: the `VLLMGeneration`.
            arguments: what upstream would make it with.

        Raises:
            ValueError: vLLM or the plugin does not know the model, or has not all of its modules.
        """
        from m3po_vllm import ENVIRONMENT, engine_arguments

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from m3po_vllm.loader import FROM_TRAINER

        args, model = self._args, generation.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        architecture = type(model).__name__
        for modules in (ASLR, HYPER_CONNECTIONS, *((RESIDUAL_GATE, GATING) if self._settings is None else ())):
            if modules.on(model):
                mode = "" if modules in (ASLR, HYPER_CONNECTIONS) else f" in mode {args.mode!r}"
                raise ValueError(
                    f"rollout_engine='vllm': the model has {modules.article}, which vLLM's forward has not{mode}; set "
                    "rollout_engine='generate'."
                )
        _check_tied(generation.model)
        arguments["dtype"] = "bfloat16" if args.bf16 else "float16" if args.fp16 else model.dtype
        arguments["load_format"] = FROM_TRAINER
        # A group begins in one step, and where paths hear another group, the whole rollout does.
        together = max(args.num_generations, args.num_generations_eval or 0)
        arguments["max_num_seqs"] = max(arguments["max_num_seqs"], together)
        if self._settings is not None and getattr(gating_class(self._settings.gating_type), "other_group", False):
            together = arguments["max_num_seqs"]
        longest = (args.vllm_max_model_length or 0) - generation.max_completion_length
        self._most_tokens = max(arguments["max_num_batched_tokens"], together * longest)
        arguments["max_num_batched_tokens"] = self._most_tokens
        self._together = together
        if generation.accelerator.device.type == "cpu":
            arguments["enforce_eager"] = True  # its compiler would take minutes for a run of minutes
        if self._settings is not None:
            numbers = self._settings.hyperparameters()
            arguments |= engine_arguments(numbers, architecture, sampling_temperature=args.temperature)
        with TemporaryDirectory() as folder:
            config = copy(model.config)
            config.architectures = [architecture]
            config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            generation.processing_class.save_pretrained(folder)
            return kind(**{**arguments, "model": folder})

    def roll_out(self, generation: Any, prompts: list[Any], sampling_params: Any, num_generations: int) -> list[Any]:
        """`LLM.generate`, the rows of a group tagged as such; keeps the record of the rollout.

        Args:
            generation: the `VLLMGeneration`.
            prompts: B of them, the copies of a prompt side by side.
            sampling_params: of all rows.
            num_generations: N, copies of a prompt.

        Raises:
            RolloutRefused: N does not divide B, and the mode needs whole groups; a group does not fit the engine.
        """
        rows, device = len(prompts), generation.accelerator.device
        first = generation.accelerator.process_index * rows
        self.state = M3POGenerationState(group_ids=torch.arange(first, first + rows) // num_generations)
        if self._settings is None:
            outputs = generation.llm.generate(prompts, sampling_params=sampling_params, use_tqdm=False)
            self.state.record = _plain_record(outputs, device)
            return outputs
        from m3po_vllm.requests import GROUP, PATH, PATHS, RECORD
        from m3po_vllm.scheduler import GroupRefused

        check_whole(rows, num_generations)
        self._check_length(max(len(prompt["prompt_token_ids"]) for prompt in prompts), generation)
        _load_buffers(generation)
        groups = [f"rollout {self._begun}, {row}" for row in range(0, rows, num_generations)]
        self._begun += 1
        tagged = []
        for row in range(rows):
            group, path = divmod(row, num_generations)
            tagged.append(copy(sampling_params))
            tagged[-1].extra_args = {PATHS: num_generations, GROUP: groups[group], PATH: path, RECORD: True}
        try:
            outputs = generation.llm.generate(prompts, sampling_params=tagged, use_tqdm=False)
        except GroupRefused as error:
            raise RolloutRefused(str(error)) from error
        self.state.record, statistics = generation.llm.collective_rpc("take_m3po_records", args=(groups,))[0]
        self.state.statistics = {name: torch.tensor(value, device=device) for name, value in statistics.items()}
        return outputs

    def _check_length(self, longest: int, generation: Any) -> None:
        """Refuses prompts that are so long that what has to begin in one step cannot."""
        if self._together * longest > self._most_tokens:
            need = longest + generation.max_completion_length
            raise RolloutRefused(
                f"a prompt has {longest} tokens, and {self._together} of them are read in one step, in which this "
                f"engine reads {self._most_tokens}: set vllm_max_model_length to {need} or more."
            )


def _check_tied(model: Any) -> None:
    """Refuses an adapter that makes two matrices of head and embeddings: the engine would keep one.

    Raises:
        ValueError: it names the layer.
    """
    if not model.config.tie_word_embeddings:
        return
    for adapter in getattr(model, "peft_config", {}).values():
        trained = {
            *(adapter.modules_to_save or ()),
            *([] if isinstance(adapter.target_modules, str) else adapter.target_modules or ()),
        }
        for name in sorted(trained & {"lm_head", "embed_tokens"}):
            raise ValueError(
                f"rollout_engine='vllm': the adapter trains {name} of a model whose head and embeddings are one "
                "matrix, and the engine's would stay one; leave that layer out, or set rollout_engine='generate'."
            )


def _load_buffers(generation: Any) -> None:
    """Gives the engine the buffers of a learnable gating function; upstream hands on parameters alone."""
    engine = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    for name, value in generation.model.named_buffers():
        if GATING.among([name]) and "original_module" not in name:
            name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            engine.load_weights([(name, value)])


def _plain_record(outputs: list[Any], device: torch.device) -> RolloutRecord:
    """The log-probs of the tokens of plain requests, one a row."""
    rows = [
        torch.tensor([of[token].logprob for token, of in zip(one.token_ids, one.logprobs, strict=True)])
        for one in (output.outputs[0] for output in outputs)
    ]
    return RolloutRecord(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device))


def check_whole(rows: int, num_generations: int) -> None:
    """Refuses B = `rows` of a rollout that are not whole groups of N = `num_generations`."""
    if rows % num_generations:
        raise RolloutRefused(
            f"{rows} rollouts at a time are not whole groups of {num_generations}: make "
            "per_device_eval_batch_size a multiple of num_generations_eval (or of num_generations)."
        )


def vllm_rollouts(args: Any) -> VLLMRollouts | None:
    """Hook in `GRPOTrainer`: what it gives its `VLLMGeneration`; None where that is as upstream has it."""
    return VLLMRollouts(args) if args.rollout_engine == "vllm" else None


def make_engine(kind: Any, generation: Any) -> Any:
    """Hook in `_init_vllm`, in place of `LLM`: what makes the engine."""
    return kind if generation.m3po is None else partial(generation.m3po.make_engine, kind, generation)


def roll_out(generation: Any, prompts: list[Any], sampling_params: Any, num_generations: int) -> list[Any]:
    """Hook in `generate`, in place of `llm.generate`."""
    if generation.m3po is None:
        return generation.llm.generate(prompts, sampling_params=sampling_params, use_tqdm=False)
    return generation.m3po.roll_out(generation, prompts, sampling_params, num_generations)
