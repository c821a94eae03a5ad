# SPDX-License-Identifier: Apache-2.0
"""What `m3po.json` says of a checkpoint to evaluate, and whether the flags agree with it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.m3po import ThinkingSettings, read_checkpoint_info
from transformers.m3po.aslr.settings import ASLR_NUMBERS, ASLRNumbers, check_aslr_numbers
from transformers.m3po.checkpoint import CHECKPOINT_FILE
from transformers.m3po.flags import has_aslr
from transformers.m3po.gating.factory import gate_class
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES

from m3po_lab.evaluation.decoding import LatentPaths, Paths, Thoughts
from m3po_lab.grpo.config import UserError, one_line

# How each mode decodes when it is evaluated (design, section 4).
INFERENCE = {
    "none": "plain, one path",
    "m3po": "plain, one path: the mode acts in training only (M3PO paper, section 6)",
    "hrpo": "one path with its soft thoughts",
    "h3po": "one path with its soft thoughts, without peers",
}


def checkpoint_numbers(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The mode and numbers of a checkpoint; of a model without `m3po.json`, mode `none` or what the flags say.

    Args:
        given: the flags that name such numbers, None where one is not set.

    Raises:
        UserError: for the first flag that contradicts the checkpoint, and for a mode that is not known here.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    if (Path(model) / CHECKPOINT_FILE).is_file():
        try:
            numbers = read_checkpoint_info(model)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        for name, value in flags.items():
            if value != numbers.get(name):
                raise UserError(
                    f"--{name} {value}: {Path(model) / CHECKPOINT_FILE} says mode {numbers['mode']} with {name} "
                    f"{numbers.get(name)}; a checkpoint is evaluated as what it is, so leave the flag out."
                )
    else:
        numbers = {"mode": "none", **flags}
        interacting = [name for name in flags if name.startswith(("cross_path", "gating"))]
        if numbers["mode"] in RESIDUAL_MODES:
            raise UserError(
                f"--mode {numbers['mode']}: {model} is no checkpoint of that mode, and a residual gate that nobody "
                "trained would be random; train it first, or leave the flag out."
            )
        if numbers["mode"] == "none" and interacting:
            raise UserError(f"--{interacting[0]} goes with --mode m3po; {model} is evaluated in mode none.")
    if numbers["mode"] not in INFERENCE:
        raise UserError(f"mode {numbers['mode']} is unknown here; the modes are {', '.join(INFERENCE)}.")
    return numbers


def aslr_of(
    numbers: dict[str, Any], name: str, model: Any, how: str, seed: int, rounds: int | None
) -> dict[str, LatentPaths | None]:
    """How ASLR runs in each evaluation that was asked for, by name: `off`, `on`, and `R=1` for reduced rounds.

    Args:
        numbers: of `checkpoint_numbers`.
        name: of the model.
        model: as loaded; its configuration says what ASLR it has.
        how: `--aslr`: off, on or both.
        seed: of the noise.
        rounds: R in place of the model's; with `both` an evaluation of its own.

    Raises:
        UserError: `m3po.json` or a flag says another number than the model's configuration, or the model has no ASLR
            to turn on, or `rounds` breaks its rule.
    """
    has = {"aslr_enabled": has_aslr(model), **{key: getattr(model.config, key, None) for key in ASLR_NUMBERS}}
    told = {key: numbers[key] for key in has if key in numbers}
    if (Path(name) / CHECKPOINT_FILE).is_file():
        told.setdefault("aslr_enabled", False)
    for key, value in told.items():
        if value != has[key]:
            raise UserError(
                f"{key}: {name} was trained with {value}, and the configuration of the model says {has[key]}; evaluate "
                "the folder that its run saved, as it is."
            )
    if how == "off":
        return {"off": None}
    if not has_aslr(model):
        raise UserError(f"--aslr {how}: {name} has no ASLR; leave the flag out, or train with --aslr_enabled true.")
    try:
        check_aslr_numbers({"aslr_max_iterations": rounds})
    except ValueError as error:
        raise UserError(f"--{one_line(error)}") from error
    if how == "on":
        return {"on": LatentPaths(seed, rounds)}
    reduced = {} if rounds in (None, model.config.aslr_max_iterations) else {f"R={rounds}": LatentPaths(seed, rounds)}
    return {"off": None, **reduced, "on": LatentPaths(seed)}


def aslr_line(model: Any, found: dict[str, LatentPaths | None]) -> str:
    """Whether ASLR runs in the evaluations, to follow `mode_line`; empty on a model without it."""
    if not has_aslr(model):
        return ""
    told = []
    for name, aslr in found.items():
        numbers = ASLRNumbers.of(model.config, {} if aslr is None else aslr.overrides).describe()
        told.append(f"; ASLR {name} (is_m3po_inference={aslr is None}): {numbers}")
    return "".join(told)


def paths_of(numbers: dict[str, Any], num_paths: int, seed: int) -> Paths | None:
    """How N paths of each problem are sampled; None for one path.

    Raises:
        UserError: for numbers that break a rule of cross-path interaction.
    """
    if num_paths == 1:
        return None
    return Paths(num_paths, sampling_temperature(numbers), thinking_settings(numbers), seed)


def check_gate(numbers: dict[str, Any], model: Any, name: str, paths: Paths | None) -> None:
    """Refuses a gate that is not the one `m3po.json` tells of, and a group of paths whose gate was left out.

    Raises:
        UserError: it names both.
    """
    settings = thinking_settings(numbers)
    config = model.config
    has = config.m3po_gating_type if getattr(config, "m3po_gating_enabled", False) else None
    if settings is None or settings.mode not in CROSS_PATH_MODES or not (settings.learns or has):
        return
    if has is None:
        if paths is not None:
            raise UserError(
                f"--num_paths {paths.number}: {name} has not the gate that its group interacts through "
                f"({settings.gating_type}), as after make export-model ... GATING=off; take the checkpoint of its run, "
                "or leave the flag out."
            )
        return
    told = {"gating_type": settings.gating_type, **gate_class(settings.gating_type).structure(settings.gating_config)}
    found = {"gating_type": has, **gate_class(has).structure(config.m3po_gating_config)}
    for key, value in found.items():
        if told.get(key) != value:
            raise UserError(
                f"{name}: its {CHECKPOINT_FILE} says {key} {told.get(key)} and its model has {value}; take the folder "
                "as its run saved it."
            )


def thoughts_of(numbers: dict[str, Any]) -> Thoughts | None:
    """The soft thoughts of a greedy path; None in the modes without."""
    return Thoughts.of_mode(thinking_settings(numbers), sampling_temperature(numbers))


def sampling_temperature(numbers: dict[str, Any]) -> float:
    """The temperature that a checkpoint's completions were sampled at; 1 for a model that says none."""
    return float(numbers.get("sampling_temperature", 1.0))


def thinking_settings(numbers: dict[str, Any]) -> ThinkingSettings | None:
    """How a checkpoint thinks; None in mode `none`.

    Raises:
        UserError: for numbers that break one of its rules.
    """
    if numbers["mode"] == "none":
        return None
    known = {entry.name for entry in fields(ThinkingSettings)}
    try:
        return ThinkingSettings(**{name: value for name, value in numbers.items() if name in known})
    except (ValueError, TypeError) as error:
        raise UserError(f"--{one_line(error)}") from error


def mode_line(numbers: dict[str, Any], paths: Paths | None) -> str:
    """The mode, its numbers and how it decodes here, in one line."""
    settings = thinking_settings(numbers)
    said = f"mode {numbers['mode']}" + (f" ({settings.describe()})" if settings else "")
    if paths is None:
        return f"{said}; evaluated {INFERENCE[numbers['mode']]}, greedy"
    kind = "a cross-path group" if numbers["mode"] in CROSS_PATH_MODES else "independent samples"
    return f"{said}; {paths.number} paths of each problem as {kind}, sampling temperature {paths.temperature:g}"
