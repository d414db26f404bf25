"""Every number of the protocol, as frozen dataclasses: the paper's values, and what it leaves open with the reason.

The parts follow the protocol's stages, so that the result of a stage depends on its own part and those before it.
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
"""The paper's four ways to coefficients, by its numbers."""

CONFIGS: Mapping[int, str] = {**PAPER_CONFIGS, 5: "Gauss-Newton (ours)"}
"""All ways to coefficients: the paper's, and one of ours, `glue_jax.gauss_newton_step`."""

Initialization = Literal["common", "separate"]
# JAX makes keys of 32 bits: larger seeds would share their keys with smaller ones.
_SEEDS = 2**32
# Its integers have 32 bits, one of them the sign.
_COUNTS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """Data, splits and experts: one draw, as in the paper's Table 1."""

    dataset: str = "cifar10"
    """What experts are trained on, and the target is drawn from."""
    image_size: int | None = None
    """Height and width that images are brought to, in pixels; None leaves them as they are. Section 5 names none. For
    Imagenette it is 64: with patches of 8 these are 64 patches, as many as ViTs for small images have."""
    network: str = "resnet20"
    """The architecture of the experts (section 5)."""
    num_experts: int = 10
    """K (section 5)."""
    expert_examples: int = 2000
    """Images of each expert (section 5)."""
    concentration: float = 0.5
    """Of the Dirichlet distribution of an expert's class proportions (section 5)."""
    expert_epochs: int = 40
    """Section 5."""
    expert_batch_size: int = 64
    """Section 5."""
    expert_learning_rate: float = 1e-3
    """Of Adam (section 5)."""
    expert_b1: float = 0.9
    """Of Adam (section 5)."""
    expert_b2: float = 0.999
    """Of Adam (section 5)."""
    augmentation: Augmentation = "crop_flip"
    """Open in the paper; the usual one for small images. With it our CIFAR-10 experts reach 39.3 % on average, the
    paper's 42.7 (Table 1; `experiments/results/cifar10`). Fine-tuning uses it too.
    Digits of house numbers are not to be mirrored: there it is `crop`."""
    initialization: Initialization = "common"
    """Open in the paper; a common one is what averaging weights presumes (model soups, federated averaging)."""
    validation_examples: int = 1000
    """Open in the paper ('small'): target images that judge proxy accuracy and the plateau, and nothing else."""
    expert_seed: int = 0
    """Of validation images, experts' images, initialisation and training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFields:
    """What the paper leaves open about its networks; each field begins with the name of the network that it is for."""

    mobilenetv2_strides: Strides = "small_images"
    """Of its paper (224 pixels, 32 times smaller at the end), or with stride 1 in the stem and in the first strided
    stage, as is usual for 32 x 32 pixels: the last stages would see a single pixel otherwise."""
    vit_patch_size: int = 8
    """Section 5."""
    vit_depth: int = 8
    """Section 5."""
    vit_width: int = 192
    """Open in the paper; of ViT-Tiny, the smallest in common use: 3.6 million parameters at this depth."""
    vit_heads: int = 3
    """Open in the paper; of ViT-Tiny, 64 features each."""
    vit_mlp_width: int = 768
    """Open in the paper; four times the width, as in every ViT of its paper."""
    vit_pooling: Pooling = "mean"
    """Open in the paper; a mean over patches trains better than a class token (Beyer et al., 2022, on ImageNet-1k)."""
    vit_positions: Positions = "learned"
    """Open in the paper; as in the ViT's own paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoefficientFields:
    """Target images, and how the coefficients are learned on them."""

    target_examples: int = 10_000
    """Images that learn the coefficients and fine-tune; at most what is left (section 5)."""
    alpha_learning_rate: float = 1e-2
    """Of Adam on beta (section 5)."""
    alpha_b1: float = 0.9
    """Of Adam on beta (section 5)."""
    alpha_b2: float = 0.99
    """Of Adam on beta (section 5)."""
    alpha_batch_size: int = 64
    """Open in the paper; the experts'."""
    num_directions: int = 1
    """m, directions of a step (section 5)."""
    directions: DirectionName = "sphere"
    """The paper normalises Gaussian or random-sign entries, 'e.g.' (section 3.2)."""
    radius: float = 1e-2
    """Open in the paper (mu): the length of a probe's step in beta, between what float32 rounds away and what the loss
    curves over (measured by `experiments.studies.variance`)."""
    alpha_steps: int = 2000
    """Open in the paper: the most steps. On CIFAR-10 all runs but one end at it."""
    validate_every: int = 50
    """Open in the paper: steps between two validations, of Configs 3 and 4; Config 5, ours, validates every 5."""
    patience: int = 10
    """Open in the paper: validations without a new best that count as the plateau."""
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """Of the networks' own products while the coefficients are learned: an accelerator's default rounds the two
    probes' weights to bfloat16 or TF32, and their small difference with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningFields:
    """Fine-tuning of the blend on the target images."""

    fine_tuning_epochs: int = 10
    """Open in the paper ('lightweight')."""
    fine_tuning_learning_rate: float = 1e-3
    """Open in the paper; the experts'. Of Adam, with the experts' moments."""
    fine_tuning_batch_size: int = 64
    """Open in the paper; the experts'."""
    test_examples: int | None = None
    """Images of the test split that models are reported on; None is all of it (section 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FineTuningFields, CoefficientFields, NetworkFields, ExpertFields):
    """One experiment of the paper's section 5."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of target images, minibatches, directions and fine-tuning; results are means over them (section 5)."""

    def __post_init__(self) -> None:
        """Refuses values out of their range.

        Raises:
            ValueError: with the field, its value, and what was expected.
        """
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
        """The fields of this config's network, without its name before them."""
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
"""The protocol for a network that takes long on a CPU, in minutes: whether all runs, not what the method gives."""
