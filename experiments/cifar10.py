"""CIFAR-10 with ResNet-20: the paper's section 5.

    python -m experiments.cifar10                     # the paper's scale, on a GPU or TPU
    python -m experiments.cifar10 --preset quick      # the same protocol, small, on a CPU

The paper's scale took 6.8 hours of one CPU core. It has not been run on an accelerator. These are its test accuracies,
over three seeds: the experts have 33 to 44 %, their uniform average has 17 %, and blends with learned coefficients have
32 to 38 %. After fine-tuning, blends have 65 to 68 %. The quick preset takes 10 minutes on 2 CPU cores. Its experts
have 25 to 34 %, and its blends 24 to 29 %. After fine-tuning, blends have 35 to 39 %.

CIFAR-10 comes from tensorflow-datasets, in the folder `--data-dir` or `TFDS_DATA_DIR`. If it is not there, it is
downloaded and prepared. That needs `pip install -e '.[experiments,prepare]'` once.
"""

from experiments.cli import main
from experiments.protocol.config import Config
from experiments.runtime.session import process

PRESETS = {
    "paper": Config(),
    "quick": Config(
        num_experts=5,
        expert_examples=1000,
        expert_epochs=10,
        validation_examples=256,
        target_examples=1024,
        alpha_steps=300,
        validate_every=25,
        patience=3,
        fine_tuning_epochs=3,
        test_examples=2000,
        seeds=(0, 1),
    ),
}

if __name__ == "__main__":
    with process():
        main("cifar10", __doc__ or "", PRESETS)
