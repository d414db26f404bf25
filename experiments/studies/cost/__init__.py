"""The cost of an SPSA step against a full-gradient step; `python -m experiments.studies.cost`."""
