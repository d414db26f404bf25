"""The report of `experiments.studies.cost`: tables, a picture, and tables for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import Report, TableCells, claim_table, markdown_table, page
from experiments.studies.cost.cost_claims import EXPLANATION, claims, growth_table
from experiments.studies.cost.cost_figure import draw

Rows = Sequence[Mapping[str, Any]]

_SETTING = ("network", "batch", "K", "m")


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `experiments.studies.cost.__main__.main`."""
    rows, k = results["rows"], results["arguments"]["num_experts"][0]
    tables = {
        "Time of a step": _short_table(rows),
        "The claims of section 4.1": claim_table(claims(rows, k)),
    }
    return Report(_markdown(results, k), {"cost.png": draw(rows)}, tables)


def size_table(rows: Rows) -> TableCells:
    """Returns headers and cells: memory and FLOPs of the compiled steps.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure` or `experiments.studies.cost.tpu.compile_steps`.
    """
    headers = [*_SETTING, "full, MB", "SPSA, MB", "SPSA / full", "full, GFLOP", "SPSA, GFLOP", "SPSA / full"]
    return headers, [[*_setting(row), *_sizes(row)] for row in rows]


def tpu_blocks(tpu: Mapping[str, Any]) -> list[str]:
    """Returns the part of the report on the programs for a TPU.

    Args:
        tpu: what `experiments.studies.cost.tpu` writes.

    Raises:
        LookupError, TypeError: of a file that is not that.
    """
    headers, table = size_table(tpu["rows"])
    compiled = [
        [*cells, *(f"{row['compile_seconds'][name]:.0f}" for name in ("full_step", "spsa_step"))]
        for cells, row in zip(table, tpu["rows"], strict=True)
    ]
    named = [[name, str(tpu[name])] for name in ("topology", "compiler", "matmul_precision")]
    return [
        "## Compiled for a TPU",
        f"    {tpu['command']}",
        "These programs were compiled ahead of time, for one chip of the topology, and not run. All probes are "
        "vmapped.",
        markdown_table(["setting", "value"], named),
        markdown_table([*headers, "compile full, s", "compile SPSA, s"], compiled),
    ]


def _markdown(results: Mapping[str, Any], k: int) -> str:
    """The report."""
    arguments, rows = results["arguments"], results["rows"]
    named = [[name, str(arguments[name])] for name in ("repetitions", "matmul_precision")]
    return page(
        {**results, "title": "The cost of a step: SPSA against the full gradient"},
        "A time is the median over several calls of a compiled program. The programs of a row take turns in one "
        "process. Images, labels and experts are random, of the size of the paper's data, with 10 classes.",
        markdown_table(["setting", "value"], named),
        "![the steps' times, by Eq. (9) and measured](cost.png)",
        "## The claims of section 4.1",
        EXPLANATION,
        markdown_table(*claim_table(claims(rows, k))),
        "The next table has the terms of Eq. (21), and T_full − T_SPSA as measured, for the first K and one direction. "
        "The networks are in the order of their parameters.",
        markdown_table(*growth_table(rows, k)),
        "## Time",
        "Eq. (9): T_full = (1 + γ)F + C_mix + D_α and T_SPSA = 2m (F + C_mix), from the parts measured below. The "
        "quartiles of the ratio over the repetitions are in brackets. Eq. (10) says whether SPSA is cheaper where m = "
        "1. For more directions that column compares the two times of Eq. (9). The last column is as measured. A row "
        "has no times where a program takes more memory than was free.",
        markdown_table(*_time_table(rows)),
        "On a CPU, XLA is slow at the gradient of depthwise kernels (`experiments/models/depthwise.py`). So "
        "MobileNetV2's γ is large there, and its ratio SPSA / full flatters SPSA.",
        "## Where T_SPSA differs from Eq. (9)",
        "The difference is a share of the prediction. One program: a blend and a forward pass in one program, against "
        "each in its own. Many probes: the 2m probes with their directions in one program, against each in its own. "
        "The rest: the update of the coefficients. Within a step, memory is used again that is new to each program "
        "that runs by itself. On a busy machine the quartiles above are wide.",
        markdown_table(*_excess_table(rows)),
        "## The parts",
        "F: the loss of a blended network in evaluation mode. γ: the backward pass over F, from the loss with its "
        "gradient for the network's variables. C_mix: one blend. D_α: the vjp of a blend for α, K inner products. "
        "Probe: a blend and its loss in one program. Estimate: the SPSA step without the update of the coefficients. "
        "Page faults are the pages of memory that the process is given in a call.",
        markdown_table(*_part_table(rows)),
        "## Memory and FLOPs",
        "Temporary memory is what a compiled step takes in addition to its arguments and results, as it runs here by "
        "default: one probe after another on a CPU, all probes vmapped on an accelerator. XLA counts the FLOPs of a "
        "loop's body once. So the FLOPs of SPSA are of the step with all probes vmapped, which is compiled and not "
        "run.",
        markdown_table(*size_table(rows)),
        *(tpu_blocks(results["tpu"]) if results["tpu"] is not None else []),
    )


def _time_table(rows: Rows) -> TableCells:
    """Measured times beside Eq. (9) and (10)."""
    headers = [*_SETTING, "T_full, ms", "T_SPSA, ms", "SPSA / full"]
    headers += ["T_full by (9)", "measured / it", "T_SPSA by (9)", "measured / it", "Eq. (10)", "cheaper"]
    table = []
    for row in rows:
        if (times := row["times"]) is None:
            table.append([*_setting(row), *["-"] * (len(headers) - len(_SETTING))])
            continue
        predicted, (low, high) = times["predicted"], times["quartiles"]
        table.append(
            [
                *_setting(row),
                *_measured(times),
                _milliseconds(predicted["full_step"]),
                f"{times['over_predicted']['full_step']:.2f}",
                _milliseconds(predicted["spsa_step"]),
                f"{times['over_predicted']['spsa_step']:.2f} [{low:.2f}, {high:.2f}]",
                "yes" if times["predicted_cheaper"] else "no",
                "yes" if times["cheaper"] else "no",
            ]
        )
    return headers, table


def _short_table(rows: Rows) -> TableCells:
    """What of it fits a terminal."""
    headers = [*_SETTING, "full, ms", "SPSA, ms", "SPSA / full", "SPSA / Eq. (9)"]
    return headers, [
        [*_setting(row), *_measured(row["times"]), f"{row['times']['over_predicted']['spsa_step']:.2f}"]
        for row in _timed(rows)
    ]


def _excess_table(rows: Rows) -> TableCells:
    """Where the SPSA step differs from Eq. (9), by the programs in between."""
    table = []
    for row in _timed(rows):
        excess, predicted = row["times"]["excess"], row["times"]["predicted"]["spsa_step"]
        shares = (sum(excess.values()), *excess.values())
        table.append([*_setting(row), *(f"{100 * share / predicted:+.0f} %" for share in shares)])
    return [*_SETTING, "difference", "one program", "many probes", "the rest"], table


def _part_table(rows: Rows) -> TableCells:
    """What Eq. (9) is made of."""
    names = ("blend", "inner_products", "probe", "estimate")
    # Page faults are the host's. If an accelerator computes, they say nothing about a step.
    faulty = {"forward": "faults of F", "spsa_step": "of SPSA"} if rows[0]["platform"] == "cpu" else {}
    table = []
    for row in _timed(rows):
        seconds, gamma = row["times"]["seconds"], row["times"]["backward_ratio"]
        others = (_milliseconds(seconds[name]) for name in names)
        faults = (f"{row['times']['page_faults'][name]:.0f}" for name in faulty)
        table.append([*_setting(row), _milliseconds(seconds["forward"]), f"{gamma:.2f}", *others, *faults])
    headers = ["F, ms", "γ", "C_mix, ms", "D_α, ms", "probe, ms", "estimate, ms", *faulty.values()]
    return [*_SETTING, *headers], table


def _sizes(row: Mapping[str, Any]) -> Iterable[str]:
    """Megabytes and GFLOP of the full step and of SPSA, and their ratios."""
    memory, flops = row["temporary_bytes"], row["flops"]
    for full, spsa, unit in (
        (memory["full_step"], memory["spsa_step"], 1e6),
        (flops["full_step"], flops["spsa_step_vmapped"], 1e9),
    ):
        # A TPU keeps the arrays of a small program in its core, and takes no other memory.
        ratio = f"{spsa / full:.3f}" if full else "-"
        yield from (f"{full / unit:.4g}", f"{spsa / unit:.4g}", ratio)


def _measured(times: Mapping[str, Any]) -> Iterable[str]:
    """Both steps, and their ratio."""
    yield from (_milliseconds(times["seconds"][name]) for name in ("full_step", "spsa_step"))
    yield f"{times['spsa_over_full']:.3f}"


def _timed(rows: Rows) -> Rows:
    """The rows that have times."""
    return [row for row in rows if row["times"] is not None]


def _setting(row: Mapping[str, Any]) -> list[str]:
    """A row's first cells."""
    return [row["network"], *(str(row[name]) for name in ("batch_size", "num_experts", "num_directions"))]


def _milliseconds(seconds: float) -> str:
    """Seconds in ms, to three digits."""
    return f"{1000 * seconds:#.3g}".removesuffix(".") if seconds < 1 else f"{1000 * seconds:.0f}"
