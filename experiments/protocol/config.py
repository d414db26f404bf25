"""Every number of the protocol, as frozen dataclasses. If a value is not the paper's, its reason is beside it.

The parts follow the stages of the protocol. The result of a stage depends on its own part and on those before it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import numpy as np

from experiments.models.mobilenet import Strides
from experiments.models.vit import Pooling, Positions
from experiments.protocol.training import Augmentation
from glue_jax.directions import DirectionName, dimension

PAPER_CONFIGS: Mapping[int, str] = {1: "Data size", 2: "Proxy accuracy", 3: "Full gradient", 4: "GLUE (SPSA)"}
"""The paper's four ways to find the coefficients, by the paper's numbers."""

CONFIGS: Mapping[int, str] = {**PAPER_CONFIGS, 5: "Gauss-Newton (ours)"}
"""All ways to find the coefficients: the paper's four, and one of ours, `glue_jax.gauss_newton_step`."""

Initialization = Literal["common", "separate"]
# JAX makes keys of 32 bits. Two seeds that differ by a multiple of this would share a key.
_SEEDS = 2**32
# JAX's integers have 32 bits, and one of them is the sign.
_COUNTS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """Data, splits and experts: one draw, as in the paper's Table 1."""

    dataset: str = "cifar10"
    """The data set of the experts and of the target images: a name, or the path of a file .npz with the arrays x_train,
    y_train, x_test and y_test.
    """
    image_size: int | None = None
    """Height and width that images are resized to, in pixels. None keeps the images as they are. The paper names no
    size.
    """
    network: str = "resnet20"
    """The architecture of the experts (section 5)."""
    num_experts: int = 10
    """K, the number of experts (section 5)."""
    expert_examples: int = 2000
    """Training images of each expert (section 5)."""
    concentration: float = 0.5
    """Concentration of the Dirichlet distribution of an expert's class proportions (section 5)."""
    expert_epochs: int = 40
    """Training epochs of an expert (section 5)."""
    expert_batch_size: int = 64
    """Minibatch of an expert's training (section 5)."""
    expert_learning_rate: float = 1e-3
    """Adam's learning rate for the experts (section 5)."""
    expert_b1: float = 0.9
    """Adam's decay of the first moment for the experts (section 5)."""
    expert_b2: float = 0.999
    """Adam's decay of the second moment for the experts (section 5)."""
    augmentation: Augmentation = "crop_flip"
    """The paper names no augmentation. `crop_flip` is usual for small images. With it our CIFAR-10 experts reach 39.3 %
    on average (`experiments/results/cifar10`). The paper's experts reach 42.7 % (Table 1). Fine-tuning uses the same
    augmentation. SVHN uses `crop`, because a mirrored digit is no longer that digit.
    """
    initialization: Initialization = "common"
    """The paper does not say whether the experts share an initialisation. Averages of weights presume a common one
    (model soups, federated averaging).
    """
    validation_examples: int = 1000
    """Target images that are used only for the proxy accuracy and the plateau. The paper says only that they are few
    ('small').
    """
    expert_seed: int = 0
    """Seed of the validation images, and of the experts' images, initialisation and training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFields:
    """What the paper leaves open about its networks. Each field begins with the name of its network."""

    mobilenetv2_strides: Strides = "small_images"
    """`paper`: the strides of MobileNetV2's paper, which make an image 32 times smaller. `small_images`: stride 1 in
    the stem and in the first strided stage, as usual for 32 x 32 pixels. With the paper's strides the last stages would
    see a single pixel.
    """
    vit_patch_size: int = 8
    """Height and width of a patch, in pixels (section 5)."""
    vit_depth: int = 8
    """Layers (section 5)."""
    vit_width: int = 192
    """The paper names no width. This is the width of ViT-Tiny, the smallest in common use. At this depth the network
    has 3.6 million parameters.
    """
    vit_heads: int = 3
    """The paper names no number of heads. This is the number of ViT-Tiny, with 64 features for each head."""
    vit_mlp_width: int = 768
    """The paper names no width of the MLP. This is four times the width, as in every ViT of the ViT's own paper."""
    vit_pooling: Pooling = "mean"
    """The paper names no pooling. A mean over patches trains better than a class token (Beyer et al., 2022, on
    ImageNet-1k).
    """
    vit_positions: Positions = "learned"
    """The paper names no kind of positions. These are those of the ViT's own paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoefficientFields:
    """Target images, and how the coefficients are learned on them."""

    target_examples: int = 10_000
    """Images on which the coefficients are learned and the blend is fine-tuned (section 5). If fewer are left, all of
    them are used.
    """
    alpha_learning_rate: float = 1e-2
    """Adam's learning rate for beta (section 5)."""
    alpha_b1: float = 0.9
    """Adam's decay of the first moment for beta (section 5)."""
    alpha_b2: float = 0.99
    """Adam's decay of the second moment for beta (section 5)."""
    alpha_batch_size: int = 64
    """Minibatch for learning the coefficients. The paper does not name it. This is the experts' minibatch."""
    num_directions: int = 1
    """m, the number of directions of a step (section 5)."""
    directions: DirectionName = "sphere"
    """Distribution of the directions. The paper's examples are normalised Gaussian entries and random signs (section
    3.2).
    """
    radius: float = 1e-2
    """The length of a probe's step in beta (the paper's mu). The paper does not name it. With a shorter step, rounding
    to float32 hides the difference of the losses. Over a longer step, the loss curves. `experiments.studies.variance`
    measures both.
    """
    alpha_steps: int = 2000
    """The largest number of steps. The paper does not name it. On CIFAR-10 all runs but one take this number of
    steps.
    """
    validate_every: int = 50
    """Steps between two validations of Configs 3 and 4. The paper does not name this number. Our Config 5 validates
    every 5 steps.
    """
    patience: int = 10
    """After this many validations without a new best value, learning has reached its plateau. The paper does not name
    this number.
    """
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """Precision of the networks' products while the coefficients are learned. By default an accelerator rounds the
    weights of both probes to bfloat16 or TF32. That hides their small difference.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningFields:
    """Fine-tuning of the blend on the target images."""

    fine_tuning_epochs: int = 10
    """Epochs of fine-tuning. The paper says only that it is 'lightweight'."""
    fine_tuning_learning_rate: float = 1e-3
    """Adam's learning rate for fine-tuning. The paper does not name it. This is the experts' learning rate. The decays
    are the experts' too.
    """
    fine_tuning_batch_size: int = 64
    """Minibatch of fine-tuning. The paper does not name it. This is the experts' minibatch."""
    test_examples: int | None = None
    """Number of test images for the report. None is all of them (section 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FineTuningFields, CoefficientFields, NetworkFields, ExpertFields):
    """One experiment of the paper's section 5."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of target images, minibatches, directions and fine-tuning. Results are means over them (section 5)."""

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name} is {value!r}; expected one of {get_args(field.type)}")
            if field.name.endswith(("_b1", "_b2")):
                valid, expected = 0 <= value < 1, "a number of at least 0 and below 1"
            elif field.type is float:
                valid, expected = 0 < value < math.inf, "a finite number above 0"
            elif field.name.endswith("seed"):
                valid, expected = 0 <= value < _SEEDS, f"at least 0 and below {_SEEDS}, of 32 bits"
            else:
                valid = not isinstance(value, int) or 1 <= value < _COUNTS
                expected = f"at least 1 and below {_COUNTS}"
            if not valid:
                raise ValueError(f"{field.name} is {value!r}; expected {expected}")
        for name, value in part(self, NetworkFields).items():
            if not name.startswith(f"{self.network}_") and value != getattr(NetworkFields(), name):
                raise ValueError(f"{name} is {value!r}, but the network is {self.network}, which has no such option")
        are_seeds = all(0 <= seed < _SEEDS for seed in self.seeds)
        if not self.seeds or not are_seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(
                f"seeds are {self.seeds}; expected at least one, each at least 0 and below {_SEEDS} and given once"
            )
        dimension(np.zeros(self.num_experts), self.directions)

    @property
    def network_options(self) -> dict[str, Any]:
        """The fields of this config's network, without the network's name."""
        prefix = f"{self.network}_"
        fields = part(self, NetworkFields)
        return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}


def part(config: Config, *parts: type) -> dict[str, Any]:
    """Returns the fields of some parts of a config."""
    return {field.name: getattr(config, field.name) for cls in parts for field in dataclasses.fields(cls)}


QUICK: Mapping[str, Any] = {
    "num_experts": 3,
    "expert_examples": 512,
    "expert_epochs": 6,
    "expert_batch_size": 32,
    "validation_examples": 256,
    "target_examples": 512,
    "alpha_batch_size": 32,
    "alpha_steps": 60,
    "validate_every": 10,
    "patience": 3,
    "fine_tuning_epochs": 3,
    "fine_tuning_batch_size": 32,
    "test_examples": 1000,
    "seeds": (0, 1),
}
"""The protocol in minutes, for a network that is slow on a CPU. It shows that every stage runs. It does not show what
the method gives.
"""
