"""The architectures by name; adding one is a call of `register_model`."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from waferlab.errors import ConfigError

if TYPE_CHECKING:
    from waferlab.models.classifier import WaferClassifier

# What people call parameters elsewhere, and we call:
ALSO_KNOWN_AS = {"dropout_rate": "dropout", "lr": "learning_rate", "batch": "batch_size"}

# Times the default learning rate, which is what is most often wrong of a network that nobody has tuned. A search looks
# no further than 8 times away.
OTHER_RATES = (3, 1 / 3, 8, 1 / 8)


def our_names(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters of a model and its training, under the names that they have here."""
    return {ALSO_KNOWN_AS.get(name, name): value for name, value in (parameters or {}).items()}


def nothing_of_its_own(trial: Any, *, pretrained: bool) -> dict[str, Any]:
    """The search space of an architecture that has only the parameters which all have."""
    return {}


@dataclass(frozen=True)
class ModelSpec:
    """One line of the registry.

    Attributes:
        model: the class of the model.
        fixed: its parameters that make this architecture of it.
        suggest: asks an Optuna trial for the parameters that only this architecture has and returns them by name; told
            whether the training starts from `pretrained` weights. A default value must lie in what it asks for.
        defaults: what to build without a search, where it differs from the defaults of the class.
        portfolio: settings that a search tries after the defaults: they did best, or nearly, on other maps. Each has
            all that is searched, but for what is not asked for and so not named. Its learning rate belongs to a start
            with the default one. None for an architecture that has not been tuned: see `OTHER_RATES`.
        in_all: whether model_type="all" means it too; the others are chosen by name.
        patch: pixels of the patches that it cuts images into, whose side has to be a multiple.
    """

    model: type[WaferClassifier]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    suggest: Callable[..., dict[str, Any]] = nothing_of_its_own
    defaults: Mapping[str, Any] = field(default_factory=dict)
    portfolio: Sequence[Mapping[str, Any]] | None = None
    in_all: bool = False
    patch: int = 1

    def check_size(self, name: str, image_size: int) -> None:
        """Raises ConfigError if it cannot take images of this side."""
        if rest := image_size % self.patch:
            low = image_size - rest
            raise ConfigError(
                f"image_size={image_size}: {name} cuts images into patches of {self.patch} pixels. Choose {low} or "
                f"{low + self.patch}."
            )

    def parameters(self) -> dict[str, Any]:
        """The parameters that may be chosen, with their defaults: those of the class and its parents."""
        found: dict[str, Any] = {}
        for parent in reversed(self.model.__mro__):
            signature = inspect.signature(parent.__init__) if "__init__" in vars(parent) else None
            chosen = {} if signature is None else signature.parameters
            found |= {p.name: p.default for p in chosen.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        ours = ("self", "class_weights", "num_classes", *self.fixed)
        return {name: value for name, value in found.items() if name not in ours} | dict(self.defaults)

    def portfolio_around(self, usual: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a search tries after the parameters that are taken without one, rates in proportion to theirs."""
        rate = usual["learning_rate"]
        if self.portfolio is None:
            return [{**usual, "learning_rate": rate * times} for times in OTHER_RATES]
        share = rate / self.parameters()["learning_rate"]
        return [{**setting, "learning_rate": setting["learning_rate"] * share} for setting in self.portfolio]

    def choose(self, name: str, chosen: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
        """The model's parameters: its defaults, `ours` where it has them, and what is chosen.

        Raises:
            ConfigError: something is chosen that it does not have.
        """
        known = self.parameters()
        if unknown := sorted(set(chosen) - set(known) - set(ours)):
            raise ConfigError(f"{name} has no parameter {unknown[0]!r}. Allowed: {', '.join(sorted({*known, *ours}))}.")
        own = dict(self.defaults) | ours | dict(chosen)
        return {name: value for name, value in own.items() if name in known}


MODEL_REGISTRY: dict[str, ModelSpec] = {}


def register_model(name: str, spec: ModelSpec) -> None:
    """Adds an architecture; it can then be named in `ExperimentConfig.model_type`.

    Raises:
        ConfigError: the name is taken.
    """
    if name in MODEL_REGISTRY or name == "all":
        raise ConfigError(f"model name {name!r} is taken. Choose another.")
    MODEL_REGISTRY[name] = spec


def find_model(name: str) -> ModelSpec:
    """The registered architecture of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MODEL_REGISTRY:
        raise ConfigError(
            f"model_type={reprlib.repr(name)} is unknown. Allowed: {', '.join(['all', *MODEL_REGISTRY])}."
        )
    return MODEL_REGISTRY[name]
