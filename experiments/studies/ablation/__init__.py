"""What each remedy gives, alone and with others; `python -m experiments.studies.ablation`."""
