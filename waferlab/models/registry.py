"""The architectures by name; adding one is a call of `register_model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from waferlab.errors import ConfigError
from waferlab.models.classifier import WaferClassifier


@dataclass(frozen=True)
class ModelSpec:
    """One line of the registry.

    Attributes:
        build: called with the model's own parameters and those of `WaferClassifier`; returns the model.
        search_space: parameters that only this architecture has, each with the values that a search may choose.
        defaults: what to build without a search.
        loads_pretrained: whether `build` takes `pretrained` and `pretrained_wait`.
        bf16_pays: whether precision="auto" may take bfloat16; on CPU it slows depthwise convolutions down.
        in_all: whether model_type="all" means it too; the others are chosen by name.
        takes_image_size: whether `build` takes `image_size`, as networks for one size of images do.
    """

    build: Callable[..., WaferClassifier]
    search_space: dict[str, tuple] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    loads_pretrained: bool = False
    bf16_pays: bool = True
    takes_image_size: bool = False
    in_all: bool = False


MODEL_REGISTRY: dict[str, ModelSpec] = {}

# What every search chooses beside an architecture's own parameters.
SHARED_SEARCH_SPACE = ("learning_rate", "batch_size", "dropout", "weight_decay")
# To freeze random weights would leave the head to learn from noise, and short trials do not always show it.
NEEDS_PRETRAINED = ("freeze_backbone",)


def own_search_space(model_type: str, *, pretrained: bool) -> dict[str, tuple]:
    """The parameters that only this architecture has, as far as they make sense for the weights it starts from."""
    space = MODEL_REGISTRY[model_type].search_space
    return {name: values for name, values in space.items() if pretrained or name not in NEEDS_PRETRAINED}


def register_model(name: str, spec: ModelSpec) -> None:
    """Adds an architecture; it can then be named in `ExperimentConfig.model_type`.

    Raises:
        ConfigError: the name is taken.
    """
    if name in MODEL_REGISTRY or name == "all":
        raise ConfigError(f"model name {name!r} is taken. Choose another.")
    MODEL_REGISTRY[name] = spec
