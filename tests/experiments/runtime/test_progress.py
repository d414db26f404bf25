import io

from rich.console import Console

from experiments.runtime import progress


def _lines(monkeypatch, seconds_between):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", seconds_between)
    output = io.StringIO()
    with progress.ProgressBars(Console(file=output, width=200)) as bars:
        stage = bars.stage("Experts", 6)
        stage.skip(2)
        for _ in range(3):
            stage.advance()
    return output.getvalue().splitlines()


def test_without_a_terminal_lines_say_how_far_a_stage_is(monkeypatch):
    lines = [line for line in _lines(monkeypatch, 0.0) if line]
    assert [line.split(",")[0] for line in lines] == ["Experts: 1 of 4", "Experts: 2 of 4", "Experts: 3 of 4"]
    assert lines[-1].endswith("left")


def test_they_come_no_more_often_than_once_a_minute(monkeypatch):
    assert progress._SECONDS_BETWEEN_LINES == 60
    assert not [line for line in _lines(monkeypatch, 3600.0) if line]
