"""The networks of the experiments, in Flax NNX, each as a pair of pure functions."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from experiments.models.convnet import ConvNet
from experiments.models.mobilenet import MobileNetV2
from experiments.models.network import Network, as_functions
from experiments.models.resnet import ResNet20
from experiments.models.vit import ViT

MODULES: dict[str, Callable[..., nnx.Module]] = {
    "convnet": ConvNet,
    "mobilenetv2": MobileNetV2,
    "resnet20": ResNet20,
    "vit": ViT,
}


def build(name: str, *, image_shape: tuple[int, ...], num_classes: int, **options: Any) -> Network:
    """Returns a network by its name in a `Config`.

    Args:
        name: a key of `MODULES`.
        image_shape: height, width and channels of the images.
        num_classes: the number of classes.
        **options: options of the network's module.

    Raises:
        ValueError: if the name is unknown, or if the network cannot take images of this shape.
    """
    if name not in MODULES:
        raise ValueError(f"network is {name!r}; expected one of {sorted(MODULES)}")
    module = MODULES[name]
    return as_functions(lambda rngs: module(image_shape=image_shape, num_classes=num_classes, rngs=rngs, **options))
