import time

import pytest

from glue_jax.interrupts import interruptible


class RaisesWhenCollected:
    def __del__(self):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("interruptions")
def test_an_interruption_that_python_ignores_comes_again():
    def work():
        with interruptible():
            RaisesWhenCollected()
            for _ in range(200):
                # What comes again does not end a sleep.
                time.sleep(0.05)
            pytest.fail("nothing came")

    with pytest.raises(KeyboardInterrupt):
        work()
