"""A prompt's text, its file, and the border at which it is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mambacus.data import wordproblems
from mambacus.data.prompts import qa_prompt
from mambacus.evals import math
from mambacus.models import load_tokenizer
from mambacus.prompts import DEFAULT, Exemplar, Prompt, read_prompt, write_prompt
from mambacus.prompts.prompt import STOPS, compile_tokens, encode, query_tokens
from mambacus.runtime.errors import UserError

EXEMPLARS = (Exemplar("1 + 1?", " 1 + 1 = 2\n#### 2"), Exemplar("2 + 2?", " #### 4", "b"))
SEPARATORS = ("\n\n", "\n", "\n\n\n", "\n###\n")


def test_the_default_is_what_solve_asks_and_training_shows() -> None:
    assert DEFAULT.text("Who? ") == qa_prompt("Who?") and DEFAULT.prefix == "Question:"
    assert STOPS == math.STOPS and DEFAULT.stops == math.STOPS


def test_the_text_is_instruction_examples_question() -> None:
    prompt = Prompt("Q: {question}\nA:", "Solve.", "\n##\n", EXEMPLARS)
    expected = "Solve.\n##\nQ: 1 + 1?\nA: 1 + 1 = 2\n#### 2\n##\nQ: 2 + 2?\nA: #### 4\n##\nQ: 3?\nA:"
    assert prompt.text("3?") == expected
    assert prompt.prefix == expected[: expected.rindex(" 3?")] and prompt.query("3?") == " 3?\nA:"
    assert prompt.preamble == expected[: expected.rindex("Q: 3?")] and prompt.framed(" 3? ") == "Q: 3?\nA:"
    assert DEFAULT.preamble == "" and DEFAULT.framed("3?") == DEFAULT.text("3?")


def test_a_frame_without_words_before_the_question_leaves_the_separator_to_the_query() -> None:
    prompt = Prompt("{question}\n=>", "", "\n\n", EXEMPLARS)
    assert prompt.prefix.endswith("#### 4") and prompt.query("3?") == "\n\n3?\n=>"
    assert "\n\n" in prompt.stops


def test_stops_hold_the_lead_of_the_next_question() -> None:
    assert "\nProblem:" in Prompt("Problem: {question}\nSolution:").stops


def test_a_prompt_file_is_read_back(tmp_path: Path) -> None:
    prompt = Prompt("Q: {question}\nA:", "Über\nzwei Zeilen", "\n", EXEMPLARS)
    write_prompt(tmp_path / "p.yaml", prompt, "two\nlines")
    assert (tmp_path / "p.yaml").read_text(encoding="utf-8").startswith("# two\n# lines\nquestion:")
    assert read_prompt(tmp_path / "p.yaml") == prompt


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"questoin": "{question}"}, "unknown key 'questoin', did you mean 'question'"),
        ({"question": "no slot"}, "expected {question} once"),
        ({"instruction": 3}, "instruction: expected a str, got 3"),
        ({"exemplars": [{"question": "x"}]}, "exemplar 1: expected question and completion"),
        ({"exemplars": [{"question": "x", "completion": 4}]}, "exemplar 1: completion: expected a text, got 4"),
    ],
)
def test_faults_of_a_file_are_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompt(tmp_path / "p.yaml")
    assert message.casefold() in str(error.value).casefold().replace("; did", ", did").replace(" (did", ", did")


@pytest.mark.parametrize("model", ["tiny", "random:130m"])
def test_both_borders_fall_between_tokens(model: str, data_dir: Path) -> None:
    tokenizer = load_tokenizer(model, data_dir=data_dir)
    problems = wordproblems.generate(12, "train", seed=4)
    for separator in SEPARATORS:
        for frame in ("Question: {question}\nAnswer:", "{question}\n", "Problem:\n{question}\n\nSolution:"):
            prompt = Prompt(frame, "Solve it.", separator, tuple(map(Exemplar.of, problems[:3])))
            ids = compile_tokens(prompt, tokenizer, [problem.question for problem in problems[3:]])
            assert tokenizer.decode(ids) == prompt.preamble
            prefix = encode(tokenizer, prompt.prefix)
            for problem in problems[3:]:
                assert query_tokens(prompt, prefix, tokenizer, problem.question) is not None
                whole = encode(tokenizer, prompt.preamble + prompt.framed(problem.question))
                assert whole == [*ids, *encode(tokenizer, prompt.framed(problem.question))]


def test_a_border_that_the_tokenizer_joins_is_refused() -> None:
    tokenizer = load_tokenizer("tiny")
    with pytest.raises(UserError, match="the tokenizer joins the end of the fixed part"):
        compile_tokens(Prompt(separator=" | ", exemplars=EXEMPLARS), tokenizer, ["Who?", "What?"])
    joined = Prompt("The wo{question}")
    assert query_tokens(joined, encode(tokenizer, joined.prefix), tokenizer, "rd is this.") is None


def test_nothing_before_the_question_is_no_token() -> None:
    assert compile_tokens(Prompt(), load_tokenizer("tiny"), ["Who?"]) == []
