import json

import numpy as np
import pytest

from experiments import paper, report
from experiments.analysis import lead, num_mixed


def _results(accuracies, dataset="cifar10", network="resnet20"):
    """Of two experts; `accuracies[config]` is `[seeds, epochs + 1]`."""
    seeds = list(range(len(accuracies[1])))
    expert = {f"{split}_{what}": 0.4 for split in ("test", "target", "validation") for what in ("accuracy", "loss")}
    return {
        "title": "a run",
        "machine": "some cores",
        "config": {
            "dataset": dataset,
            "network": network,
            "num_experts": 2,
            "expert_examples": 20,
            "expert_epochs": 3,
            "initialization": "common",
            "seeds": seeds,
        },
        "data": {"name": f"{dataset}/1", "target": 10, "test": 10},
        "experts": [expert, {**expert, "test_accuracy": 0.5}],
        "runs": [
            {"seed": seed, "config": number, "test_accuracy": values[seed]}
            for seed in seeds
            for number, values in accuracies.items()
        ],
    }


# GLUE leads Config 1 by 2 and 4 points at the prior, by 1 point at the end; Config 3 leads it by 1 or ties.
RESULTS = _results(
    {
        1: [[0.30, 0.50], [0.30, 0.50]],
        2: [[0.33, 0.52], [0.33, 0.51]],
        3: [[0.33, 0.51], [0.34, 0.52]],
        4: [[0.32, 0.51], [0.34, 0.51]],
    }
)


def test_a_lead_is_the_largest_mean_over_seeds_with_the_deviation_of_its_epoch():
    ours = lead(RESULTS, 1)
    np.testing.assert_allclose(ours.mean, [3, 1])
    assert ours.largest == 0
    # Leads of 2 and 4 points: standard deviation sqrt(2).
    assert ours.at(0) == "+3.0 ± 1.4"
    assert ours.at(1) == "+1.0 ± 0.0"
    # Standard error 1: 3 is above twice that.
    assert ours.is_clear(0)


def test_one_seed_has_a_lead_but_no_verdict():
    one = _results({number: [[0.3, 0.4 + number / 100]] for number in (1, 2, 3, 4)})
    ours = lead(one, 1)
    assert ours.at(1) == "+3.0"
    assert not ours.is_clear(1)
    _, rows = report.claims(one)
    assert [row[-1] for row in rows] == ["-"] * 5


def test_the_leads_stand_beside_the_papers_with_the_difference():
    headers, rows = report.leads([RESULTS])
    row = dict(zip(headers, rows[0], strict=True))
    largest = paper.LARGEST_LEAD["cifar10"][1]
    assert (row["up to"], row["at epoch"]) == ("+3.0 ± 1.4", "0")
    assert (row["the paper's"], row["difference"]) == (f"{largest:+.1f}", f"{3 - largest:+.1f}")


def test_each_claim_has_the_verdict_that_its_leads_say():
    _, rows = report.claims(RESULTS)
    verdicts = {row[0]: row[-1] for row in rows}
    assert verdicts["consistently higher test accuracy than Config 1"] == "yes"
    # Against Config 2: leads of -1 and 1 at the prior, of -1 and 0 at the end.
    assert verdicts["consistently higher test accuracy than Config 2"] == "no"
    assert verdicts["a stronger prior than Configs 1 and 2"] == "in part"
    # Config 3 leads by 0.5 at the most.
    assert verdicts["outperforms Config 3, or matches it within 1.4"] == "yes"


def test_a_loss_against_config_3_beyond_the_papers_variation_is_not_reproduced():
    worse = _results({1: [[0.3]] * 2, 2: [[0.3]] * 2, 3: [[0.4]] * 2, 4: [[0.35]] * 2})
    _, rows = report.claims(worse)
    assert rows[-1][-1] == "no"
    assert "-5.0 to -5.0" in rows[-1][-2]


def test_table_1_has_the_papers_accuracies_and_ours_and_the_difference_of_their_means():
    headers, rows = report.table1([RESULTS])
    assert len({len(row) for row in [headers, *rows]}) == 1
    table = {row[1]: dict(zip(headers, row, strict=True)) for row in rows}
    assert table["the paper's"]["2"] == "50.5"
    assert table["ours, test"]["mean"] == "45.0"
    expected = 45 - np.mean(paper.EXPERT_ACCURACY["cifar10"])
    assert table["ours, test, less the paper's"]["mean"] == f"{expected:+.1f}"


def test_another_network_on_a_data_set_is_not_set_beside_the_paper():
    other = {**RESULTS, "config": {**RESULTS["config"], "network": "mobilenetv2"}}
    _, rows = report.table1([other])
    assert [row[1] for row in rows] == ["ours, test", "ours, target"]
    assert report.leads([other])[1][0][4] == "-"


def test_the_page_has_a_panel_a_run(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(RESULTS))
    report.main([*(str(tmp_path / name) for name in "abc"), "--out-dir", str(tmp_path / "page")])
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.md", "figure1.png"}
    text = (tmp_path / "page" / "report.md").read_text()
    assert text.count("### a run") == 3
    assert "nan" not in text
    assert len(report.figure1([RESULTS] * 3).axes) == 3


@pytest.mark.parametrize(
    ("runs", "message"), [(["nowhere"], "nowhere holds no results.json"), ([], "no run to report")]
)
def test_runs_that_are_not_there_are_named(tmp_path, monkeypatch, runs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        report.main(runs)


def test_how_many_experts_are_mixed_lies_between_one_and_all():
    np.testing.assert_allclose(num_mixed(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])), [4, 1, 2])
