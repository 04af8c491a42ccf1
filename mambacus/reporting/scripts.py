"""What the other scripts in ``benchmarks/`` measured: a server under load, tied merges, prompts as states."""

from __future__ import annotations

from collections.abc import Sequence

from mambacus.reporting.formats import duration, finite, fixed, milliseconds, percent, rate, size
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, make_table


def script_tables(sources: Sequence[Source]) -> tuple[Table, ...]:
    """Return the tables of the scripts' records."""
    return (
        soak_table(sources), tied_merge_table(sources), prompt_states_table(sources), arithmetic_table(sources),
        parity_table(sources),
    )  # fmt: skip


def soak_table(sources: Sequence[Source]) -> Table:
    """A server under mixed requests: one row a record."""
    body: list[list[Cell | str]] = []
    for source in of_kind(sources, "serve-soak"):
        found = source.record.results
        first, memory = found["first_token_seconds"], found["memory_bytes"]
        body.append([
            Cell(source.label, source.mark), duration(found["seconds"]),
            Cell(f"{found['requests']:,}", f"{found['kinds_of_request']:,} kinds"),
            f"{sum(found['errors'].values()):,}", f"{found['wrong_texts']:,}", rate(found["requests_per_second"]),
            rate(found["tokens_per_second"]),
            Cell(milliseconds(1000 * first["median"]), f"99 %: {milliseconds(1000 * first['p99'])}"),
            Cell(size(memory["peak"]), f"peak of the second quarter: {size(memory['second_quarter'])}"),
        ])  # fmt: skip
    columns = ("Model", "#Time", "#Requests", "#Errors", "#Wrong texts", "#Requests/s", "#Tokens/s", "#First token",
               "#Peak memory")  # fmt: skip
    about = "Mixed requests without pause; every text is held to what the engine writes alone."
    return make_table("serve-soak", columns, body, title="The server under load", about=about)


def tied_merge_table(sources: Sequence[Source]) -> Table:
    """An adapter on a tied embedding, before and after the merge: one row a side and stage."""
    body: list[list[Cell | str]] = [
        [
            Cell(row["side"], source.mark),
            row["stage"],
            fixed(row["answer_loss"], ".4f"),
            fixed(row["prose_perplexity"], ".2f"),
        ]
        for source in of_kind(sources, "tied-merge")
        for row in source.record.results["rows"]
    ]
    about = "An adapter on the tied embedding, merged by each side: a right merge changes neither figure."
    columns = ("Side", "Stage", "#Loss of the answers", "#Perplexity of prose")
    return make_table("tied-merge", columns, body, title="Merging into a tied embedding", about=about)


def prompt_states_table(sources: Sequence[Source]) -> Table:
    """Problems solved after prompts as text, compiled and tuned: one row a way."""
    body: list[list[Cell | str]] = []
    for source in of_kind(sources, "prompt-states"):
        for name, row in source.record.results["rows"].items():
            low, high = (100 * float(end) for end in row["wilson95"])
            body.append([
                Cell(name, source.mark),
                Cell(percent(row["accuracy"]), f"{fixed(low, '.1f')} to {fixed(high, '.1f')} %"),
                f"{row['correct']:,} of {row['n']:,}", f"{row['prompt_tokens_read']:,}",
            ])  # fmt: skip
    columns = ("Prompt", "#Accuracy, 95 %", "#Right", "#Prompt tokens read")
    return make_table("prompt-states", columns, body, title="Prompts as text and as states")


def arithmetic_table(sources: Sequence[Source]) -> Table:
    """States added and mixed: one row a mixture."""
    body: list[list[Cell | str]] = []
    for source in of_kind(sources, "state-arithmetic"):
        for name, row in source.record.results["rows"].items():
            error = finite(row["standard_error"])
            gain = fixed(row["gain_a_problem"], "+.2f").replace("-", "−")
            nats = fixed(row["nats_a_token"], ".3f").replace("-", "−")
            body.append([Cell(name, source.mark), nats, Cell(gain, f"standard error {error:.2f}" if error else "")])
    columns = ("State", "#Nats a token", "#Gain a problem, nats")
    return make_table("state-arithmetic", columns, body, title="Arithmetic of prompt states")


def parity_table(sources: Sequence[Source]) -> Table:
    """Every request of a task answered by both sides: one row a task and batch size."""
    body: list[list[Cell | str]] = [
        [
            Cell(row["task"], source.mark), f"{row['batch_size']:,}", f"{row['requests']:,}",
            fixed(row["worst_nats"] or None, ".1e"), fixed(row["worst_rolling"] or None, ".1e"),
            f"{row['greedy_differ'] + row['texts_differ']:,}", f"{row['metrics_differ']:,}",
            "yes" if row["held"] else "no",
        ]
        for source in of_kind(sources, "evaluation-parity")
        for row in source.record.results["rows"]
    ]  # fmt: skip
    columns = ("Task", "#Batch", "#Requests", "#Worst request, nats", "#Worst document, part", "#Other texts",
               "#Other metrics", "Within the bars")  # fmt: skip
    about = "The same requests to lm_eval's hf model and to ours, on one checkpoint in float32."
    return make_table("evaluation-parity", columns, body, title="The numbers of lm_eval", about=about)
