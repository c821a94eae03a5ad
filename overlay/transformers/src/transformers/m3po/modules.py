# SPDX-License-Identifier: Apache-2.0
"""The modules that this overlay gives to a base model: made with it, loaded whole or not at all, copied (E13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .aslr.modules import ASLR_MODULES, ASLR_PARAMETERS, add_aslr, attach_aslr
from .aslr.settings import ASLR_NUMBERS
from .gating.factory import gate_class, list_gating_functions
from .gating.module import GATING_MODULE, add_gating, attach_gating, gating_parameters
from .hyper_connections.connections import MHC_MODULES, add_streams
from .settings import CROSS_PATH_MODES, DEFAULT_GATE, RESIDUAL_MODES
from .thinking.residual_gate import GATE_MODULES, GATE_PARAMETERS, add_residual_gate, attach_residual_gate

Hyperparameters = Mapping[str, Any]  # what `m3po.json` says
Difference = tuple[str, Any, Any]


def _cannot_attach(model: Any, hyperparameters: Hyperparameters) -> None:
    raise NotImplementedError("such modules are made with the model, not given to a plain one")


def _attach_residual_gate(model: Any, hyperparameters: Hyperparameters) -> None:
    start = {"r_min": 0.99, "r_max": 0.999}  # the bounds only say what the residual gate began with
    bounds = {name: hyperparameters.get(f"thinking_residual_{name}", value) for name, value in start.items()}
    attach_residual_gate(model, **bounds, seed=0)


def _residual_gate_difference(model: Any, hyperparameters: Hyperparameters) -> Difference | None:
    belongs, has = RESIDUAL_GATE.belongs(hyperparameters), RESIDUAL_GATE.on(model)
    return None if belongs == has else (RESIDUAL_GATE.switch, belongs, has)


def _aslr_difference(model: Any, hyperparameters: Hyperparameters) -> Difference | None:
    found = {ASLR.switch: ASLR.on(model), **{name: getattr(model.config, name, None) for name in ASLR_NUMBERS}}
    for name, value in found.items():
        if name in hyperparameters and hyperparameters[name] != value:
            return name, hyperparameters[name], value
    return None


def _learns(hyperparameters: Hyperparameters) -> bool:
    """Whether `m3po.json` names a mode whose paths interact, and a learnable gating function that is known here."""
    gating_type = hyperparameters.get("gating_type", DEFAULT_GATE)
    known = gating_type in list_gating_functions()  # another version may know other ones
    return hyperparameters.get("mode") in CROSS_PATH_MODES and known and gate_class(gating_type).learnable


def _gating_difference(model: Any, hyperparameters: Hyperparameters) -> Difference | None:
    gating_type = hyperparameters.get("gating_type", DEFAULT_GATE)
    if not GATING.on(model):
        return ("gating_type", gating_type, None) if GATING.belongs(hyperparameters) else None
    config = model.config
    stored = {"gating_type": gating_type, **gate_class(gating_type).structure(hyperparameters.get("gating_config"))}
    found = {
        "gating_type": config.m3po_gating_type,
        **gate_class(config.m3po_gating_type).structure(config.m3po_gating_config),
    }
    return next(((name, stored.get(name), value) for name, value in found.items() if stored.get(name) != value), None)


@dataclass(frozen=True)
class OwnModules:
    """Modules that come and go together.

    Args:
        switch: the field of the model configuration that says whether a model has them.
        noun, article: what they are called in a message, without an article and with one if there is any.
        names: their names on the base model.
        parameters: from what `m3po.json` says, the parameters of a checkpoint that has them, by their names on the base
            model.
        add: makes them on a base model if its configuration has them.
        belongs: from what `m3po.json` says, whether a checkpoint has them.
        stored: the names under which `m3po.json` says what `attach` needs.
        attach: gives a plain model fresh ones (in place), of the shape that `m3po.json` says; a ValueError where that
            breaks a rule.
        difference: the first thing in which those of a model are not what `m3po.json` says: its name, the value
            stored, and that of the model; None where they are the same. What the file does not say is not compared.
    """

    switch: str
    noun: str
    article: str
    names: tuple[str, ...]
    parameters: Callable[[Mapping[str, Any]], tuple[str, ...]]
    add: Callable[[Any], None]
    belongs: Callable[[Hyperparameters], bool] = lambda hyperparameters: False
    stored: tuple[str, ...] = ()
    attach: Callable[[Any, Hyperparameters], None] = _cannot_attach
    difference: Callable[[Any, Hyperparameters], Difference | None] = lambda model, hyperparameters: None

    def on(self, model: Any) -> bool:
        """Whether the configuration of a model says that it has these modules."""
        return bool(getattr(model.config, self.switch, False))

    def among(self, keys: Iterable[str]) -> list[str]:
        """Those of some parameter names that belong to these modules, sorted."""
        return sorted(key for key in keys if any(part in self.names for part in key.split(".")))


RESIDUAL_GATE = OwnModules(
    switch="thinking_residual_enabled",
    noun="residual gate",
    article="a residual gate",
    names=GATE_MODULES,
    parameters=lambda numbers: GATE_PARAMETERS,
    add=add_residual_gate,
    belongs=lambda hyperparameters: hyperparameters.get("mode") in RESIDUAL_MODES,
    attach=_attach_residual_gate,
    difference=_residual_gate_difference,
)
ASLR = OwnModules(
    switch="aslr_enabled",
    noun="ASLR modules",
    article="ASLR",
    names=ASLR_MODULES,
    parameters=lambda numbers: ASLR_PARAMETERS,
    add=add_aslr,
    belongs=lambda hyperparameters: bool(hyperparameters.get("aslr_enabled")),
    stored=("aslr_enabled", *ASLR_NUMBERS),
    attach=lambda model, hyperparameters: attach_aslr(model, **{name: hyperparameters[name] for name in ASLR_NUMBERS}),
    difference=_aslr_difference,
)
GATING = OwnModules(
    switch="m3po_gating_enabled",
    noun="learnable gate",
    article="a learnable gate",
    names=(GATING_MODULE,),
    parameters=gating_parameters,
    add=add_gating,
    belongs=_learns,
    stored=("gating_type", "gating_config"),
    attach=lambda model, hyperparameters: attach_gating(
        model, hyperparameters["gating_type"], hyperparameters["gating_config"]
    ),
    difference=_gating_difference,
)
OWN_MODULES = (RESIDUAL_GATE, ASLR, GATING)
# Not among those: most of them sit on the decoder layers, which make them, and no trainer adds them to a plain model.
HYPER_CONNECTIONS = OwnModules(
    switch="mhc_enabled",
    noun="hyper-connections",
    article="hyper-connections",
    names=MHC_MODULES,
    parameters=lambda numbers: (),
    add=add_streams,
)


def add_modules(model: Any) -> None:
    """Hook of `LlamaModel.__init__` and `Qwen2Model.__init__`: makes the modules that the configuration has."""
    for own in OWN_MODULES:
        own.add(model)


def copy_own_modules(own: OwnModules, source: Any, target: Any) -> None:
    """Makes these modules of `target` those of `source`, both models that have them."""
    for name in own.names:
        getattr(target.base_model, name).load_state_dict(getattr(source.base_model, name).state_dict())


def refuse_nested(model: Any) -> None:
    """Refuses modules in the language model of a composite one, whose own configuration does not speak of them.

    Raises:
        ValueError: it names the switch.
    """
    text = model.config.get_text_config()
    for own in (*OWN_MODULES, HYPER_CONNECTIONS):
        if text is not model.config and getattr(text, own.switch, False):
            raise ValueError(
                f"{own.switch}=True in the text_config of a {model.config.model_type!r} model: decoding would not know "
                "of it. Take a Llama or Qwen2 model, or set it to False."
            )


def check_loaded_modules(
    model: Any, missing_keys: Iterable[str], unexpected_keys: Iterable[str], load_config: Any
) -> None:
    """Hook of `from_pretrained`: modules that a checkpoint says it has are loaded whole, and none is dropped unasked.

    Args:
        model: as loaded.
        missing_keys: the parameters that the checkpoint lacks or has in another shape.
        unexpected_keys: those that the model lacks.
        load_config: upstream's description of what is loaded, with the checkpoint's name and where to look for it.

    Raises:
        ValueError: the checkpoint's own `config.json` has the switch on and a parameter is missing, or has it off and
            brings parameters. A plain checkpoint loaded with the switch on gets fresh modules instead, and a
            checkpoint with modules loaded with the switch off loses them on purpose.
    """
    missing_keys, unexpected_keys = list(missing_keys), list(unexpected_keys)
    for own in (*OWN_MODULES, HYPER_CONNECTIONS):
        missing, unexpected = own.among(missing_keys), own.among(unexpected_keys)
        if not (missing if own.on(model) else unexpected):
            continue
        checkpoint, stored = load_config.pretrained_model_name_or_path, _stored_config(model, load_config)
        if own.on(model) and stored.get(own.switch):
            raise ValueError(
                f"{checkpoint} says {own.switch}=True in its config.json but has no {missing[0]} of the right shape: "
                f"its {own.noun} would be random. Save it again with its {own.noun}, or load it with "
                f"{own.switch}=False as a plain model."
            )
        if not own.on(model) and not stored.get(own.switch):
            raise ValueError(
                f"{checkpoint} has {unexpected[0]} but its config.json does not say {own.switch}=True, so its "
                f"{own.noun} would be lost: load it with {own.switch}=True and the numbers it was trained with."
            )


def _stored_config(model: Any, load_config: Any) -> dict[str, Any]:
    """The `config.json` of a checkpoint; {} if it has none, as a GGUF file or a state dict."""
    if load_config.pretrained_model_name_or_path is None:
        return {}
    try:
        where = load_config.pretrained_model_name_or_path, load_config.download_kwargs or {}
        stored, _ = type(model.config).get_config_dict(where[0], **where[1])
    except OSError:
        return {}
    return stored
