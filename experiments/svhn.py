"""SVHN with MobileNetV2: the paper's section 5.

    python -m experiments.svhn                                      # the paper's scale, on a GPU or TPU
    python -m experiments.svhn --preset quick                       # the same protocol, small, on a CPU
    python -m experiments.svhn --preset quick --dataset cifar10     # its network on CIFAR-10

The paper's scale has not been run, and SVHN has not been run at all. On CIFAR-10 the quick preset shows that every
stage runs. Its experts have a test accuracy of 18 to 22 %, and its blends of 18 to 19 %. After fine-tuning, blends have
24 to 26 %. A longer run has experts of 20 to 25 %, and blends of 16 to 19 %. After fine-tuning, its blends have 29 to
30 %. The report in `experiments/results/mobilenetv2` has the options of that run. In version 0.1, the quick preset took
under half an hour of one CPU core, and the longer run took 33 minutes. A training step now takes 0.6 times as long.

SVHN comes from tensorflow-datasets (`svhn_cropped`), in the folder `--data-dir` or `TFDS_DATA_DIR`. If it is not there,
it is downloaded and prepared. That needs `pip install -e '.[experiments,prepare]'` once.
"""

import dataclasses

from experiments.cli import main
from experiments.protocol.config import QUICK, Config
from experiments.runtime.session import process

PAPER = Config(dataset="svhn_cropped", network="mobilenetv2", augmentation="crop")
PRESETS = {
    "paper": PAPER,
    "quick": dataclasses.replace(PAPER, **QUICK),
    "cifar10": Config(network="mobilenetv2", mobilenetv2_strides="paper"),
}

if __name__ == "__main__":
    with process():
        main("svhn", __doc__ or "", PRESETS)
