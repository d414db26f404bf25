"""SVHN with MobileNetV2: the paper's section 5.

    python -m experiments.svhn                                      # the paper's scale, on a GPU or TPU
    python -m experiments.svhn --preset quick                       # the same protocol, small, on a CPU
    python -m experiments.svhn --preset quick --dataset cifar10     # its network on CIFAR-10

The paper's scale has not been run, nor has SVHN. On CIFAR-10 the quick preset shows that all runs: experts 18 to 22 %
(test accuracy), blends 18 to 19 %, after fine-tuning 24 to 26 %. A longer run gives experts of 20 to 25 %, blends of 16
to 19 %, and 29 to 30 % after fine-tuning (`experiments/results/mobilenetv2`, whose report has the options). By version
0.1, the first took under half an hour of one CPU core, and the second 33 minutes. A training step takes 0.6 of the time
since then.

SVHN comes through tensorflow-datasets (`svhn_cropped`), from `--data-dir` or `TFDS_DATA_DIR`. If it is not
prepared, it is downloaded and prepared. That needs `pip install -e '.[experiments,prepare]'` once.
"""

from experiments.cli import main
from experiments.protocol.config import QUICK, Config
from experiments.runtime.session import process

PRESETS = {
    "paper": Config(dataset="svhn_cropped", network="mobilenetv2", augmentation="crop"),
    "quick": Config(
        dataset="svhn_cropped",
        network="mobilenetv2",
        augmentation="crop",
        **QUICK,
    ),
}

if __name__ == "__main__":
    with process():
        main("svhn", __doc__ or "", PRESETS)
