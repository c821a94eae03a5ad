# SPDX-License-Identifier: Apache-2.0
"""The modules that this overlay adds to a base model: made with it, loaded whole or not at all, attached, compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .aslr.modules import ASLR_MODULES, ASLR_PARAMETERS, add_aslr, attach_aslr
from .aslr.settings import ASLR_HYPERPARAMETERS
from .gating.factory import gating_class, list_gating_functions
from .gating.module import GATING_MODULE, add_gating, attach_gating, gating_parameter_names
from .hyper_connections.connections import MHC_MODULES, add_streams
from .settings import CROSS_PATH_MODES, DEFAULT_GATING_TYPE, RESIDUAL_MODES
from .thinking.residual_gate import (
    RESIDUAL_GATE_MODULES,
    RESIDUAL_GATE_PARAMETERS,
    add_residual_gate,
    attach_residual_gate,
)

Hyperparameters = Mapping[str, Any]  # by the names that `m3po.json` and the flags have
Difference = tuple[str, Any, Any]


class AddedModules(ABC):
    """Modules that come and go together.

    Attributes:
        switch: the field of the model configuration that says whether a model has them.
        noun, article: what they are called in a message, without an article and with one if there is any.
        names: their names on the base model.
        needs: the hyperparameters without which `attach` cannot make them.
    """

    switch: ClassVar[str]
    noun: ClassVar[str]
    article: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()

    def on(self, model: Any) -> bool:
        """Whether the configuration of a model says that it has these modules."""
        return bool(getattr(model.config, self.switch, False))

    def among(self, keys: Iterable[str]) -> list[str]:
        """Those of some parameter names that belong to these modules, sorted."""
        return sorted(key for key in keys if any(part in self.names for part in key.split(".")))

    def copy(self, source: Any, target: Any) -> None:
        """Makes these modules of `target` those of `source`, both models that have them."""
        for name in self.names:
            getattr(target.base_model, name).load_state_dict(getattr(source.base_model, name).state_dict())

    def remove(self, model: Any) -> None:
        """Takes them off a model that has them; its configuration says so."""
        for name in self.names:
            delattr(model.base_model, name)
        setattr(model.config, self.switch, False)

    @abstractmethod
    def add(self, model: Any) -> None:
        """Makes them on a base model if its configuration has them."""

    @abstractmethod
    def belongs(self, hyperparameters: Hyperparameters) -> bool:
        """Whether a checkpoint or a run with these hyperparameters has them."""

    @abstractmethod
    def parameters(self, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        """The parameters of a checkpoint that has them, by their names on the base model."""

    @abstractmethod
    def attach(self, model: Any, hyperparameters: Hyperparameters, seed: int = 0) -> None:
        """Gives a plain model fresh ones (in place), the same for the same seed.

        Raises:
            ValueError: a hyperparameter breaks its rule.
        """

    def difference(self, model: Any, hyperparameters: Hyperparameters) -> Difference | None:
        """The first thing in which those of a model are not what hyperparameters say.

        Returns:
            Its name, the value there and the model's; None where they are the same. What is not there is not compared.
        """
        expected, present = self.belongs(hyperparameters), self.on(model)
        return None if expected == present else (self.switch, expected, present)


class _ResidualGate(AddedModules):
    """HRPO's residual gate, of the modes hrpo and h3po."""

    switch, noun, article = "thinking_residual_enabled", "residual gate", "a residual gate"
    names = RESIDUAL_GATE_MODULES

    def add(self, model: Any) -> None:
        add_residual_gate(model)

    def belongs(self, hyperparameters: Hyperparameters) -> bool:
        return hyperparameters.get("mode") in RESIDUAL_MODES

    def parameters(self, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        return RESIDUAL_GATE_PARAMETERS

    def attach(self, model: Any, hyperparameters: Hyperparameters, seed: int = 0) -> None:
        start = {"r_min": 0.99, "r_max": 0.999}  # the bounds only say what the residual gate begins with
        bounds = {name: hyperparameters.get(f"thinking_residual_{name}", value) for name, value in start.items()}
        attach_residual_gate(model, **bounds, seed=seed)


class _ASLR(AddedModules):
    """Router, path collaborator and path aggregator, of a run with `aslr_enabled`; their start does not draw."""

    switch, noun, article = "aslr_enabled", "ASLR modules", "ASLR"
    names = ASLR_MODULES
    needs = ("aslr_enabled", *ASLR_HYPERPARAMETERS)

    def add(self, model: Any) -> None:
        add_aslr(model)

    def belongs(self, hyperparameters: Hyperparameters) -> bool:
        return bool(hyperparameters.get("aslr_enabled"))

    def parameters(self, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        return ASLR_PARAMETERS

    def attach(self, model: Any, hyperparameters: Hyperparameters, seed: int = 0) -> None:
        attach_aslr(model, **{name: hyperparameters[name] for name in ASLR_HYPERPARAMETERS})

    def difference(self, model: Any, hyperparameters: Hyperparameters) -> Difference | None:
        present = {
            self.switch: self.on(model),
            **{name: getattr(model.config, name, None) for name in ASLR_HYPERPARAMETERS},
        }
        for name, value in present.items():
            if name in hyperparameters and hyperparameters[name] != value:
                return name, hyperparameters[name], value
        return None


class _Gating(AddedModules):
    """A learnable gating function, of the modes in which paths interact."""

    switch, noun, article = "m3po_gating_enabled", "learnable gating function", "a learnable gating function"
    names = (GATING_MODULE,)
    needs = ("gating_type", "gating_config")

    def add(self, model: Any) -> None:
        add_gating(model)

    def belongs(self, hyperparameters: Hyperparameters) -> bool:
        gating_type = hyperparameters.get("gating_type", DEFAULT_GATING_TYPE)
        known = gating_type in list_gating_functions()  # another version may know other ones
        return hyperparameters.get("mode") in CROSS_PATH_MODES and known and gating_class(gating_type).learnable

    def parameters(self, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        return gating_parameter_names(hyperparameters)

    def attach(self, model: Any, hyperparameters: Hyperparameters, seed: int = 0) -> None:
        attach_gating(model, hyperparameters["gating_type"], hyperparameters["gating_config"], seed)

    def difference(self, model: Any, hyperparameters: Hyperparameters) -> Difference | None:
        gating_type = hyperparameters.get("gating_type", DEFAULT_GATING_TYPE)
        if not self.on(model):
            return ("gating_type", gating_type, None) if self.belongs(hyperparameters) else None
        kind, options = model.config.m3po_gating_type, model.config.m3po_gating_config
        stored = {
            "gating_type": gating_type,
            **gating_class(gating_type).structure(hyperparameters.get("gating_config")),
        }
        for name, value in {"gating_type": kind, **gating_class(kind).structure(options)}.items():
            if stored.get(name) != value:
                return name, stored.get(name), value
        return None


class _HyperConnections(AddedModules):
    """Hyper-connections: most of them sit on the decoder layers, which make them, and no trainer attaches them."""

    switch, noun, article = "mhc_enabled", "hyper-connections", "hyper-connections"
    names = MHC_MODULES

    def add(self, model: Any) -> None:
        add_streams(model)

    def belongs(self, hyperparameters: Hyperparameters) -> bool:
        return False  # `m3po.json` does not speak of them

    def parameters(self, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        return ()

    def attach(self, model: Any, hyperparameters: Hyperparameters, seed: int = 0) -> None:
        raise NotImplementedError("hyper-connections are made with the model, not given to a plain one")


RESIDUAL_GATE, ASLR, GATING, HYPER_CONNECTIONS = _ResidualGate(), _ASLR(), _Gating(), _HyperConnections()
ADDED_MODULES: tuple[AddedModules, ...] = (RESIDUAL_GATE, ASLR, GATING)  # those that a trainer adds to a plain model


def add_modules(model: Any) -> None:
    """Hook of `LlamaModel.__init__` and `Qwen2Model.__init__`: makes the modules that the configuration has."""
    for modules in ADDED_MODULES:
        modules.add(model)


def refuse_nested(model: Any) -> None:
    """Refuses modules in the language model of a composite one, whose own configuration does not speak of them.

    Raises:
        ValueError: it names the switch.
    """
    text = model.config.get_text_config()
    for modules in (*ADDED_MODULES, HYPER_CONNECTIONS):
        if text is not model.config and getattr(text, modules.switch, False):
            raise ValueError(
                f"{modules.switch}=True in the text_config of a {model.config.model_type!r} model: decoding would not "
                "know of it. Take a Llama or Qwen2 model, or set it to False."
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
    for modules in (*ADDED_MODULES, HYPER_CONNECTIONS):
        missing, unexpected = modules.among(missing_keys), modules.among(unexpected_keys)
        if not (missing if modules.on(model) else unexpected):
            continue
        checkpoint, stored = load_config.pretrained_model_name_or_path, _stored_config(model, load_config)
        if modules.on(model) and stored.get(modules.switch):
            raise ValueError(
                f"{checkpoint} says {modules.switch}=True in its config.json but has no {missing[0]} of the right "
                f"shape: its {modules.noun} would be random. Save it again with its {modules.noun}, or load it with "
                f"{modules.switch}=False as a plain model."
            )
        if not modules.on(model) and not stored.get(modules.switch):
            raise ValueError(
                f"{checkpoint} has {unexpected[0]} but its config.json does not say {modules.switch}=True, so its "
                f"{modules.noun} would be lost: load it with {modules.switch}=True and the numbers it was trained with."
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
