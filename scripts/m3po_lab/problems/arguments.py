# SPDX-License-Identifier: Apache-2.0
"""The flags that name the problems of a run and the prompt."""

from dataclasses import dataclass, field
from typing import Any

from m3po_lab.command_line.parser import parse_mapping
from m3po_lab.core.errors import UserError


@dataclass
class DataArguments:
    """The problems of a run and those that are held out for its report."""

    dataset: str = field(
        default="reasoning-gym:chain_sum",
        metadata={
            "help": "Problems: 'reasoning-gym:<task>' (generated); from the Hub 'openai/gsm8k', "
            "'EleutherAI/hendrycks_math' (MATH) or 'mmlu_arc' (MMLU's auxiliary_train and ARC-Challenge); or the path "
            "of a .jsonl file with GSM8K's fields 'question' and 'answer', the latter ending in '#### <number>'."
        },
    )
    dataset_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the reasoning-gym task as JSON or YAML, e.g. '{\"max_digits\": 2}'."},
    )
    num_train_problems: int = field(
        default=4000,
        metadata={"help": "Training problems. A generated task may repeat one, as its distribution does."},
    )
    num_eval_problems: int = field(
        default=400,
        metadata={"help": "Held-out problems for the report: distinct, and excluded from training."},
    )
    problem_seed: int = field(
        default=7, metadata={"help": "Seed of the training problems and of their order in the run."}
    )
    eval_seed: int = field(default=999, metadata={"help": "Seed of the held-out problems."})

    def __post_init__(self) -> None:
        self.dataset_config = parse_mapping("dataset_config", self.dataset_config)


@dataclass
class ProblemArguments(DataArguments):
    """The problems and the prompt that asks them."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn before every prompt; none if unset."}
    )
    prompt_template: str = field(
        default="{question}",
        metadata={
            "help": "The user turn. '{question}' and, for a generated task, the text and number fields of its "
            "metadata are filled in, e.g. 'What is {expression}?' for chain_sum. Other braces are doubled: {{ and }}."
        },
    )
    worked_example: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A solved problem shown before each one as a user and an assistant turn, as JSON or YAML: "
            "{question: What is 7 + 5?, answer: It is 12.}"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.worked_example = parse_mapping("worked_example", self.worked_example)
        if self.worked_example is not None and set(self.worked_example) != {"question", "answer"}:
            raise UserError(
                f"--worked_example has the keys {sorted(self.worked_example)}: it needs just 'question' and 'answer'."
            )
