# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint to evaluate is: its `m3po.json`, whether the flags and the model agree with it, how it decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.m3po import ThinkingSettings, read_checkpoint_info
from transformers.m3po.aslr.settings import ASLRHyperparameters, check_aslr_hyperparameters
from transformers.m3po.checkpoint import CHECKPOINT_FILE
from transformers.m3po.flags import has_aslr
from transformers.m3po.modules import ASLR, GATING, RESIDUAL_GATE
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.evaluation.decoding import LatentPaths, Paths, Thoughts
from m3po_lab.evaluation.tasks import MARKER

# How each mode decodes when it is evaluated.
INFERENCE = {
    "none": "plain, one path",
    "m3po": "plain, one path: the mode acts in training only (M3PO paper, section 6)",
    "hrpo": "one path with its soft thoughts",
    "h3po": "one path with its soft thoughts, without peers",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate, by what its `m3po.json` says; without that file, by what the flags say.

    Args:
        name: folder, file or Hub id of the model.
        mode: a key of `INFERENCE`.
        settings: how the mode thinks; None in mode `none`.
        sampling_temperature: the temperature that the completions of the training were sampled at; 1 by default.
        answer_start: the answer marker.
        stored: the content of `m3po.json`, or the mode and the flags.
    """

    name: str
    mode: str
    settings: ThinkingSettings | None
    sampling_temperature: float
    answer_start: str
    stored: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, flags: Mapping[str, Any]) -> Checkpoint:
        """A checkpoint, or a model without `m3po.json`: mode `none` or what the flags say.

        Args:
            name: of the model.
            flags: those that name a hyperparameter, None where one is not set.

        Raises:
            UserError: for the first flag that contradicts the checkpoint, for a mode that is not known here, and for
                hyperparameters that break a rule.
        """
        flags = {flag: value for flag, value in flags.items() if value is not None}
        stored = _read_file(name, flags) if (Path(name) / CHECKPOINT_FILE).is_file() else _from_flags(name, flags)
        mode = stored["mode"]
        if mode not in INFERENCE:
            raise UserError(f"mode {mode} is unknown here; the modes are {', '.join(INFERENCE)}.")
        return cls(
            name=name,
            mode=mode,
            settings=_thinking_settings(stored),
            sampling_temperature=float(stored.get("sampling_temperature", 1.0)),
            answer_start=stored.get("answer_start", MARKER),
            stored=stored,
        )

    @property
    def thoughts(self) -> Thoughts | None:
        """The soft thoughts of a greedy path; None in the modes without."""
        return Thoughts.of_mode(self.settings, self.sampling_temperature)

    def decoded_with(self, paths: Paths | None) -> ThinkingSettings | None:
        """How it thinks when it is evaluated, as `paths` or as one path; None where it decodes plainly."""
        if paths is not None:
            return paths.settings
        return None if self.thoughts is None else self.thoughts.settings

    def paths(self, number: int, seed: int) -> Paths | None:
        """How N paths of each problem are sampled; None for one path."""
        return None if number == 1 else Paths(number, self.sampling_temperature, self.settings, seed)

    def check_modules(self, model: Any, paths: Paths | None) -> None:
        """Refuse a model whose modules are not those of the checkpoint.

        Args:
            model: as loaded.
            paths: how N paths are sampled, if they are; they need the learnable gating function, which one path does
                not use.

        Raises:
            UserError: it names what the file says and what the model has.
        """
        if RESIDUAL_GATE.difference(model, self.stored) is not None:
            raise UserError(
                f"{self.name} has {'a' if RESIDUAL_GATE.on(model) else 'no'} residual gate, which does not fit mode "
                f"{self.mode}: evaluate the folder that its run saved, with its m3po.json."
            )
        gating = GATING.difference(model, self.stored) if self.mode in CROSS_PATH_MODES else None
        if gating is not None and not GATING.on(model):
            if paths is not None:
                raise UserError(
                    f"--num_paths {paths.number}: {self.name} has not the gating function that its group interacts "
                    f"through ({gating[1]}), as after make export-model ... GATING=off; take the checkpoint of its "
                    "run, or leave the flag out."
                )
        elif gating is not None:
            name, stored, value = gating
            raise UserError(
                f"{self.name}: its {CHECKPOINT_FILE} says {name} {stored} and its model has {value}; take the folder "
                "as its run saved it."
            )
        without = {ASLR.switch: False} if (Path(self.name) / CHECKPOINT_FILE).is_file() else {}
        aslr = ASLR.difference(model, without | dict(self.stored))
        if aslr is not None:
            name, stored, value = aslr
            raise UserError(
                f"{name}: {self.name} was trained with {stored}, and the configuration of the model says {value}; "
                "evaluate the folder that its run saved, as it is."
            )

    def latent_paths(self, model: Any, aslr: str, seed: int, rounds: int | None) -> dict[str, LatentPaths | None]:
        """How ASLR runs in each evaluation that was asked for, by name: `off`, `on`, and `R=1` for reduced rounds.

        Args:
            model: as loaded.
            aslr: `--aslr`: off, on or both.
            seed: of the noise.
            rounds: R in place of the model's; with `both` an evaluation of its own.

        Raises:
            UserError: the model has no ASLR to turn on, or `rounds` breaks its rule.
        """
        if aslr == "off":
            return {"off": None}
        if not has_aslr(model):
            raise UserError(
                f"--aslr {aslr}: {self.name} has no ASLR; leave the flag out, or train with --aslr_enabled true."
            )
        try:
            check_aslr_hyperparameters({"aslr_max_iterations": rounds})
        except ValueError as error:
            raise UserError(f"--{one_line(error)}") from error
        if aslr == "on":
            return {"on": LatentPaths(seed, rounds)}
        usual = (None, model.config.aslr_max_iterations)
        reduced = {} if rounds in usual else {f"R={rounds}": LatentPaths(seed, rounds)}
        return {"off": None, **reduced, "on": LatentPaths(seed)}

    def describe(self, paths: Paths | None) -> str:
        """The mode, its hyperparameters and how it decodes here, in one line."""
        mode = f"mode {self.mode}" + (f" ({self.settings.describe()})" if self.settings else "")
        if paths is None:
            return f"{mode}; evaluated {INFERENCE[self.mode]}, greedy"
        kind = "a cross-path group" if self.mode in CROSS_PATH_MODES else "independent samples"
        return f"{mode}; {paths.number} paths of each problem as {kind}, sampling temperature {paths.temperature:g}"


def describe_aslr(model: Any, evaluations: Mapping[str, LatentPaths | None]) -> str:
    """How ASLR runs in each evaluation, to follow `Checkpoint.describe`; empty on a model without it."""
    if not has_aslr(model):
        return ""
    parts = []
    for name, aslr in evaluations.items():
        numbers = ASLRHyperparameters.of(model.config, {} if aslr is None else aslr.overrides).describe()
        parts.append(f"; ASLR {name} (is_m3po_inference={aslr is None}): {numbers}")
    return "".join(parts)


def _read_file(name: str, flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `m3po.json` says, where no flag contradicts it."""
    try:
        stored = read_checkpoint_info(name)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    for flag, value in flags.items():
        if value != stored.get(flag):
            raise UserError(
                f"--{flag} {value}: {Path(name) / CHECKPOINT_FILE} says mode {stored['mode']} with {flag} "
                f"{stored.get(flag)}; a checkpoint is evaluated as what it is, so leave the flag out."
            )
    return stored


def _from_flags(name: str, flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mode and the hyperparameters of a model without `m3po.json`."""
    stored = {"mode": "none", **flags}
    interacting = [flag for flag in flags if flag.startswith(("cross_path", "gating"))]
    if stored["mode"] in RESIDUAL_MODES:
        raise UserError(
            f"--mode {stored['mode']}: {name} is no checkpoint of that mode, and a residual gate that nobody trained "
            "would be random; train it first, or leave the flag out."
        )
    if stored["mode"] == "none" and interacting:
        raise UserError(f"--{interacting[0]} goes with --mode m3po; {name} is evaluated in mode none.")
    return stored


def _thinking_settings(stored: Mapping[str, Any]) -> ThinkingSettings | None:
    """How a checkpoint thinks; None in mode `none`."""
    if stored["mode"] == "none":
        return None
    names = {entry.name for entry in fields(ThinkingSettings)}
    try:
        return ThinkingSettings(**{name: value for name, value in stored.items() if name in names})
    except (ValueError, TypeError) as error:
        raise UserError(f"--{one_line(error)}") from error
