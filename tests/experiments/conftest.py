"""Data that the tests of the experiments share."""

import pytest

from experiments.protocol import data


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")
