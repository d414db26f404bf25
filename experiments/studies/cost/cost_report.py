"""The report of `experiments.studies.cost`: tables, a picture, and tables for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.reporting.presentation import claim_table, markdown_table, rich_table, write_report
from experiments.studies.cost.cost_claims import EXPLANATION, growth_table
from experiments.studies.cost.cost_figure import draw

Rows = Sequence[Mapping[str, Any]]

DEVIATION = 0.15
"""Beyond this, measured over predicted is explained beside the row."""

_SETTING = ("network", "batch", "K", "m")


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md` and `cost.png`.

    Args:
        results: of `experiments.studies.cost.__main__.main`.
        folder: where to.
    """
    write_report(folder, results, _markdown(results), {"cost.png": draw(results["rows"])})


def print_tables(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the times, the promises and the verdicts on the paper's claims, and where the report lies.

    Args:
        results: of `experiments.studies.cost.__main__.main`.
        folder: where the report lies.
        console: where to print.
    """
    console.print(rich_table("Time of a step", *_short_table(results["rows"])))
    for line in _remarks(results["rows"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(rich_table("What is promised", *_promise_table(results["promises"])))
    console.print(rich_table("The claims of section 4.1", *claim_table(results["claims"])))
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def size_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Returns headers and cells: memory and FLOPs of the compiled steps.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure` or `experiments.studies.cost.tpu.compile_steps`.
    """
    headers = [*_SETTING, "full, MB", "SPSA, MB", "SPSA / full", "full, GFLOP", "SPSA, GFLOP", "SPSA / full"]
    return headers, [[*_setting(row), *_sizes(row)] for row in rows]


def explain(row: Mapping[str, Any]) -> str | None:
    """Returns where a timed row's SPSA step differs from Eq. (9), by programs in between; None within `DEVIATION`.

    Args:
        row: of `experiments.studies.cost.step_costs.measure`.
    """
    times, m = row["times"], row["num_directions"]
    if times is None or abs(times["over_predicted"]["spsa_step"] - 1) <= DEVIATION:
        return None
    together = "one after another" if row["platform"] == "cpu" else "side by side"
    names = {
        "one program": "a blend and a forward pass in one program, against each in its own",
        "many probes": f"{2 * m} such probes {together}, with their directions, against each in its own program",
        "the rest": "the update of the coefficients",
    }
    excess = {name: value / times["predicted"]["spsa_step"] for name, value in times["excess"].items()}
    largest_first = sorted(excess, key=lambda name: -abs(excess[name]))
    parts = "; ".join(f"{_percent(excess[name])} {names[name]}" for name in largest_first)
    notes = []
    faults = times["page_faults"]
    alone = 2 * m * (faults["forward"] + faults["blend"])
    saving = times["over_predicted"]["spsa_step"] < 1 and faults["spsa_step"] < 0.75 * alone
    if saving and row["platform"] == "cpu":
        notes.append(
            f"Memory is new to a program at each call, {alone:.0f} page faults in {2 * m} forward passes and blends by "
            f"themselves; within the step it is used again, {faults['spsa_step']:.0f}."
        )
    low, high = times["quartiles"]
    if low - DEVIATION <= 1 <= high + DEVIATION:
        notes.append(f"The quartiles, {low:.2f} to {high:.2f}, reach within it: the machine was not quiet.")
    return " ".join([f"{_percent(sum(excess.values()))}, of it {parts}.", *notes])


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    arguments, rows, tpu = results["arguments"], results["rows"], results["tpu"]
    k, on_cpu = arguments["num_experts"][0], rows[0]["platform"] == "cpu"
    probes = "one probe after another" if on_cpu else "all probes vmapped"
    sections = [
        "# The cost of a step: SPSA against the full gradient",
        f"    {results['command']}",
        f"Run on {results['machine']}. A time is the median of {arguments['repetitions']} calls of a compiled program; "
        "the programs of a row take turns in one process. Images, labels and experts (as they are initialised) are "
        f"random, of the size of the paper's data, 10 classes; matrix products in {arguments['matmul_precision']} "
        "precision.",
        "![the steps' times, by Eq. (9) and measured](cost.png)",
        "## What is promised",
        f"Of K = {k} experts and one direction.",
        markdown_table(*_promise_table(results["promises"])),
        "## The claims of section 4.1",
        EXPLANATION,
        markdown_table(*claim_table(results["claims"])),
        f"The terms of Eq. (21), and T_full − T_SPSA as measured, by the networks' parameters (K = {k}, m = 1):",
        markdown_table(*growth_table(rows, k)),
        "## Time",
        "Eq. (9): T_full = (1 + γ)F + C_mix + D_α and T_SPSA = 2m (F + C_mix), from the parts measured below. In "
        "brackets, the quartiles of the ratio over the repetitions. Eq. (10) says whether SPSA is cheaper where m = 1; "
        "for more directions that column compares the two of Eq. (9). The last column is as measured.",
        markdown_table(*_time_table(rows)),
        *_remarks(rows),
        "## The parts",
        "F: the loss of a blended network in evaluation mode. γ: the backward pass over F, from the loss with its "
        "gradient for the network's variables. C_mix: one blend. D_α: its vjp for α, K inner products. Probe: a blend "
        "and its loss in one program. Estimate: the SPSA step without the update of the coefficients."
        + (on_cpu * " The last columns are page faults: how often the process is given a page of memory in a call."),
        markdown_table(*_part_table(rows)),
        "## Memory and FLOPs",
        "Of the compiled steps. Temporary memory is what a program takes beside its arguments and results, as it runs "
        f"here by default: {probes}. XLA counts the FLOPs of a loop's body once, so those of SPSA are of the step with "
        "all probes vmapped, compiled and not run.",
        markdown_table(*size_table(rows)),
    ]
    if tpu is not None:
        sections += [
            "## Compiled for a TPU",
            f"Ahead of time, for one chip of {tpu['topology']}, and not run: `{tpu['command']}` ({tpu['compiler']}). "
            f"All probes are vmapped; matrix products in {tpu['matmul_precision']} precision.",
            markdown_table(*_tpu_table(tpu["rows"])),
        ]
    return "\n\n".join(sections) + "\n"


def _promise_table(promises: Rows) -> tuple[list[str], list[list[str]]]:
    """Each promise with its verdict."""
    return ["promise", "where", "at most", "measured", ""], [
        [
            promise["what"],
            promise["where"],
            f"{promise['limit']:g}",
            "-" if promise["measured"] is None else f"{promise['measured']:.3f}",
            promise["verdict"],
        ]
        for promise in promises
    ]


def _time_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Measured times beside Eq. (9) and (10)."""
    headers = [*_SETTING, "T_full, ms", "T_SPSA, ms", "SPSA / full"]
    headers += ["T_full by (9)", "measured / it", "T_SPSA by (9)", "measured / it", "Eq. (10)", "cheaper"]
    table = []
    for row in _timed(rows):
        times = row["times"]
        predicted, (low, high) = times["predicted"], times["quartiles"]
        table.append(
            [
                *_setting(row),
                *_measured(times),
                _milliseconds(predicted["full_step"]),
                f"{times['over_predicted']['full_step']:.2f}",
                _milliseconds(predicted["spsa_step"]),
                f"{_marked_ratio(row)} [{low:.2f}, {high:.2f}]",
                "yes" if times["predicted_cheaper"] else "no",
                "yes" if times["cheaper"] else "no",
            ]
        )
    return headers, table


def _short_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What of it fits a terminal."""
    headers = [*_SETTING, "full, ms", "SPSA, ms", "SPSA / full", "SPSA / Eq. (9)"]
    return headers, [[*_setting(row), *_measured(row["times"]), _marked_ratio(row)] for row in _timed(rows)]


def _remarks(rows: Rows) -> Iterable[str]:
    """What a reader of the times should know."""
    yield from _explanations(rows)
    yield from _depthwise(rows)
    yield from _untimed(rows)


def _explanations(rows: Rows) -> Iterable[str]:
    """Why rows deviate, as one list."""
    found = [f"- {row['name']}: {reason}" for row in rows if (reason := explain(row)) is not None]
    if found:
        yield (
            f"† T_SPSA is more than {100 * DEVIATION:.0f} % off its prediction. Where the difference arises, as a "
            "share of the prediction, by programs that took turns with the others (see the parts):"
        )
        yield "\n".join(found)
    elif _timed(rows):
        yield f"T_SPSA is within {100 * DEVIATION:.0f} % of its prediction in every row."


def _depthwise(rows: Rows) -> Iterable[str]:
    """Why MobileNetV2's backward pass takes long on a CPU."""
    gammas = [
        row["times"]["backward_ratio"]
        for row in _timed(rows)
        if row["network"] == "mobilenetv2" and row["platform"] == "cpu"
    ]
    if gammas:
        yield (
            f"MobileNetV2's γ, {min(gammas):.1f} to {max(gammas):.1f} here, is this platform's: XLA:CPU is slow at the "
            "gradient of the depthwise kernels (`experiments/models/depthwise.py`), nine sums over all pixels of all "
            "images. Its ratio SPSA / full therefore flatters SPSA."
        )


def _untimed(rows: Rows) -> Iterable[str]:
    """Which rows were too large."""
    large = [f"{row['name']} ({row['total_bytes'] / 1e9:.1f} GB)" for row in rows if row["times"] is None]
    if large:
        yield f"Not timed, since a program takes more memory than was free: {'; '.join(large)}."


def _part_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What Eq. (9) is made of."""
    names = ("blend", "inner_products", "probe", "estimate")
    # Of the host alone: where an accelerator computes, they say nothing about a step.
    faulty = {"forward": "faults of F", "spsa_step": "of SPSA"} if rows[0]["platform"] == "cpu" else {}
    table = []
    for row in _timed(rows):
        seconds, gamma = row["times"]["seconds"], row["times"]["backward_ratio"]
        others = (_milliseconds(seconds[name]) for name in names)
        faults = (f"{row['times']['page_faults'][name]:.0f}" for name in faulty)
        table.append([*_setting(row), _milliseconds(seconds["forward"]), f"{gamma:.2f}", *others, *faults])
    headers = ["F, ms", "γ", "C_mix, ms", "D_α, ms", "probe, ms", "estimate, ms", *faulty.values()]
    return [*_SETTING, *headers], table


def _tpu_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Memory and FLOPs of the programs for a TPU, with the time that it took to compile them."""
    headers, table = size_table(rows)
    seconds = [row["compile_seconds"] for row in rows]
    return [*headers, "compile full, s", "compile SPSA, s"], [
        [*cells, f"{value['full_step']:.0f}", f"{value['spsa_step']:.0f}"]
        for cells, value in zip(table, seconds, strict=True)
    ]


def _sizes(row: Mapping[str, Any]) -> Iterable[str]:
    """Megabytes and GFLOP of the full step and of SPSA, and their ratios."""
    memory, flops = row["temporary_bytes"], row["flops"]
    for full, spsa, unit in (
        (memory["full_step"], memory["spsa_step"], 1e6),
        (flops["full_step"], flops["spsa_step_vmapped"], 1e9),
    ):
        # A TPU keeps a small program's arrays in the memory of its core, and takes none beside.
        ratio = f"{spsa / full:.3f}" if full else "-"
        yield from (f"{full / unit:.4g}", f"{spsa / unit:.4g}", ratio)


def _measured(times: Mapping[str, Any]) -> Iterable[str]:
    """Both steps, and their ratio."""
    yield from (_milliseconds(times["seconds"][name]) for name in ("full_step", "spsa_step"))
    yield f"{times['spsa_over_full']:.3f}"


def _marked_ratio(row: Mapping[str, Any]) -> str:
    """Measured over predicted of the SPSA step, marked where it is explained."""
    return f"{row['times']['over_predicted']['spsa_step']:.2f}{'' if explain(row) is None else '†'}"


def _timed(rows: Rows) -> Rows:
    """The rows that have times."""
    return [row for row in rows if row["times"] is not None]


def _setting(row: Mapping[str, Any]) -> list[str]:
    """A row's first cells."""
    return [row["network"], *(str(row[name]) for name in ("batch_size", "num_experts", "num_directions"))]


def _percent(share: float) -> str:
    """A signed share."""
    return f"{100 * share:+.0f} %"


def _milliseconds(seconds: float) -> str:
    """Seconds in ms, to three digits."""
    return f"{1000 * seconds:#.3g}".removesuffix(".") if seconds < 1 else f"{1000 * seconds:.0f}"
