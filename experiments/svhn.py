"""SVHN with MobileNetV2: the paper's section 5.

    python -m experiments.svhn                       # the paper's scale, on a GPU or TPU
    python -m experiments.svhn --preset quick        # the same protocol, small, on a CPU
    python -m experiments.svhn --preset cifar10      # MobileNetV2 on CIFAR-10, the paper's scale

SVHN has not been run, since it was not at hand. The preset `cifar10` takes 2.0 hours of one CPU core. Its experts have
a test accuracy of 23 to 31 %. Their uniform average has 10 %, and blends with learned coefficients have 27 to 28 %.
After fine-tuning, blends have 46 to 48 %. The report is in `experiments/results/mobilenetv2`. This preset has the
strides of MobileNetV2's paper. With `--mobilenetv2-strides small_images`, the same run would take 26 hours by its own
estimate.

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
