# SPDX-License-Identifier: Apache-2.0
"""`evaluation.json`: how a run asks and judges its held-out problems, beside the weights of each of its checkpoints.

`m3po.json` says what a checkpoint is; this file says how its run evaluated it, so that `scripts/eval_gsm8k.sh` can
repeat the numbers of the report: the problems, the prompt, the marker, lengths and precision.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from m3po_lab.command_line.parser import OneLineParser
from m3po_lab.core.config_files import DEFAULT_CONFIG
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.problems.arguments import ProblemArguments

SETTINGS_FILE = "evaluation.json"
AUTOCAST = {"no": None, "bf16": "bfloat16", "fp16": "float16"}
OF_THE_PROBLEMS = ("dataset", "dataset_config", "num_eval_problems", "eval_seed")
OF_THE_PROMPT = ("system_prompt", "prompt_template", "worked_example")


@dataclass(frozen=True)
class EvalSettings:
    """What the evaluation of a run depends on, apart from the model.

    Args:
        dataset, dataset_config, num_eval_problems, eval_seed: the held-out problems, see `ProblemArguments`.
        system_prompt, prompt_template, worked_example: how they are asked.
        chat_template_kwargs: arguments of the chat template besides the turns, as in training.
        answer_start: the answer marker.
        max_completion_length: tokens after which a completion is cut.
        batch_size: rows decoded together.
        precision: `no` or the autocast of the training, `bf16` or `fp16`.
    """

    dataset: str
    dataset_config: dict[str, Any] | None
    num_eval_problems: int
    eval_seed: int
    system_prompt: str | None
    prompt_template: str
    worked_example: dict[str, Any] | None
    chat_template_kwargs: dict[str, Any] | None
    answer_start: str
    max_completion_length: int
    batch_size: int
    precision: str

    @classmethod
    def of_run(cls, problems: ProblemArguments, training: GRPOConfig, precision: str) -> "EvalSettings":
        """The settings of a run with these arguments; `precision` is accelerate's mixed precision."""
        return cls(
            **{name: getattr(problems, name) for name in OF_THE_PROBLEMS + OF_THE_PROMPT},
            chat_template_kwargs=training.chat_template_kwargs,
            answer_start=training.answer_start,
            max_completion_length=training.max_completion_length,
            batch_size=training.per_device_eval_batch_size,
            precision=precision,
        )

    @classmethod
    def read(cls, folder: Path) -> "EvalSettings | None":
        """The settings beside the weights in `folder`; None when there are none.

        Raises:
            UserError: when the file is there and is not one of ours.
        """
        file = folder / SETTINGS_FILE
        if not file.is_file():
            return None
        content = read_json(file)
        if content is None or set(content) != {entry.name for entry in fields(cls)}:
            raise UserError(f"{file} is not an evaluation file of this version: remove it, or train again.")
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write `evaluation.json` into `folder`."""
        write_json(folder / SETTINGS_FILE, asdict(self))

    @property
    def problems(self) -> ProblemArguments:
        """The arguments that make the held-out problems and their prompts, and one training problem."""
        return ProblemArguments(
            **{name: getattr(self, name) for name in OF_THE_PROBLEMS + OF_THE_PROMPT}, num_train_problems=1
        )


def demo_settings() -> EvalSettings:
    """How `configs/demo.yaml` evaluates."""
    words = ["--config", str(PROJECT_ROOT / DEFAULT_CONFIG)]
    problems, training, _ = OneLineParser(ProblemArguments, GRPOConfig).parse_args_and_config(
        words, return_remaining_strings=True
    )
    return EvalSettings.of_run(problems, training, "bf16" if training.bf16 else "no")


class SaveSettings(TrainerCallback):
    """Writes `evaluation.json` into every checkpoint."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.settings.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")
