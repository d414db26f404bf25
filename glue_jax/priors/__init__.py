"""`build_prior`: one model from K experts in one call, and a report that says why it is this one."""

from glue_jax.priors.build import Prior, build_prior
from glue_jax.priors.report import Candidate, Relation

__all__ = ["Candidate", "Prior", "Relation", "build_prior"]
