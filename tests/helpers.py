"""What tests of both packages share."""

import contextlib
import logging
import pathlib

import jax

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def compilations(caplog):
    """The names of the programs that XLA compiles."""
    names: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        yield names
    prefix = "Finished XLA compilation of "
    names += [line.removeprefix(prefix).split(" in ")[0] for line in caplog.messages if line.startswith(prefix)]
