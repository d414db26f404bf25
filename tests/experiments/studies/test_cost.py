import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments.reporting.presentation import claim_table
from experiments.runtime.progress import ProgressBars
from experiments.studies.cost import __main__ as cost
from experiments.studies.cost import step_costs as measurement
from experiments.studies.cost.cost_claims import claims, growth_table
from experiments.studies.cost.programs import Setting
from experiments.studies.cost.step_costs import Program, Samples
from tests.experiments.helpers import check_report

TINY = ["--networks", "convnet", "--batch-sizes", "4", "--num-experts", "3", "--num-directions", "1"]
REPETITIONS = 3
BASE = Setting(network="convnet", batch_size=4, num_experts=3)
TPU_ROW = {
    **dataclasses.asdict(Setting(batch_size=512)),
    "platform": "tpu v5e (compiled)",
    "temporary_bytes": {"full_step": 400e6, "spsa_step": 100e6},
    "flops": {"full_step": 3e9, "spsa_step_vmapped": 2e9},
    "compile_seconds": {"full_step": 41.0, "spsa_step": 27.0},
}
TPU = {
    "command": "python -m experiments.studies.cost.tpu",
    "topology": "v5e:2x2",
    "compiler": "libtpu 1.2.3",
    "matmul_precision": "highest",
    "rows": [TPU_ROW],
}
SECONDS = {
    "forward": [2.0],
    "value_and_grad": [6.0],
    "blend": [0.5],
    "inner_products": [0.25],
    "probe": [3.0],
    "estimate": [6.5],
    "full_step": [9.0],
    "spsa_step": [7.0],
}
FAULTS = {"forward": [100], "blend": [20], "spsa_step": [150]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    (folder / "tpu.json").write_text(json.dumps(TPU))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return run(folder)


def run(folder, *arguments):
    return cost.main([*TINY, "--repetitions", str(REPETITIONS), "--out-dir", str(folder), *arguments])


def samples(**seconds):
    return {name: Samples(values, FAULTS.get(name, [0])) for name, values in {**SECONDS, **seconds}.items()}


def test_a_run_writes_its_report(results, folder):
    report = check_report(folder, results, "cost.png", "tpu.json")
    assert "python -m experiments.studies.cost --networks convnet" in report
    assert results["machine"] in report
    (measured,) = results["rows"]
    times = measured["times"]
    assert all(len(values) == REPETITIONS and min(values) > 0 for values in times["samples"].values())
    # Eq. (9).
    parts = [np.median(times["samples"][name]) for name in ("forward", "blend")]
    assert times["predicted"]["spsa_step"] == pytest.approx(2 * sum(parts))
    assert f"| γ | {times['backward_ratio']:.3g} | {'yes' if times['backward_ratio'] >= 2 else 'no'} |" in report


def test_the_compiled_steps_are_sized(results):
    (measured,) = results["rows"]
    # The convolutions of one image forwards, 8 x 8 at stride 1 and 4 x 4 at stride 2, less what the borders save.
    forward = 4 * 2 * 9 * (64 * 1 * 32 + 16 * 32 * 64)
    assert 0.75 < measured["flops"]["spsa_step_vmapped"] / (2 * forward) < 1.2
    assert 2 * forward < measured["flops"]["full_step"] < 4 * forward
    # The least that a backward pass keeps: the activations of the first layer in float32.
    assert measured["temporary_bytes"]["full_step"] > 4 * 64 * 32 * 4
    assert measured["temporary_bytes"]["spsa_step"] < measured["temporary_bytes"]["full_step"]
    assert measured["parameters"] == 19_562
    assert measured["total_bytes"] > measured["temporary_bytes"]["full_step"]


def test_what_was_compiled_for_a_tpu_is_shown(results, folder):
    report = (folder / "report.md").read_text()
    assert "| resnet20 | 512 | 10 | 1 | 400 | 100 | 0.250 | 3 | 2 | 0.667 | 41 | 27 |" in report
    assert "| compiler | libtpu 1.2.3 |" in report


def test_a_run_that_is_repeated_has_nothing_to_do(results, folder, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("compiled anew")

    monkeypatch.setattr(measurement, "compile_program", refuse)
    report = (folder / "report.md").read_text()
    assert run(folder) == results
    assert (folder / "report.md").read_text() == report


def test_an_interrupted_run_keeps_finished_rows(results, folder, monkeypatch, capsys):
    begun = []

    def interrupted(setting, problem, bar):
        begun.append(setting)
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "_programs", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--num-directions", "1", "2")
    assert stopped.value.code == 130
    assert begun == [dataclasses.replace(BASE, num_directions=2)]
    assert f"finished stages are kept in {folder}" in capsys.readouterr().out


def test_what_does_not_fit_the_memory_is_not_timed(results, folder, monkeypatch, tmp_path):
    (tmp_path / "stages").symlink_to(folder / "stages")
    monkeypatch.setattr(measurement, "available_bytes", lambda: 1000)
    (measured,) = run(tmp_path, "--repetitions", "2")["rows"]
    assert measured["times"] is None
    assert measured["temporary_bytes"] == results["rows"][0]["temporary_bytes"]
    assert f"| convnet | 4 | 3 | 1 |{9 * ' - |'}" in (tmp_path / "report.md").read_text()


def test_the_costs_of_equations_9_and_10_by_hand():
    times = measurement.compare(samples(), 1)
    assert times["backward_ratio"] == 2
    assert times["predicted"] == {"full_step": 6.75, "spsa_step": 5}
    assert times["over_predicted"] == pytest.approx({"full_step": 9 / 6.75, "spsa_step": 7 / 5})
    assert times["quartiles"] == pytest.approx([1.4, 1.4])
    assert (times["predicted_cheaper"], times["cheaper"]) == (True, True)
    assert times["excess"] == {"one program": 1, "many probes": 0.5, "the rest": 0.5}
    # Two directions: twice as many probes, the same full gradient.
    times = measurement.compare(samples(estimate=[12.5], spsa_step=[13.0]), 2)
    assert times["predicted"] == {"full_step": 6.75, "spsa_step": 10}
    assert (times["predicted_cheaper"], times["cheaper"]) == (False, False)
    assert times["excess"] == {"one program": 2, "many probes": 0.5, "the rest": 0.5}
    # A backward pass that costs next to nothing.
    assert not measurement.compare(samples(value_and_grad=[2.2]), 1)["predicted_cheaper"]


def timed_row(parameters, flops, num_directions=1, num_experts=10, **seconds):
    setting = Setting(network=NETWORKS[parameters], num_directions=num_directions, num_experts=num_experts)
    times = measurement.compare(samples(**seconds), num_directions)
    steps = {"full_step": 3e9 * flops, "spsa_step_vmapped": 2e9 * flops}
    return {**dataclasses.asdict(setting), "parameters": parameters, "flops": steps, "times": times}


NETWORKS = {100: "resnet20", 200: "mobilenetv2", 300: "vit"}


def test_the_papers_claims_by_hand():
    # F = 2, γ = 2, C_mix = 0.5, D_α = 0.25; the gap is 9 - 7 s of time, 1 GFLOP.
    small = timed_row(100, 1)
    # γ = 1, so that Eq. (10) holds not by its first term; D_α = 20 C_mix; the gap is 12 - 7 s, 2 GFLOP.
    middle = timed_row(200, 2, value_and_grad=[4.0], inner_products=[10.0], full_step=[12.0])
    # The gap is 8 - 7 s, 3 GFLOP.
    large = timed_row(300, 3, full_step=[8.0])
    # m = 4 and K = 50 count for γ and D_α alone.
    rows = [large, small, middle, timed_row(100, 1, num_directions=4), timed_row(100, 1, num_experts=50)]
    found = claim_table(claims(rows, 10))[1]
    assert [row[1:] for row in found] == [
        ["4.1", "γ", "1 to 2", "in 4 of 5"],
        ["4.1", "D_α / C_mix", "0.5 to 20", "in 4 of 5"],
        ["4.1", "its right side over C_mix", "4.5 to 20", "yes"],
        ["4.1", "SPSA step / full step, time", "0.583 to 0.875", "yes"],
        ["6", "(γ − 1)F over the size of D_α − C_mix", "0 to 8", "in 2 of 3"],
        ["6", "growth of T_full − T_SPSA from each network to the next, ms", "-4000 to 3000", "in 1 of 2"],
        ["6", "growth of the FLOPs of full − SPSA, all probes vmapped, GFLOP", "1", "yes"],
    ]
    headers, table = growth_table([large, small, {**middle, "times": None}], 10)
    assert table == [
        ["resnet20", "100", "64", "2000", "-250", "2000", "0.778", "1", "0.667"],
        ["mobilenetv2", "200", "64", "-", "-", "-", "-", "2", "0.667"],
        ["vit", "300", "64", "2000", "-250", "1000", "0.875", "3", "0.667"],
    ]
    assert len(headers) == len(table[0])


def test_one_network_tells_nothing_about_growth():
    found = claim_table(claims([timed_row(100, 1)], 10))[1]
    assert [row[-1] for row in found] == ["yes", "yes", "yes", "yes", "-", "-", "-"]
    assert found[-1][-2] == "-"


def test_what_the_base_is_varied_by_one_at_a_time_at_the_smallest_batch_size():
    settings = cost.Arguments(networks=("vit", "resnet20"), batch_sizes=(512, 64, 64)).settings()
    assert settings[:5] == [
        Setting(network="vit", batch_size=64),
        Setting(network="vit", batch_size=512),
        Setting(network="vit", batch_size=64, num_experts=2),
        Setting(network="vit", batch_size=64, num_experts=50),
        Setting(network="vit", batch_size=64, num_directions=4),
    ]
    assert settings[5:] == [dataclasses.replace(setting, network="resnet20") for setting in settings[:5]]


def test_programs_take_turns_each_after_a_forward_pass():
    calls = []
    called: Any = calls.append
    programs = {name: Program(called, (name,)) for name in ("forward", "full_step", "spsa_step_vmapped")}
    found = measurement._time(programs, 2, ProgressBars(Console()).stage("", 2))
    round_of_calls = ["forward", "forward", "forward", "full_step"]
    assert calls == list(itertools.chain.from_iterable([round_of_calls] * 3))
    assert {name: len(values.seconds) for name, values in found.items()} == {"forward": 2, "full_step": 2}


def test_the_memory_that_is_free_is_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "_MEMORY_INFO", tmp_path / "meminfo")
    assert measurement.available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree:  7 kB\nMemAvailable:   42 kB\n")
    assert measurement.available_bytes() == 42 * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        (json.dumps({**TPU, "rows": [{**TPU_ROW, "batch_size": float("nan")}]}), "it has NaN, which is no number"),
        (json.dumps({**TPU, "rows": [TPU_ROW, {"network": "vit"}]}), "it has no 'temporary_bytes'"),
        (json.dumps({**TPU, "rows": [{**TPU_ROW, "flops": {"full_step": 1.0}}]}), "it has no 'spsa_step_vmapped'"),
    ],
)
def test_a_tpu_file_of_another_shape_is_refused_before_any_work(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda *_: pytest.fail("rows were measured"))
    (tmp_path / "tpu.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    said = str(stopped.value.code)
    assert f"{tmp_path / 'tpu.json'} is damaged" in said
    assert message in said
    assert "run python -m experiments.studies.cost.tpu again" in said
    assert len(said.splitlines()) == 1
