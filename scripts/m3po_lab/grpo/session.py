# SPDX-License-Identifier: Apache-2.0
"""One training run from its parsed arguments to its report: problems, model, TRL's `GRPOTrainer`, evaluation.

What differs from a plain use of the trainer: the order of the problems is fixed in the dataset (`data.training_rows`),
checkpoints lie at the ends of generation cycles (`checkpoints`), and the training time survives a resume.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.m3po.aslr.settings import ASLRHyperparameters
from transformers.m3po.flags import has_aslr
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.m3po.vllm_rollouts import RolloutRefused

from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import check_writable, shown_path
from m3po_lab.core.identity import SaveRunFile, short_digest
from m3po_lab.core.processes import check_engine
from m3po_lab.core.provenance import CODE, source_digest
from m3po_lab.core.saving import ObeyUmask, obey_umask, save_model
from m3po_lab.evaluation.decoding import Paths, Thoughts
from m3po_lab.evaluation.evaluate import (
    Answered,
    Sampled,
    answer_problems,
    cache_key,
    load_cached,
    sample_problems,
    store,
)
from m3po_lab.evaluation.settings import EvalSettings, SaveSettings
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.callbacks import RewardBar, TrainingClock, close_bar
from m3po_lab.grpo.checkpoints import check_save_steps
from m3po_lab.grpo.identity import begin, of_run
from m3po_lab.grpo.report import Evaluations, write_report
from m3po_lab.grpo.resume import check_same_run, claim_run_folder
from m3po_lab.models.adapters import lora_of
from m3po_lab.models.digest import model_digest
from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model
from m3po_lab.models.unsloth_model import load_with_unsloth
from m3po_lab.problems.data import chat_prompt, load_problems, training_rows
from m3po_lab.problems.data_sources import Problem
from m3po_lab.problems.rewards import make_rewards

START_EVALUATIONS = "start_evaluations"  # a folder beside the run folders


def rows_of_run(training: GRPOConfig, problems: int) -> int:
    """Rows (prompts) that a run consumes: whole generation batches, from `max_steps` or from `num_train_epochs`.

    Raises:
        UserError: when there are fewer problems than one generation batch has prompts.
    """
    prompts = training.generation_batch_size // training.num_generations
    if training.max_steps > 0:
        micro_steps = training.max_steps * training.gradient_accumulation_steps
        return math.ceil(micro_steps / (training.steps_per_generation * training.num_iterations)) * prompts
    rows = int(problems * training.num_train_epochs)
    if rows < prompts:
        raise UserError(f"--num_train_problems: {rows} are fewer than the {prompts} prompts of a generation batch.")
    return rows


def run_session(run: Run, words: Sequence[str]) -> None:
    """Train and report; `words` are those of the command line, for the report.

    Raises:
        UserError: for a wrong input, before anything is trained; for a rollout that the engine cannot make.
    """
    training = run.training
    check_writable(run.folder)
    check_save_steps(training)
    flags = of_run(run)
    resume = claim_run_folder(run, flags)
    about = begin(run, flags, resume)
    train_problems, held_out = load_problems(run.script)
    rows = training_rows(train_problems, run.script, rows_of_run(training, len(train_problems)))
    training.shuffle_dataset = False  # the order is in the rows
    if training.max_steps <= 0:
        training.num_train_epochs = 1
    clock = TrainingClock(run.engine.name)
    trainer = build_trainer(run, rows, clock)
    if resume is not None:
        check_same_run(resume, run, flags, settled=True)
    if trainer.accelerator.is_main_process:
        print(run.engine.describe())
        print(start_line(run, trainer, len(train_problems), len(held_out), resume))
    settings = EvalSettings.of_run(run.script, training, trainer.accelerator.mixed_precision)
    trainer.add_callback(SaveSettings(settings))
    trainer.add_callback(SaveRunFile(about))
    before = evaluate_before(run, trainer, held_out, settings)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except RolloutRefused as error:
        raise UserError(one_line(error)) from error
    finally:
        close_bar(trainer)
    save_model(trainer, run.folder / "final")
    after = evaluate_now(trainer, settings, "held-out, after")
    sampled = sample_now(run, trainer, settings) if run.script.num_eval_paths else []
    if trainer.accelerator.is_main_process:
        settings.write(run.folder / "final")
        write_report(run, words, trainer, held_out, Evaluations(before, after, sampled), clock.seconds, about)
    trainer.accelerator.wait_for_everyone()


def build_trainer(run: Run, rows: Any, clock: TrainingClock) -> GRPOTrainer:
    """TRL's trainer, or what Unsloth has put in its place, on the run's model, with our progress bar.

    Raises:
        UserError: when the trainer refuses its arguments.
    """
    try:
        model, tokenizer = (
            load_model(run.model) if run.engine.name == "trl" else load_with_unsloth(run.model, run.training)
        )
        peft_config = None if isinstance(model, PeftModel) else lora_of(run.model)
        if run.training.beta > 0 and peft_config is None and not isinstance(model, PeftModel):
            settle_reference(run, model)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=make_rewards(run.training.answer_start),
            args=run.training,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[clock, ObeyUmask()],
        )
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if run.training.use_vllm:
        set_seed(run.training.seed, device_specific=True)  # vLLM has seeded the process alike in every run
    check_engine(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RewardBar())
    return trainer


def start_line(run: Run, trainer: GRPOTrainer, train: int, held_out: int, resume: Path | None) -> str:
    """What runs, in one line: mode with its numbers and answer marker, model, data, steps, where from."""
    settings = trainer.m3po.settings
    numbers = f"answer marker {run.training.answer_start!r}" if settings is None else settings.describe()
    model = trainer.accelerator.unwrap_model(trainer.model)
    aslr = ""
    if has_aslr(model):
        values = ASLRHyperparameters.of(model.config, {}).describe()
        aslr = f" with ASLR ({values}; on in training, off in the evaluations)"
    return (
        f"mode {run.training.mode} ({numbers}){aslr}; {run.model.model_name_or_path or EMBEDDED_MODEL}; "
        f"{run.script.dataset}: {train} training and {held_out} held-out problems; "
        f"{'from the start' if resume is None else f'from {resume.name}'} into {shown_path(run.folder)}"
    )


def settle_reference(run: Run, model: PreTrainedModel) -> None:
    """Make TRL's reference model the start model: TRL loads it anew by the model's name.

    A model from a GGUF file is saved as a folder first, which then is its name.
    """
    name = run.model.model_name_or_path or EMBEDDED_MODEL
    options = {"dtype": str(model.dtype).removeprefix("torch."), "attn_implementation": run.model.attn_implementation}
    if name == EMBEDDED_MODEL or name.endswith(".gguf"):
        folder = run.folder / "reference"
        if run.training.process_index == 0:
            model.save_pretrained(folder)
            obey_umask(folder)
        run.training.distributed_state.wait_for_everyone()
        model.config.name_or_path = model.name_or_path = str(folder)
    else:
        options["revision"] = run.model.model_revision
    run.training.model_init_kwargs = {**options, **(run.training.model_init_kwargs or {})}


def evaluate_now(trainer: GRPOTrainer, settings: EvalSettings, label: str) -> list[Answered]:
    """Greedy completions of the held-out problems by the trainer's model as it is now, judged."""
    with model_for_evaluation(trainer) as model:
        return answer_problems(model, trainer.processing_class, settings, label, thoughts_of(trainer))


def sample_now(run: Run, trainer: GRPOTrainer, settings: EvalSettings) -> list[Sampled]:
    """Sampled completions by the trainer's model as it is now, judged: each path for itself, with its own thoughts."""
    thoughts = thoughts_of(trainer)
    paths = Paths(run.script.num_eval_paths, trainer.args.temperature, None if thoughts is None else thoughts.settings)
    with model_for_evaluation(trainer) as model:
        limit = run.script.num_sampled_problems
        return sample_problems(model, trainer.processing_class, settings, "held-out, sampled", paths, limit)


@contextmanager
def model_for_evaluation(trainer: GRPOTrainer) -> Iterator[Any]:
    """The trainer's model as an evaluation wants it; all processes take part.

    A model split over the processes is put together as TRL does for its rollouts. Before the training it may still
    lie in the memory of the machine: then it is on its device for as long as this takes.
    """
    accelerator = trainer.accelerator
    with unwrap_model_for_generation(
        trainer.model_wrapped, accelerator, gather_deepspeed3_params=trainer.args.ds3_gather_for_generation
    ) as model:
        home = model.device
        if home != accelerator.device:
            model.to(accelerator.device)
        yield model
        if home != accelerator.device:
            model.to(home)


def thoughts_of(trainer: GRPOTrainer) -> Thoughts | None:
    """The thoughts that the run's model has when it is evaluated."""
    return Thoughts.of_mode(trainer.m3po.settings, trainer.args.temperature)


def evaluate_before(run: Run, trainer: GRPOTrainer, held_out: list[Problem], settings: EvalSettings) -> list[Answered]:
    """The evaluation of the start model.

    It is saved in the run folder, so that a resumed run does not repeat it, and beside it under `START_EVALUATIONS`, so
    that other runs that start alike, by the same code, do not either.
    """
    own = beside = run.folder / "baseline.json"
    key = ""
    stored: list[list[Answered]] = [[]]
    if trainer.accelerator.is_main_process:
        prompts = [chat_prompt(problem, run.script) for problem in held_out]
        how = [run.model.dtype, run.model.attn_implementation, asdict(settings)]
        if (thoughts := thoughts_of(trainer)) is not None:  # a fresh residual gate is made of the run's own numbers
            start = ("seed", "thinking_residual_r_min", "thinking_residual_r_max")
            how += [asdict(thoughts), *(getattr(trainer.args, name) for name in start)]
        key = cache_key(model_digest(run.model), prompts, held_out, how)
        code = source_digest(PROJECT_ROOT, CODE)
        accelerator = trainer.accelerator
        where = [run.engine.name, run.model.load_in_4bit, accelerator.device.type, accelerator.num_processes]
        beside = run.folder.parent / START_EVALUATIONS / f"{short_digest([key, code, *where])}.json"
        stored = [load_cached(own, key)]
        if not stored[0] and (found := load_cached(beside, key)):
            print(f"the start model was evaluated before: {shown_path(beside)}")
            store(own, key, found)
            stored = [found]
    broadcast_object_list(stored)
    if stored[0]:
        return stored[0]
    answered = evaluate_now(trainer, settings, "held-out, before")
    if trainer.accelerator.is_main_process:
        store(own, key, answered)
        with suppress(OSError):  # the folder of the run folder may be another user's
            store(beside, key, answered)
    return answered
