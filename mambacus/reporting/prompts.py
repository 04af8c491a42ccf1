"""What prompt searches found: the prompts on the test with their paired comparisons, and what each search cost."""

from __future__ import annotations

from collections.abc import Sequence

from mambacus.reporting.formats import fixed, p_text, percent, reference
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table

_NAMES = {
    "default": "default prompt",
    "fewshot": "first examples",
    "optimised": "optimised prompt",
    "random": "best random prompt",
}


def prompt_table(sources: Sequence[Source]) -> Table:
    """One row per prompt confirmed on a test: accuracy, likelihood, the optimised prompt's gain over it, the cost."""
    body = []
    for source in of_kind(sources, "prompt"):
        results = source.record.results
        test, tokens = results["test"], results["search"]["tokens"]
        for name, figures in test["prompts"].items():
            against = test["optimised_against"].get(name)
            low, high = figures["wilson95"]
            row = [
                Cell(results["bench"], f"{source.label}{reference([source.number])}"),
                Cell(_NAMES.get(name, name), results["finals"]["chosen"] if name == "optimised" else ""),
                Cell(f"{test['n']:,}"),
                Cell(percent(figures["accuracy"]), f"{percent(low)} to {percent(high)}"),
            ]
            likelihood = fixed(figures["loglikelihood"], ".1f")
            if against is None:
                cost = Cell(
                    f"{tokens['forward']:,}", f"{fixed(tokens['times_fewer'], '.1f')} × fewer than without states"
                )
                row += [Cell("–"), Cell("–"), Cell(likelihood), cost]
            else:
                gain, ends = 100 * against["difference"], (100 * against["low"], 100 * against["high"])
                nats = [fixed(against["loglikelihood"][key], "+.2f") for key in ("difference", "low", "high")]
                row += [
                    Cell(f"{fixed(gain, '+.1f')} points", " to ".join(fixed(end, "+.1f") for end in ends)),
                    Cell(p_text(against["p"]), f"+{against['gained']} / −{against['lost']}"),
                    Cell(likelihood, f"optimised {nats[0]}, {nats[1]} to {nats[2]}"),
                    Cell(""),
                ]
            body.append(tuple(row))
    columns = (
        "Bench",
        "Prompt",
        "#Problems",
        "#Accuracy, 95 %",
        "#Optimised against it",
        "#p",
        "#Nats of a worked answer",
        "#Tokens of the search",
    )
    return Table("prompts", columns, tuple(body))
