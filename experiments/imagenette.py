"""Imagenette with an 8-layer ViT, patch size 8: the paper's section 5.

    python -m experiments.imagenette                     # the paper's scale, on a GPU or TPU
    python -m experiments.imagenette --preset quick      # the same protocol, small, on a CPU

The paper's scale has not been run. The quick preset takes under 20 minutes of one CPU core and shows that all runs:
experts 24 to 25 % (test accuracy), blends 19 to 26 %, after fine-tuning 25 to 26 %. An hour of one core gives experts
of 24 to 28 %, blends of 22 to 30 %, and 31 to 35 % after fine-tuning (`experiments/results/imagenette`, whose report
has the options).

Imagenette comes through tensorflow-datasets (`imagenette/160px-v2`, the validation split for the test), from
`--data-dir` or `TFDS_DATA_DIR`. If it is not prepared, it is downloaded and prepared. That needs
`pip install -e '.[experiments,prepare]'` once. It has 9469 training images in all. The target set is all of them but
the validation images.
"""

from experiments.cli import main
from experiments.protocol.config import QUICK, Config
from experiments.runtime.session import process

PRESETS = {
    "paper": Config(dataset="imagenette/160px-v2", image_size=64, network="vit"),
    "quick": Config(
        dataset="imagenette/160px-v2",
        image_size=64,
        network="vit",
        **QUICK,
    ),
}

if __name__ == "__main__":
    with process():
        main("imagenette", __doc__ or "", PRESETS)
