"""scikit-learn's handwritten digits with a small convolutional network: the protocol with nothing to download.

    python -m experiments.digits

40 seconds on 2 CPU cores, compilation included. Test accuracy to expect (three seeds): experts 40 to 56 %,
their uniform average 65 %, learned coefficients 73 to 75 %, after fine-tuning 89 to 90 %.
"""

from experiments.cli import main
from experiments.protocol.config import Config
from experiments.runtime.session import process

PRESETS = {
    "quick": Config(
        dataset="digits",
        network="convnet",
        expert_examples=100,
        expert_batch_size=20,
        augmentation="none",
        validation_examples=200,
        target_examples=400,
        validate_every=10,
    ),
}

if __name__ == "__main__":
    with process():
        main("digits", __doc__ or "", PRESETS)
