"""Imagenette with an 8-layer ViT, patch size 8: the paper's section 5.

    python -m experiments.imagenette                     # the paper's scale, on a GPU or TPU
    python -m experiments.imagenette --preset quick      # the same protocol, small, on a CPU

The paper's scale has not been run. The quick preset takes under 20 minutes of one CPU core, and shows that every stage
runs. Its experts have a test accuracy of 24 to 25 %, and its blends of 19 to 26 %. After fine-tuning, blends have 25 to
26 %. A run of an hour on one core has experts of 24 to 28 %, and blends of 22 to 30 %. After fine-tuning, its blends
have 31 to 35 %. The report in `experiments/results/imagenette` has the options of that run.

Imagenette comes from tensorflow-datasets (`imagenette/160px-v2`), in the folder `--data-dir` or `TFDS_DATA_DIR`. Models
are tested on its validation split. If the data set is not there, it is downloaded and prepared. That needs
`pip install -e '.[experiments,prepare]'` once. It has 9469 training images in all. The target set is all of these but
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
