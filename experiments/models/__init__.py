"""The networks of the experiments, in Flax NNX, each as a pair of pure functions."""

from collections.abc import Callable

from flax import nnx

from experiments.models.convnet import ConvNet
from experiments.models.network import Network, as_functions
from experiments.models.resnet import ResNet20

MODULES: dict[str, Callable[..., nnx.Module]] = {"convnet": ConvNet, "resnet20": ResNet20}


def build(name: str, *, num_channels: int, num_classes: int) -> Network:
    """Returns a network by its name in a `Config`.

    Args:
        name: a key of `MODULES`.
        num_channels: of the images.
        num_classes: of the labels.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODULES:
        raise ValueError(f"network is {name!r}; expected one of {sorted(MODULES)}")
    module = MODULES[name]
    return as_functions(lambda rngs: module(num_channels=num_channels, num_classes=num_classes, rngs=rngs))
