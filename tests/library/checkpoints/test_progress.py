"""`ProgressLine`: what is left, by the speed since the first moment."""

import time

from glue_jax.checkpoints.progress import ProgressLine


def test_the_first_moment_says_nothing_and_the_next_says_what_is_left(monkeypatch, capsys):
    seconds = iter([0, 40, 80, 90])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    line = ProgressLine("learn")
    line.show(10, 100)
    assert capsys.readouterr().err == ""
    # 20 of 100 in 40 s: the 70 that are left take 140 s.
    line.show(30, 100)
    assert capsys.readouterr().err == "learn: 30%, about 2 min 20 s left\n"
    line.show(31, 100)
    assert capsys.readouterr().err == ""
