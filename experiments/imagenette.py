"""Imagenette with an 8-layer ViT, patch size 8: the paper's section 5.

    python -m experiments.imagenette                     # the paper's scale, on a GPU or TPU
    python -m experiments.imagenette --preset quick      # the same protocol, small, on a CPU

Imagenette comes through tensorflow-datasets (`imagenette/160px-v2`, the validation split for the test), from
`--data-dir` or `TFDS_DATA_DIR`; where it is not prepared, it is downloaded and prepared, which needs
`pip install -e '.[experiments,prepare]'` once. It has 9469 training images in all: what the validation images leave
of them is the target set.
"""

from experiments.cli import main
from experiments.config import Config

PRESETS = {
    # 64 pixels: the paper names no size. With patches of 8 these are 64 patches, as many as ViTs for small images have.
    "paper": Config(dataset="imagenette/160px-v2", image_size=64, network="vit"),
    "quick": Config(
        dataset="imagenette/160px-v2",
        image_size=64,
        network="vit",
        num_experts=3,
        expert_examples=500,
        expert_epochs=6,
        expert_batch_size=50,
        validation_examples=200,
        target_examples=500,
        alpha_batch_size=50,
        alpha_steps=60,
        validate_every=10,
        patience=3,
        fine_tuning_epochs=3,
        fine_tuning_batch_size=50,
        test_examples=1000,
        seeds=(0, 1),
    ),
}

if __name__ == "__main__":
    main("imagenette", __doc__ or "", PRESETS)
