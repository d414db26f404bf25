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
                # The repeated Ctrl-C is raised only between two sleeps.
                time.sleep(0.05)
            pytest.fail("nothing came")

    with pytest.raises(KeyboardInterrupt):
        work()
