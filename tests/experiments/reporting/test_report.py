import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.protocol.config import CONFIGS, PAPER_CONFIGS, Config
from experiments.reporting import claims, paper, presentation, run_report
from experiments.reporting.analysis import clear_sign, lead, num_mixed


def _results(accuracies, dataset="cifar10", network="resnet20"):
    """Of two experts; `accuracies[config]` is `[seeds, epochs + 1]`."""
    seeds = list(range(len(accuracies[1])))
    expert = {f"{split}_{what}": 0.4 for split in ("test", "target", "validation") for what in ("accuracy", "loss")}
    return {
        "title": "a run",
        "machine": "some cores",
        "config": dataclasses.asdict(Config(dataset=dataset, network=network, seeds=tuple(seeds))),
        "data": {"name": f"{dataset}/1", "target": 10, "test": 10},
        "experts": [expert, {**expert, "test_accuracy": 0.5}],
        "runs": [
            {
                "seed": seed,
                "config": number,
                "test_accuracy": values[seed],
                "test_loss": [2 - value for value in values[seed]],
            }
            for seed in seeds
            for number, values in accuracies.items()
        ],
    }


DIGITS = Path(report.__file__).parent / "results" / "digits"

# GLUE leads Config 1 by 3 to 4 points at the prior, by 1 in the end; Config 2 at the prior alone, clearly.
RESULTS = _results(
    {
        1: [[0.30, 0.50], [0.30, 0.50]],
        2: [[0.31, 0.52], [0.31, 0.51]],
        3: [[0.33, 0.51], [0.34, 0.52]],
        4: [[0.33, 0.51], [0.34, 0.51]],
    }
)


# Gauss-Newton has half a point more than GLUE at the prior, and a point in the end.
WITH_OURS = _results(
    {
        **{
            number: [run["test_accuracy"] for run in RESULTS["runs"] if run["config"] == number]
            for number in range(1, 5)
        },
        5: [[0.335, 0.52], [0.345, 0.52]],
    }
)


def test_a_lead_has_the_mean_and_the_deviation_over_seeds_of_an_epoch():
    ours = lead(RESULTS, 1)
    np.testing.assert_allclose(ours.mean, [3.5, 1])
    assert ours.largest_epoch == 0
    # Leads of 3 and 4 points: standard deviation sqrt(1/2).
    assert ours.at(0) == "+3.5 ± 0.7"
    assert ours.at(1) == "+1.0 ± 0.0"


def test_what_is_clear_is_by_students_t():
    # Mean 3.5, standard error 0.5: t = 7 with one degree of freedom, whose 95 % quantile is 6.31.
    assert clear_sign(np.array([3.0, 4.0])) == 1
    assert clear_sign(np.array([-3.0, -4.0])) == -1
    # t = 3: two standard errors do not do.
    assert clear_sign(np.array([1.0, 2.0])) == 0
    # With two degrees of freedom the quantile is 2.92, here t = 2.89 and 3.02.
    assert clear_sign(np.array([1.0, 2.0, 4.055])) == 0
    assert clear_sign(np.array([1.0, 2.0, 3.8])) == 0
    assert clear_sign(np.array([1.0, 2.0, 3.0])) == 1
    assert clear_sign(np.array([5.0])) == 0


def test_one_seed_has_a_lead_but_no_verdict():
    one = _results({number: [[0.3, 0.4 + number / 100]] for number in (1, 2, 3, 4)})
    assert lead(one, 1).at(1) == "+3.0"
    _, rows = claims.verdicts(one)
    assert {row[-1] for row in rows} == {"-"}


def test_the_four_configs_of_each_run_have_mean_and_deviation_of_the_prior_and_of_the_end():
    headers, rows = report.configs([RESULTS, RESULTS])
    assert [row[:2] for row in rows[:4]] == [
        ["1 cifar10, resnet20", f"{number} {name}"] for number, name in PAPER_CONFIGS.items()
    ]
    assert len(rows) == 8
    row = dict(zip(headers, rows[3], strict=True))
    assert (row["prior, %"], row["tuned, %"]) == ("33.5 ± 0.7", "51.0")
    assert row["prior, loss"] == "1.665 ± 0.007"


def test_config_5_is_a_row_more_and_changes_nothing_of_the_papers():
    _, rows = report.configs([WITH_OURS])
    assert [row[1] for row in rows] == [f"{number} {name}" for number, name in CONFIGS.items()]
    assert rows[4] == ["1 cifar10, resnet20", "5 Gauss-Newton (ours)", "34.0 ± 0.7", "1.660 ± 0.007", "52.0", "1.480"]
    assert rows[:4] == report.configs([RESULTS])[1]
    assert claims.verdicts(WITH_OURS) == claims.verdicts(RESULTS)
    assert claims.leads(WITH_OURS) == claims.leads(RESULTS)
    headers, rows = claims.leads_of_ours(WITH_OURS)
    row = dict(zip(headers, rows[3], strict=True))
    assert (row["at the prior"], row["at the end"], row["at epoch"]) == ("+0.5 ± 0.0", "+1.0 ± 0.0", "1")


def test_the_page_says_whose_config_5_is_where_it_is_there(tmp_path):
    for name, runs, is_there in (("old", [RESULTS], False), ("both", [RESULTS, WITH_OURS], True)):
        report.write(runs, tmp_path / name)
        text = (tmp_path / name / "report.md").read_text()
        assert (run_report.OURS in text) == is_there
        labels = [text.get_text() for text in report.figure1(runs).legends[0].get_texts()]
        assert labels == [f"{number} {name}" for number, name in (CONFIGS if is_there else PAPER_CONFIGS).items()]


def test_passes_and_seconds_are_those_of_the_runs_that_count_them():
    counted = {"backward_passes": 0, "prior_seconds": 2.5}
    passes = {(4, 0): 1000, (4, 1): 3000}
    runs = [
        {**run, **counted, "forward_passes": passes.get((run["config"], run["seed"]), 0)} for run in WITH_OURS["runs"]
    ]
    headers, rows = report.costs([{**WITH_OURS, "runs": runs}, RESULTS])
    assert headers == ["run", "Config", "forward passes", "backward passes", "seconds"]
    assert rows[3] == ["1 cifar10, resnet20", "4 GLUE (SPSA)", "2,000 ± 1,414", "0", "2.5"]
    assert len(rows) == 9
    assert rows[8] == ["2 cifar10, resnet20", "4 GLUE (SPSA)", "-", "-", "-"]


def test_the_leads_stand_beside_the_papers_with_the_difference():
    headers, rows = report.leads([RESULTS])
    row = dict(zip(headers, rows[0], strict=True))
    largest = paper.LARGEST_LEAD["cifar10"][1]
    assert (row["up to"], row["at epoch"]) == ("+3.5 ± 0.7", "0")
    assert (row["the paper's"], row["difference"]) == (f"{largest:+.1f}", f"{3.5 - largest:+.1f}")


def test_each_claim_has_the_verdict_that_its_leads_say():
    _, rows = claims.verdicts(RESULTS)
    verdicts = {row[0]: row[-1] for row in rows}
    assert verdicts["consistently higher test accuracy than Config 1"] == "yes"
    # Against Config 2: leads of 2 and 3 points at the prior (t = 5), of -1 and 0 in the end.
    assert verdicts["consistently higher test accuracy than Config 2"] == "undecided"
    assert verdicts["a stronger prior than Configs 1 and 2"] == "in part"
    assert verdicts["a higher accuracy than Configs 1 and 2 in the end"] == "in part"
    assert verdicts["outperforms Config 3 by up to a few points"] == "undecided"
    # Config 3 leads by 0.5 at the most.
    assert verdicts["at most 1.4 below Config 3, means over seeds"] == "yes"


def test_a_clear_loss_is_not_reproduced():
    worse = _results({1: [[0.36], [0.36]], 2: [[0.3]] * 2, 3: [[0.4]] * 2, 4: [[0.35]] * 2})
    verdicts = {row[0]: row[-2:] for row in claims.verdicts(worse)[1]}
    assert verdicts["consistently higher test accuracy than Config 1"][-1] == "no"
    assert verdicts["a stronger prior than Configs 1 and 2"][-1] == "no"
    assert verdicts["at most 1.4 below Config 3, means over seeds"] == ["-5.0 to -5.0 over the epochs", "no"]


def test_a_variation_is_to_either_side():
    better = _results({1: [[0.3]] * 2, 2: [[0.3]] * 2, 3: [[0.4]] * 2, 4: [[0.43]] * 2}, "svhn_cropped", "mobilenetv2")
    assert claims.verdicts(better)[1][-1][0] == "within 1.4 of Config 3, means over seeds"
    assert claims.verdicts(better)[1][-1][-1] == "no"


def test_a_run_of_another_scale_is_not_set_beside_the_paper(tmp_path):
    smaller = {**RESULTS, "config": {**RESULTS["config"], "expert_examples": 500}}
    assert [row[1] for row in report.table1([smaller])[1]] == ["the paper's", "ours, test", "ours, target"]
    headers, rows = report.leads([smaller])
    assert dict(zip(headers, rows[0], strict=True))["difference"] == "-"
    report.write([smaller], tmp_path)
    assert "Of another scale than the paper's" in (tmp_path / "report.md").read_text()


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


def test_without_folders_all_runs_that_came_to_their_report_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = {**RESULTS, "title": "another", "config": {**RESULTS["config"], "network": "vit"}}
    for name, content in {"a": other, "cifar10-quick": RESULTS, "cost": {"rows": []}}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(content))
    (tmp_path / "runs" / "in-progress" / "stages").mkdir(parents=True)
    report.main([])
    page = tmp_path / "runs" / "report"
    assert {path.name for path in page.iterdir()} == {"report.md", "figure1.png"}
    text = (page / "report.md").read_text()
    assert "nan" not in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### 1 cifar10, resnet20",
        "### 2 cifar10, vit",
    ]


def changed(*path, to):
    """The results as JSON, with one value set, or taken away where it is None."""
    results = json.loads(json.dumps(RESULTS))
    inner = results
    for key in path[:-1]:
        inner = inner[key]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return json.dumps(results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json"),
        ("{", "results.json is damaged"),
        ('{"rows": []}', r"it holds \['rows'\], not the results of an experiment's Configs"),
        ("[1]", r"it holds \[1\], not the results of an experiment's Configs"),
        ("null", "it holds None, not"),
        (changed("runs", 0, "test_accuracy", 1, to=float("nan")), "it has NaN, which is no number"),
        (changed("runs", to=[]), r"it has runs of \(seed, Config\) \[\]"),
        (changed("experts", to=[]), "ValueError"),
        (changed("data", to=None), "it has no 'data'"),
        (changed("title", to=None), "it has no 'title'"),
        (changed("config", "seeds", to=None), "it has no 'seeds'"),
        (changed("config", "dataset", to=5), "AttributeError"),
        (changed("runs", 7, to=None), r"it has runs of \(seed, Config\)"),
        (changed("config", "seeds", to=[0]), r"it has runs of \(seed, Config\)"),
        # Config 5 of one seed, and without Config 4.
        (changed("runs", to=WITH_OURS["runs"][:-1]), r"it has runs of \(seed, Config\)"),
        (changed("runs", to=[run for run in WITH_OURS["runs"] if run["config"] != 4]), "it has runs of"),
        (changed("runs", 2, "test_accuracy", to=["0.3", "0.4"]), "TypeError"),
        (changed("runs", 2, "test_loss", to=[1.0]), "ValueError"),
        (changed("experts", 1, "test_accuracy", to=45.0), "accuracies from .* to 45.0; expected fractions"),
    ],
)
def test_wrong_content_is_named_in_one_line(tmp_path, content, message):
    if content:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=f"{tmp_path}.*{message}") as stopped:
        report.main([str(tmp_path), "--out-dir", str(tmp_path / "page")])
    assert len(str(stopped.value.code).splitlines()) == 1


def test_a_run_of_an_older_version_still_has_its_own_report():
    results = report.read(DIGITS)
    older = {**results, "runs": [run for run in results["runs"] if run["config"] in PAPER_CONFIGS]}
    for run in older["runs"]:
        for field in ("forward_passes", "backward_passes", "prior_seconds"):
            run.pop(field, None)
    text = run_report.present(older).markdown
    assert "| 4 GLUE (SPSA) | - | - | - |" in text
    assert "Gauss-Newton" not in text
    assert "nan" not in text


def test_a_full_disk_is_told_in_one_line_with_the_way_out(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(presentation, "write_whole", full)
    with pytest.raises(SystemExit, match=rf"no space is left to write {tmp_path / 'figure1.png'}: make room"):
        report.main([str(DIGITS), "--out-dir", str(tmp_path)])


def test_no_runs_at_all_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no run to report"):
        report.main([])


def test_how_many_experts_are_mixed_lies_between_one_and_all():
    np.testing.assert_allclose(num_mixed(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])), [4, 1, 2])


def test_a_long_title_stays_within_its_picture():
    digits = json.loads((DIGITS / "results.json").read_text())
    long = {**digits, "title": f"imagenette, preset quick, {', '.join(f'some_field_{i} 1000' for i in range(8))}"}
    for figure in run_report.present(long).figures.values():
        figure.canvas.draw()
        titles = [*(axes.title for axes in figure.axes), *figure.texts]
        assert any("imagenette" in title.get_text() for title in titles)
        for box in (title.get_window_extent() for title in titles):
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_the_legend_of_figure_1_stays_within_it(panels):
    figure = report.figure1([WITH_OURS] * panels)
    assert len(figure.axes) == panels
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
