"""Networks of torchvision, turned to one channel and nine classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from waferlab.data.maps import NUM_CLASSES
from waferlab.errors import WeightsUnavailableError
from waferlab.models import efficientnet_lite
from waferlab.models.classifier import WaferClassifier
from waferlab.models.small_convolutions import quicken_small_convolutions
from waferlab.models.starting_weights import fetch_weights, read_weights, sum_first_layer


class TorchvisionLightningModel(WaferClassifier):
    """A torchvision classifier with a one-channel first layer and a head of 512 units.

    Args:
        architecture: "resnet18", "resnet50", "efficientnet_b0", "efficientnet_lite0" or "vit_b_16".
        dropout: in the head, 0..1.
        freeze_backbone: train the head only.
        image_size: side of the images, needed by vision transformers.
        small_stem: of a ResNet, what is customary for images of 32 pixels: a first layer of 3x3 with stride 1, and no
            max pooling. It loses no die, at about sixteen times the work, and no published weights fit it.
        **training: see `WaferClassifier`.

    Raises:
        ValueError: an unknown architecture, or a small stem of one that is no ResNet.
    """

    ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0", "efficientnet_lite0", "vit_b_16")

    def __init__(
        self,
        *,
        architecture: str = "resnet18",
        dropout: float = 0.2,
        freeze_backbone: bool = False,
        image_size: int = 40,
        small_stem: bool = False,
        num_classes: int = NUM_CLASSES,
        **training,
    ) -> None:
        super().__init__(num_classes=num_classes, **training)
        if architecture not in self.ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r} is unknown. Allowed: {', '.join(self.ARCHITECTURES)}.")
        if small_stem and not architecture.startswith("resnet"):
            raise ValueError(f"small_stem=True: {architecture} has none. Leave it out, or choose a ResNet.")
        self.save_hyperparameters()
        import torchvision.models

        self.architecture, self.small_stem = architecture, small_stem
        options = {"image_size": image_size, "patch_size": 8} if architecture == "vit_b_16" else {}
        if architecture == "vit_b_16":  # patches of 8 dies: with 16, a 48-pixel map would be nine patches
            builder = torchvision.models.VisionTransformer
            options |= {"num_layers": 6, "num_heads": 6, "hidden_dim": 192, "mlp_dim": 768}
        elif architecture == "efficientnet_lite0":
            builder = efficientnet_lite.efficientnet_lite0
        else:
            builder = torchvision.models.get_model_builder(architecture)
        self.network = builder(**options)
        self._replace_first_layer()
        self._replace_head(dropout, num_classes)
        quicken_small_convolutions(self.network)
        if freeze_backbone:
            head = set(self.network.get_submodule(self._head_name()).parameters())
            for parameter in self.network.parameters():
                parameter.requires_grad = parameter in head

    def _first_layer_name(self) -> str:
        return next(n for n, m in self.network.named_modules() if isinstance(m, nn.Conv2d))

    def _head_name(self) -> str:
        return list(dict(self.network.named_children()))[-1]

    def _replace_first_layer(self) -> None:
        name = self._first_layer_name()
        old = self.network.get_submodule(name)
        kernel, stride, padding = (3, 1, 1) if self.small_stem else (old.kernel_size, old.stride, old.padding)
        new = nn.Conv2d(1, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
        if self.small_stem:
            self.network.maxpool = nn.Identity()
        self.network.set_submodule(name, new)

    def _replace_head(self, dropout: float, num_classes: int) -> None:
        old = self.network.get_submodule(self._head_name())
        features = next(m.in_features for m in old.modules() if isinstance(m, nn.Linear))
        head = nn.Sequential(
            nn.Linear(features, 512), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)
        )
        self.network.set_submodule(self._head_name(), head)

    def load_published(self, wait: float) -> str:
        """ImageNet weights into all but the head; the first layer's kernels summed over RGB."""
        import torchvision.models

        if self.architecture == "vit_b_16" or self.small_stem:
            small = "stem" if self.small_stem else "transformer"
            raise WeightsUnavailableError(f"none are published for this small {small}")
        if self.architecture == "efficientnet_lite0":
            state, name = efficientnet_lite.read_published()
            self.adopt(state)
            return name
        weights = torchvision.models.get_model_weights(self.architecture).DEFAULT
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        file = fetch_weights(weights.url, cache, wait=wait, hash_prefix=cache.stem.rpartition("-")[2])
        self.adopt(read_weights(file))
        return f"torchvision {weights}"

    def adopt(self, state: dict[str, torch.Tensor]) -> None:
        """Copies a torchvision state dict (three-channel first layer, 1000-class head) into the network."""
        head, first = self._head_name() + ".", self._first_layer_name() + ".weight"
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        state[first] = sum_first_layer(state[first])
        missing, unexpected = self.network.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith(head) for name in missing):
            raise WeightsUnavailableError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
