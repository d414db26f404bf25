"""The claims of section 5 about the paper's four Configs: the leads of GLUE in a run, and a verdict on each claim.

Config 5 is ours. No claim is about it, and its leads have a table of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.protocol.config import PAPER_CONFIGS
from experiments.reporting.analysis import clear_sign, lead, name_of, signed
from experiments.reporting.paper import LARGEST_LEAD, LARGEST_VARIATION, MATCHED, experiment_of, is_at_its_scale
from experiments.reporting.presentation import TableCells

EXPLANATION = (
    "A lead is clear if Student's t test over seeds says so (one-sided, 5 %). One seed has no verdict. 'Yes': the "
    "lead is clear, at every epoch and over both Configs where the claim is about all of them. 'In part': it is clear "
    "at some, and GLUE is clearly behind at none. 'No': GLUE is clearly behind at some. 'Undecided': nothing is "
    "clear. 'At most' and 'within' compare means with their bound, without a test. The seeds share one draw of "
    "experts. So they tell what the target images, minibatches and directions do, not what another draw of experts "
    "would do."
)
"""How `verdicts` judges."""


def leads(results: Mapping[str, Any]) -> TableCells:
    """Returns the leads of GLUE over the paper's other Configs as headers and rows.

    'Up to' is the largest over the epochs.
    """
    paper = LARGEST_LEAD.get(experiment_of(results["config"]) or "", {})
    same_scale = is_at_its_scale(results["config"])
    headers = ["GLUE against", "up to", "at epoch", "the paper's", "difference", "at the prior", "at the end"]
    rows = []
    for number in (1, 2, 3):
        ours = lead(results, number)
        epoch, beside = ours.largest_epoch, ["-", "-"]
        if number in paper:
            difference = f"{ours.mean[epoch] - paper[number]:+.1f}" if same_scale else "-"
            beside = [f"{paper[number]:+.1f}", difference]
        rows.append([name_of(number), ours.at(epoch), str(epoch), *beside, ours.at(0), ours.at(-1)])
    return headers, rows


def leads_of_ours(results: Mapping[str, Any]) -> TableCells:
    """Returns the leads of Config 5 over the paper's Configs as headers and rows, like `leads`."""
    rows = []
    for number in PAPER_CONFIGS:
        ours = lead(results, number, of=5)
        epoch = ours.largest_epoch
        rows.append([name_of(number), ours.at(epoch), str(epoch), ours.at(0), ours.at(-1)])
    return ["Gauss-Newton (ours) against", "up to", "at epoch", "at the prior", "at the end"], rows


def verdicts(results: Mapping[str, Any]) -> TableCells:
    """Returns the claims of section 5 for one run as headers and rows.

    A row has the paper's figure, ours in points, and the verdict.
    """
    experiment = experiment_of(results["config"]) or ""
    paper = LARGEST_LEAD.get(experiment, {})
    leads = {number: lead(results, number) for number in (1, 2, 3)}
    both = (leads[1], leads[2])
    rows = []

    def claim(what: str, theirs: str, ours: str, signs: Sequence[int] | np.ndarray) -> None:
        rows.append([what, theirs, ours, "-" if len(leads[1].points) == 1 else _verdict(signs)])

    for number in (1, 2):
        ours = leads[number]
        ahead, behind = (int((ours.signs == sign).sum()) for sign in (1, -1))
        claim(
            f"consistently higher test accuracy than Config {number}",
            f"up to {paper[number]:+.1f}" if number in paper else "-",
            f"up to {ours.at(ours.largest_epoch)}; of {len(ours.mean)} epochs clearly ahead {ahead}, behind {behind}",
            ours.signs,
        )
    claim(
        "a stronger prior than Configs 1 and 2",
        "-",
        ", ".join(ours.at(0) for ours in both),
        [ours.signs[0] for ours in both],
    )
    over_epochs = [ours.points[:, 1:].mean(axis=1) for ours in both if ours.points.shape[1] > 1]
    claim(
        "faster convergence than Configs 1 and 2 (mean over the epochs of fine-tuning)",
        "-",
        ", ".join(signed(points) for points in over_epochs) or "-",
        [clear_sign(points) for points in over_epochs],
    )
    claim(
        "a higher accuracy than Configs 1 and 2 in the end",
        "-",
        ", ".join(ours.at(-1) for ours in both),
        [ours.signs[-1] for ours in both],
    )
    ours = leads[3]
    if 3 in paper:
        best = ours.points[:, ours.largest_epoch]
        claim("outperforms Config 3 by up to a few points", f"up to {paper[3]:+.1f}", signed(best), [clear_sign(best)])
    limit = LARGEST_VARIATION.get(experiment, MATCHED)
    whole = (
        f"within {limit:.1f} of Config 3" if experiment in LARGEST_VARIATION else f"at most {limit:.1f} below Config 3"
    )
    low, high = ours.mean.min(), ours.mean.max()
    kept = low >= -limit and (high <= limit or experiment not in LARGEST_VARIATION)
    verdict = "-" if len(ours.points) == 1 else "yes" if kept else "no"
    rows.append([f"{whole}, means over seeds", f"{limit:.1f}", f"{low:+.1f} to {high:+.1f} over the epochs", verdict])
    return ["claim", "the paper", "ours, points", "reproduced"], rows


def _verdict(signs: Sequence[int] | np.ndarray) -> str:
    """Returns what clear leads say about a claim."""
    signs = np.asarray(signs)
    if signs.size and (signs > 0).all():
        return "yes"
    if (signs < 0).any():
        return "no"
    return "in part" if (signs > 0).any() else "undecided"
