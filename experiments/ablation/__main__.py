"""What each remedy gives a blend, alone and with others, before fine-tuning and after.

    python -m experiments.ablation                                          # digits, minutes on a CPU
    python -m experiments.ablation --experiment cifar10 --preset paper --run-dir runs/cifar10

Experts are those of the experiment's run; where there are none, they are trained first, and kept there.
"""
