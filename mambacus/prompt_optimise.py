"""``mambacus prompt optimise``: search a prompt for a model and a bench, and confirm it on the bench's test split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file, fingerprint, items_path
from mambacus.runtime.records import Record, Stopwatch, write_jsonl_atomic, write_record

if TYPE_CHECKING:
    from mambacus.data.problems import MathProblem
    from mambacus.prompts import Prompt
    from mambacus.prompts.journal import Journal
    from mambacus.prompts.judge import PromptJudge
    from mambacus.prompts.space import Space

_WORDPROBLEM_SEED = 1_000_003  # added to --seed: other problems than fine-tuning draws by default
_NOT_IDENTITY = ("out", "resume", "overwrite", "budget", "test_limit", "device", "batch_size", "state_memory")


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus prompt optimise``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE (Mamba)", metavar="M")
    bench: str = opt(help="a bench of solve: wordproblems, gsm8k, aqua ...", metavar="B")
    out: Path = opt(
        help="prompt file to write; beside it <stem>.json (record), .items.jsonl and .journal.jsonl",
        metavar="FILE.yaml",
    )
    adapter: Path | None = opt(None, "folder of a PEFT adapter to attach", metavar="DIR")
    train: str | None = opt(None, "set whose training split is searched on; default: the bench's own", metavar="SET")
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")
    space: Path | None = opt(None, "YAML file that adds to the built-in space of prompts", metavar="FILE.yaml")
    shots: tuple[int, ...] = opt(
        (), "numbers of worked examples that a prompt may show; default: those of the space", least=0, metavar="K,K"
    )
    items: int = opt(64, "training problems that prompts are scored on", least=2)
    pool: int = opt(64, "other training problems, which worked examples are taken from", least=0)
    population: int = opt(24, "prompts of a round", least=2)
    rounds: int = opt(3, "rounds of successive halving", least=1)
    first: int = opt(8, "problems of the first rung of a round", least=1)
    eta: int = opt(2, "of so many prompts one goes on, to so many times the problems", least=2)
    parents: int = opt(4, "prompts whose edits make the next round", least=1)
    score: str = opt(
        "accuracy",
        "what prompts are ranked by: right greedy answers, or the log-likelihood of the worked answers",
        choices=("accuracy", "loglikelihood"),
    )
    finalists: int = opt(4, "best prompts that then compete with the default on fresh training problems", least=1)
    fresh: int = opt(128, "those training problems", least=2)
    random_prompts: int = opt(16, "random prompts, the best of which is the rival on test; 0: none", least=0)
    budget: int | None = opt(None, "most forward tokens of the search", least=1, metavar="TOKENS")
    test_limit: int | None = opt(None, "problems of the test; default: all", least=1, metavar="N")
    max_new_tokens: int = opt(128, "longest completion in tokens", least=1)
    batch_size: int = opt(32, "rows of one pass", least=1)
    state_reuse: bool = opt(True, "read a prefix once and fork its state; off, for comparison")
    state_memory: int = opt(1024, "most MiB of states held at once", least=1, metavar="MIB")
    proposer: str | None = opt(
        None, "OpenAI-compatible endpoint that proposes instructions; off by default", metavar="URL"
    )
    proposer_model: str = opt("", "name of the model there; the key is read from OPENAI_API_KEY", metavar="NAME")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    seed: int = opt(0, "seed of problems, drawing and editing", least=0, most=MOST_SEED - _WORDPROBLEM_SEED)
    resume: bool = opt(False, "continue a search that was interrupted")
    overwrite: bool = opt(False, "replace an existing prompt, record and journal")


def run(config: Config) -> Record:
    """Search, choose, confirm; write the prompt file, the record, its items and the journal.

    Returns:
        A record of kind ``prompt``; docs/prompts.md lists its ``results``.

    Raises:
        UserError: unknown bench, set or model, missing data, a broken space or journal, an output that exists.
    """
    _check(config)
    watch = Stopwatch()
    from mambacus.evals.math import load_problems
    from mambacus.prompts import DEFAULT, Exemplar, Prompt, write_prompt
    from mambacus.prompts.contest import confirm, finals, random_best
    from mambacus.prompts.space import load_space

    trained = _train_problems(config)
    test = load_problems(config.bench, config.data_dir, config.test_limit, 0)
    used = config.items + config.fresh
    space = load_space(config.space, [Exemplar.of(problem) for problem in trained[used:]], shots=config.shots)
    journal, judges = _judges(config, trained[: config.items], trained[config.items : used], test, space)
    rivals = {"default": DEFAULT}
    if min(space.shots):  # what a harness would ask with: the first examples, in order
        rivals["fewshot"] = Prompt(exemplars=space.pool[: max(space.shots)])
    search = _search(config, space, judges["train"], journal, [*rivals.values()])
    best = [standing.prompt for standing in search.pop("standings") if standing.prompt != DEFAULT]
    decided, chosen = finals(judges["fresh"], best[: config.finalists], by_likelihood=config.score == "loglikelihood")
    rivals["optimised"] = chosen
    drawn = random_best(judges["random"], space, config.random_prompts, config.items, config.seed)
    if drawn:
        rivals["random"] = drawn.pop("prompt")
    confirmed, items = confirm(judges["test"], rivals)
    results = {
        "bench": config.bench,
        "train": {
            "set": config.train or config.bench,
            "items": config.items,
            "fresh": config.fresh,
            "pool": len(space.pool),
            "shots": list(space.shots),
        },
        "search": search,
        "finals": decided,
        "random": drawn,
        "test": confirmed,
        "prompt": chosen.as_dict(),
    }
    write_prompt(config.out, chosen, _comment(config, results))
    path = items_path(config.out)
    write_jsonl_atomic(path, items)
    record = watch.record("prompt", _label(config), config, results, items_file=path.name)
    write_record(config.out.with_suffix(".json"), record)
    return record


def _check(config: Config) -> None:
    check(config)
    if config.out.suffix in (".json", ".jsonl"):
        raise UserError(f"--out {config.out}: expected a name ending in .yaml; the record is the .json beside it")
    if max(config.shots, default=0) > config.pool:
        raise UserError(f"--shots {max(config.shots)}: expected at most --pool, {config.pool}")
    if config.first > config.items:
        raise UserError(f"--first {config.first}: expected at most --items, {config.items}")
    if config.proposer and not config.proposer.startswith(("http://", "https://")):
        raise UserError(
            f"--proposer: expected an address that begins with http:// or https://, got {config.proposer!r}"
        )
    if config.proposer and not config.proposer_model:
        raise UserError("--proposer: expected --proposer-model NAME with it")
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    for path in (config.out, config.out.with_suffix(".json")):
        claim_file(path, overwrite=config.overwrite or config.resume)


def _train_problems(config: Config) -> list[MathProblem]:
    """Return the problems prompts are scored on, those of the finals, then those worked examples are taken from."""
    from mambacus.data import wordproblems
    from mambacus.data.sources import MATH_SPLITS, load_math
    from mambacus.evals.math import BENCHES

    name = config.train or (BENCHES[config.bench].source or config.bench if config.bench in BENCHES else config.bench)
    wanted = config.items + config.fresh + config.pool
    if name == "wordproblems":
        return [*wordproblems.generate(wanted, "train", config.seed + _WORDPROBLEM_SEED)]
    split = next((split for split in MATH_SPLITS.get(name, ()) if split.startswith("train")), None)
    if name in MATH_SPLITS and split is None:
        raise UserError(f"--bench {config.bench}: {name} has no training split; name a set that has one with --train")
    problems = [p for p in load_math(config.data_dir, name, split or "train") if p.solution]
    if len(problems) < wanted:
        raise UserError(
            f"--items, --fresh and --pool: expected at most {len(problems)} together, the problems of {name} {split}"
        )
    return random.Random(f"prompts/{config.seed}").sample(problems, wanted)


def _judges(
    config: Config,
    train: Sequence[MathProblem],
    fresh: Sequence[MathProblem],
    test: Sequence[MathProblem],
    space: Space,
) -> tuple[Journal, dict[str, PromptJudge]]:
    """Return the journal, and one judge for each purpose, so that each has its own count of tokens."""
    from mambacus.evals import math
    from mambacus.evals.scoring import Counts, Scorer
    from mambacus.models import load
    from mambacus.models.signature import signature
    from mambacus.models.state_files import tokenizer_fingerprint
    from mambacus.prompts.journal import Journal
    from mambacus.prompts.judge import PromptJudge
    from mambacus.runtime.device import resolve_device, resolve_dtype

    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    model, tokenizer = load(config.model, device, dtype, config.adapter, data_dir=config.data_dir)
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    settings = dataclasses.asdict(config)
    identity = {key: value for key, value in settings.items() if key not in _NOT_IDENTITY}
    identity |= {
        "weights": fingerprint(signature(model)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "space": fingerprint(dataclasses.asdict(space)),
        "problems": fingerprint([problem.question for problem in (*train, *fresh)]),
    }
    path = config.out.with_suffix(".journal.jsonl")
    if config.overwrite:
        path.unlink(missing_ok=True)
    journal = Journal(path, identity, resume=config.resume)

    def loglikelihoods(reader: Any, pairs: Sequence[Any]) -> list[float]:
        scorer = Scorer(reader, config.batch_size, False, Counts())
        return [score.loglikelihood for score in scorer.score(pairs)]

    def judge(name: str, problems: Sequence[MathProblem], budget: int | None = None) -> PromptJudge:
        return PromptJudge(
            model, tokenizer, problems,
            loglikelihoods=loglikelihoods,
            grade=lambda problem, text: math.grade(problem, text, "cot").correct,
            score=config.score, journal=journal, name=name, batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens, state_reuse=config.state_reuse, budget=budget,
            state_bytes=config.state_memory * 2**20,
        )  # fmt: skip

    tested = f"test {fingerprint([problem.question for problem in test])}"
    return journal, {
        "train": judge("train", train, config.budget), "random": judge("train", train),
        "fresh": judge("fresh", fresh), "test": judge(tested, test),
    }  # fmt: skip


def _search(
    config: Config, space: Space, judge: PromptJudge, journal: Journal, first: Sequence[Prompt]
) -> dict[str, Any]:
    from mambacus.prompts.board import LEADERS, Board, summary
    from mambacus.prompts.proposer import KeptProposals, Proposer
    from mambacus.prompts.search import Search, Settings

    settings = Settings(
        config.population, config.rounds, config.first, config.items, config.eta, config.parents, config.seed
    )
    propose = KeptProposals(Proposer(config.proposer, config.proposer_model), journal) if config.proposer else None
    with Board(config.rounds, lambda: judge.tokens.forward) as board:
        outcome = Search(space, judge, settings, board.tell, propose, first).run()
    if not outcome.standings:
        raise UserError(f"--budget {config.budget}: too few tokens for the default prompt on {config.first} problems")
    return {
        "standings": outcome.standings,
        "tried": outcome.tried,
        "ended": outcome.ended,
        "tokens": judge.tokens.as_dict(),
        "rungs": [
            {
                "round": rung.round, "rung": rung.rung, "items": rung.items, "prompts": rung.prompts,
                "leaders": [
                    {"mean": s.mean, "from": s.origin, "prompt": summary(s.prompt)} for s in rung.standings[:LEADERS]
                ],
            }
            for rung in outcome.rungs
        ],
    }  # fmt: skip


def _label(config: Config) -> str:
    name = Path(config.model).name
    return f"{name} + {config.adapter.name}" if config.adapter else name


def _comment(config: Config, results: dict[str, Any]) -> str:
    test = results["test"]
    shares = ", ".join(f"{name} {figures['accuracy']:.1%}" for name, figures in test["prompts"].items())
    return f"mambacus prompt optimise: {_label(config)} on {config.bench}\ntest, {test['n']} problems: {shares}"


def main(argv: Sequence[str]) -> None:
    """Run ``mambacus prompt optimise``."""
    config = parse(Config, argv, "mambacus prompt optimise", "Search a prompt and confirm it on the test split.")
    results = run(config).results
    search, test = results["search"], results["test"]
    tokens = search["tokens"]
    print(f"tried {search['tried']} prompts with {tokens['forward']:,} tokens, {tokens['times_fewer']:.1f} x fewer")
    print(f"than without states; then {results['finals']['reason']}:")
    print(f"  {results['finals']['chosen']}")
    if tokens["unaligned"]:
        print(f"{tokens['unaligned']} questions, which the tokenizer joins with the end of a prefix, were read whole")
    for name, figures in test["prompts"].items():
        low, high = figures["wilson95"]
        print(f"test {name:<10} {figures['accuracy']:6.1%} [{low:.1%}, {high:.1%}]  n {test['n']}")
    for name, row in test["optimised_against"].items():
        change = f"{100 * row['difference']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        nats = row["loglikelihood"]
        likelier = f"{nats['difference']:+.2f} nats a worked answer [{nats['low']:+.2f}, {nats['high']:+.2f}]"
        print(f"optimised against {name}: {change}, p {row['p']:.2g}; {likelier}")
    print(f"prompt: {config.out}   record: {config.out.with_suffix('.json')}")
