# SPDX-License-Identifier: Apache-2.0
"""What the trainer calls in a run: the clock of the training time, and the progress bar with the rewards."""

from time import perf_counter
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds spent in optimizer steps, over all parts of an interrupted run: they lie in `trainer_state.json`.

    So do the engine and the number of processes, with which alone a checkpoint can be resumed
    (`resume.check_same_run`).
    """

    def __init__(self, engine: str = "trl") -> None:
        self.engine = engine
        self.seconds = 0.0
        self._last = 0.0
        self._processes = 1

    def state(self) -> dict[str, Any]:
        attributes = {"seconds": self.seconds, "processes": self._processes, "engine": self.engine}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__, {})
        self.seconds = float(stored.get("attributes", {}).get("seconds", 0.0))
        self._processes = args.world_size
        self._last = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = perf_counter()
        self.seconds += now - self._last
        self._last = now


class RewardBar(ProgressCallback):
    """The Trainer's progress bar with the two numbers one watches, instead of a dictionary of thirty a step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            shown = {"reward": logs["reward"], "correct": logs["rewards/correct_reward/mean"]}
            self.training_bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})


def close_bar(trainer: GRPOTrainer) -> None:
    """End the progress bar of a training that was stopped, so that the next message begins on a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RewardBar) and callback.training_bar is not None:
            callback.training_bar.close()
