"""The report of `experiments.studies.cost`: tables, a picture, and tables for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import Report, TableCells, claim_table, markdown_table, page, table_of
from experiments.studies.cost.cost_claims import EXPLANATION, claims, growth_table
from experiments.studies.cost.cost_figure import draw

Rows = Sequence[Mapping[str, Any]]

_SETTING = {"network": "{network}", "batch": "{batch_size}", "K": "{num_experts}", "m": "{num_directions}"}
_TIMES = {
    **_SETTING,
    "T_full, ms": "{ms[full_step]}",
    "T_SPSA, ms": "{ms[spsa_step]}",
    "SPSA / full": "{times[spsa_over_full]:.3f}",
}


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `experiments.studies.cost.__main__.main`."""
    arguments, rows, k = results["arguments"], results["rows"], results["arguments"]["num_experts"][0]
    named = [[name, str(arguments[name])] for name in ("repetitions", "matmul_precision")]
    markdown = page(
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
    tables = {
        "Time of a step": _short_table(rows),
        "The claims of section 4.1": claim_table(claims(rows, k)),
    }
    return Report(markdown, {"cost.png": draw(rows)}, tables)


def size_table(rows: Rows) -> TableCells:
    """Returns headers and cells: memory and FLOPs of the compiled steps.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure` or `experiments.studies.cost.tpu.compile_steps`.
    """
    table = []
    for row in rows:
        memory, flops = row["temporary_bytes"], row["flops"]
        fields = {
            "memory": {name: value / 1e6 for name, value in memory.items()},
            # A TPU keeps the arrays of a small program in its core, and takes no other memory.
            "memory_ratio": f"{memory['spsa_step'] / memory['full_step']:.3f}" if memory["full_step"] else "-",
            "gflop": {name: value / 1e9 for name, value in flops.items()},
            "flops_ratio": flops["spsa_step_vmapped"] / flops["full_step"],
        }
        table.append({**row, **fields})
    columns = {
        **_SETTING,
        "full, MB": "{memory[full_step]:.4g}",
        "SPSA, MB": "{memory[spsa_step]:.4g}",
        "MB, SPSA / full": "{memory_ratio}",
        "full, GFLOP": "{gflop[full_step]:.4g}",
        "SPSA, GFLOP": "{gflop[spsa_step_vmapped]:.4g}",
        "GFLOP, SPSA / full": "{flops_ratio:.3f}",
    }
    return table_of(table, columns)


def tpu_blocks(tpu: Mapping[str, Any]) -> list[str]:
    """Returns the part of the report on the programs for a TPU.

    Raises:
        LookupError, TypeError: if the file is not one of these.
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


def _time_table(rows: Rows) -> TableCells:
    """Measured times, compared with Eq. (9) and (10)."""
    columns = {
        **_TIMES,
        "T_full by (9)": "{by_9[full_step]}",
        "measured / T_full by (9)": "{times[over_predicted][full_step]:.2f}",
        "T_SPSA by (9)": "{by_9[spsa_step]}",
        "measured / T_SPSA by (9)": (
            "{times[over_predicted][spsa_step]:.2f} [{times[quartiles][0]:.2f}, {times[quartiles][1]:.2f}]"
        ),
        "Eq. (10)": "{said}",
        "cheaper": "{cheaper}",
    }
    untimed = [row for row in rows if row["times"] is None]
    headers, cells = table_of(_timed(rows), columns)
    return headers, cells + table_of(untimed, {**columns, **dict.fromkeys(headers[len(_SETTING) :], "-")})[1]


def _short_table(rows: Rows) -> TableCells:
    """The columns of `_time_table` that fit a terminal."""
    return table_of(_timed(rows), {**_TIMES, "T_SPSA / Eq. (9)": "{times[over_predicted][spsa_step]:.2f}"})


def _excess_table(rows: Rows) -> TableCells:
    """Returns where the SPSA step differs from Eq. (9), by the programs in between."""
    names = ("difference", "one program", "many probes", "the rest")
    return table_of(_timed(rows), {**_SETTING, **{name: f"{{percent[{name}]:+.0f}} %" for name in names}})


def _part_table(rows: Rows) -> TableCells:
    """The parts of Eq. (9)."""
    columns = {
        **_SETTING,
        "F, ms": "{ms[forward]}",
        "γ": "{times[backward_ratio]:.2f}",
        "C_mix, ms": "{ms[blend]}",
        "D_α, ms": "{ms[inner_products]}",
        "probe, ms": "{ms[probe]}",
        "estimate, ms": "{ms[estimate]}",
    }
    # Page faults are those of the host. If an accelerator computes, they say nothing about a step.
    if rows[0]["platform"] == "cpu":
        columns |= {"faults of F": "{times[page_faults][forward]:.0f}"}
        columns |= {"faults of SPSA": "{times[page_faults][spsa_step]:.0f}"}
    return table_of(_timed(rows), columns)


def _timed(rows: Rows) -> Iterable[Mapping[str, Any]]:
    """The rows that have times, with fields for the tables."""
    for row in rows:
        if (times := row["times"]) is not None:
            predicted = times["predicted"]
            excess = {"difference": sum(times["excess"].values()), **times["excess"]}
            yield {
                **row,
                "ms": {name: _milliseconds(seconds) for name, seconds in times["seconds"].items()},
                "by_9": {name: _milliseconds(seconds) for name, seconds in predicted.items()},
                "percent": {name: 100 * seconds / predicted["spsa_step"] for name, seconds in excess.items()},
                "said": "yes" if times["predicted_cheaper"] else "no",
                "cheaper": "yes" if times["cheaper"] else "no",
            }


def _milliseconds(seconds: float) -> str:
    """Seconds in ms, to three digits."""
    return f"{1000 * seconds:#.3g}".removesuffix(".") if seconds < 1 else f"{1000 * seconds:.0f}"
