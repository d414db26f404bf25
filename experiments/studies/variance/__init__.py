"""The error of GLUE's gradient estimates on trained experts; `python -m experiments.studies.variance`."""
