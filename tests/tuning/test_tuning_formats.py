"""Files, schemas, converters, decontamination and the token cache."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError
from mambacus.tuning.converters import CONVERTERS, converter_for, plain_number
from mambacus.tuning.data import Example, LeftOut, encode, encode_stream, iterate_examples, read_examples
from mambacus.tuning.overlap import OverlapFilter
from mambacus.tuning.packing import plan
from mambacus.tuning.prepare import DataSettings, prepare

ROWS = [{"question": "2 + 3?", "answer": "5", "solution": "2 + 3 = 5"}, {"question": "4 + 4?", "answer": "8"}]


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    wanted = read_examples(jsonl(tmp_path / "a.jsonl", *ROWS))
    (tmp_path / "a.csv").write_text('question,answer,solution\n"2 + 3?",5,2 + 3 = 5\n"4 + 4?",8,\n')
    (tmp_path / "a.tsv").write_text("question\tanswer\tsolution\n2 + 3?\t5\t2 + 3 = 5\n4 + 4?\t8\t\n")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.parquet"):
        assert read_examples(str(tmp_path / name)) == wanted, name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "question,answer\nq,5,6\n", "line 2: expected 2 columns, got 3"),
        ("a.csv", "question,answer\nq\n", "line 2: expected 2 columns, got 1"),
        ("a.csv", "question,question\nq,5\n", "a column name stands twice"),
        ("a.csv", 'question,answer\n"q,5\n', "not valid CSV"),
        ("a.csv", "question\nq\n", "line 2: missing key 'answer'"),
        ("a.csv", "", "no rows"),
        ("a.json", ' [\n{"question": "q", "answer": "1"}]', "got an array; put each element on a line"),
        ("a.parquet", "no parquet", "not a Parquet file"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_examples(str(tmp_path / name))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_long_text_in_a_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "word " * 60_000 + "\n")
    (example,) = read_examples(str(tmp_path / "a.csv"))
    assert len(example.completion) == 300_000


def test_prompt_and_completion_are_taken_as_they_are(tmp_path: Path) -> None:
    (example,) = read_examples(jsonl(tmp_path / "a.jsonl", {"prompt": "Translate: ", "completion": " oui\n"}))
    assert example == Example("Translate: ", " oui\n")


def test_each_turn_of_the_assistant_is_trained_on(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"), ("assistant", "6")]
    messages = [{"role": role, "content": content} for role, content in turns]
    source = jsonl(tmp_path / "a.jsonl", {"messages": messages})
    first, second = iterate_examples(source, tokenizer=byte_tokenizer())
    assert first.prompt == "<|system|>\nBe brief.\n<|user|>\n2 + 2?\n<|assistant|>\n"
    assert first.completion == "4\n"
    assert second.prompt == first.prompt + first.completion + "<|user|>\n3 + 3?\n<|assistant|>\n"
    tokenizer = byte_tokenizer()
    asks = "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}" + asks
    assert next(iterate_examples(source, tokenizer=tokenizer)).prompt == "[system]Be brief.[user]2 + 2?[assistant]"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "expected a list of role and content"),
        ([{"role": "user", "content": "hi"}], "no turn of the assistant"),
        ([{"role": "robot", "content": "hi"}], "message 1: role: expected one of system, user, assistant, tool"),
        ([{"role": "user", "content": None}], "leave messages whose content is null out"),
        ([{"role": "user"}], "message 1: expected role and content"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, messages: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        list(iterate_examples(jsonl(tmp_path / "a.jsonl", {"messages": messages}), tokenizer=byte_tokenizer()))
    assert "line 1" in str(error.value) and words in str(error.value)


def test_an_empty_turn_is_left_out_and_listed(tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", " ")]
    source = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": content} for role, content in turns]})
    prepared = prepare(DataSettings(source), byte_tokenizer())
    assert (prepared.counts["rows"], prepared.counts["kept"]) == (2, 1)
    assert prepared.counts["dropped"] == {"empty turn of the assistant": 1}
    assert prepared.listed[0]["row"].endswith("line 1")


def test_text_parts_are_joined(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "yes"}
    parts = [{"type": "text", "text": "2 + 2"}, {"type": "text", "text": "?"}]
    rows = [{"messages": [{"role": "user", "content": content}, answer]} for content in (parts, "2 + 2?")]
    one, other = read_examples_with(jsonl(tmp_path / "a.jsonl", *rows))
    assert one == other


def read_examples_with(source: str) -> list[Example]:
    return list(iterate_examples(source, tokenizer=byte_tokenizer()))


def test_conversations_of_another_form_are_told_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: conversations .* rename them to messages"):
        read_examples(jsonl(tmp_path / "a.jsonl", {"conversations": [{"from": "human", "value": "hi"}]}))


def test_running_text_is_cut_and_all_of_it_is_trained_on(tmp_path: Path) -> None:
    text = "abcdefghij" * 3
    samples, counts = encode(
        read_examples(jsonl(tmp_path / "a.jsonl", {"text": text})), byte_tokenizer(), max_length=12
    )
    assert [len(sample) for sample in samples] == [12, 12, 7]
    joined = np.concatenate([sample.ids for sample in samples])
    assert byte_tokenizer().decode(joined[:-1]) == text and joined[-1] == byte_tokenizer().eos_token_id
    assert {sample.trained_from for sample in samples} == {1}
    assert (counts["split"], counts["kept"], counts["dropped"]) == (1, 3, {})


@pytest.mark.parametrize(
    ("name", "row", "question", "solution", "answer"),
    [
        ("gsm8k", {"question": "q", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}, "q", "3*4=12", "1200"),
        ("orca-math", {"question": "q", "answer": "He has 3.\nSo $12.50."}, "q", "He has 3.\nSo $12.50.", "12.5"),
        ("metamath", {"query": "q", "response": "x = 4\n#### 4\nThe answer is: 4"}, "q", "x = 4", "4"),
        ("metamath", {"query": "q", "response": "So\nThe answer is: \\frac{1}{2}"}, "q", "So", "\\frac{1}{2}"),
        (
            "aqua",
            {"question": "q", "options": ["A)21", "B)21.5"], "rationale": "r", "correct": "B"},
            "q", "r", "B",
        ),
        (
            "mathqa",
            {"Problem": "q", "options": "a ) 38 , b ) 2.6 , c ) none , of these", "Rationale": '"r"', "correct": "c"},
            "q", "r", "C",
        ),
    ],
)  # fmt: skip
def test_converters_give_the_final_answer(name: str, row: Any, question: str, solution: str, answer: str) -> None:
    found = CONVERTERS[name](row)
    assert found is not None
    assert (found["question"], found["solution"], found["answer"]) == (question, solution, answer)
    assert converter_for("auto", "", row) == (name if name in ("metamath", "aqua", "mathqa") else "")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("He needs 3-5 apples.", None),
        ("He needs 3 to 5 apples.", None),
        ("So x=10-7.", None),
        ("So 10 - 7 = 3.", "3"),
        ("It is 1 3/4 cups.", None),
        ("It is 3/4 cups.", "3/4"),
        ("The ratio is 3:2.", None),
        ("The answer is 2.5 x 10^3", None),
        ("It took 2 hours and 30 minutes.", None),
        ("It took 5 hours 30 minutes.", None),
        ("It costs 2.5 million dollars.", None),
        ("It costs 5 dollars. Great!", None),
        ("It costs 5 dollars.", "5"),
        ("Thus x = -7.", "-7"),
        ("The answer is -7.", "-7"),
        ("The answer is $1,250.50.", "1250.5"),
        ("Therefore, 25% of 80 is 20.", "20"),
    ],
)
def test_a_final_answer_in_prose_is_read_or_left_out_but_not_guessed(said: str, answer: str | None) -> None:
    found = CONVERTERS["orca-math"]({"question": "q", "answer": f"First 2 + 2 = 4.\n{said}"})
    assert (found and found["answer"]) == answer


def test_options_keep_their_texts() -> None:
    row = {"Problem": "q", "options": "a ) rs . 400 , b ) 2 , 500 , c ) none", "Rationale": "r", "correct": "a"}
    found = CONVERTERS["mathqa"](row)
    assert found is not None and found["options"] == ["rs . 400", "2 , 500", "none"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gsm8k", {"question": "q", "answer": "twelve"}),
        ("gsm8k", {"question": "q", "answer": "so\n#### a dozen"}),
        ("orca-math", {"question": "q", "answer": "There are 3. That is many."}),
        ("orca-math", {"question": "q", "answer": ""}),
        ("metamath", {"query": "q", "response": "I do not know"}),
        ("aqua", {"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "E"}),
        ("mathqa", {"Problem": "q", "options": "", "Rationale": "r", "correct": "a"}),
    ],
)
def test_a_row_without_a_final_answer_is_dropped_and_listed(tmp_path: Path, name: str, row: Any) -> None:
    assert CONVERTERS[name](row) is None
    good = {
        "gsm8k": {"question": "q", "answer": "#### 4"},
        "orca-math": {"question": "q", "answer": "It is 4."},
        "metamath": {"query": "q", "response": "The answer is: 4"},
        "aqua": {"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "A"},
        "mathqa": {"Problem": "q", "options": "a ) 1 , b ) 2", "Rationale": "r", "correct": "a"},
    }[name]
    prepared = prepare(DataSettings(jsonl(tmp_path / "a.jsonl", row, good), convert=name), byte_tokenizer())
    assert (prepared.counts["rows"], prepared.counts["kept"]) == (2, 1)
    assert prepared.counts["dropped"] == {f"no final answer ({name})": 1}
    assert prepared.listed[0]["row"].endswith("line 1")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234", "1234"), ("$ 5.50", "5.5"), ("3/4", "3/4"), ("-7", "-7"), ("12 apples", "12"), ("x", None)],
)
def test_plain_numbers(text: str, number: str | None) -> None:
    assert plain_number(text) == number


def test_thirteen_shared_words_leave_a_row_out() -> None:
    test = "Tom has 3 apples and buys 4 more, then he gives 2 of them to his sister Ann."
    found = OverlapFilter([("svamp", test), ("asdiv", "How many legs have seven dogs?")])
    words = test.split()
    assert found.find("Well: " + " ".join(words[:13]).upper() + " so") == "svamp"
    assert found.find(" ".join([*words[:12], "XX", *words[13:]])) is None
    assert found.find("Question: how many LEGS have seven dogs? Answer:") == "asdiv"
    assert found.find("How many legs have six dogs?") is None


def test_overlapping_and_repeated_rows_are_counted_and_listed() -> None:
    asked = "one two three four five six seven eight nine ten eleven twelve thirteen"
    examples = [
        Example(*text, where=f"a.jsonl, line {line}") for line, text in ((2, "ab"), (5, "ab"), (9, (asked, " c")))
    ]
    for drop, kept in ((False, 2), (True, 1)):
        left_out, counts = LeftOut(), dict[str, Any]()
        samples = list(
            encode_stream(examples, byte_tokenizer(), counts, max_length=99, drop_duplicates=drop,
                          overlap=OverlapFilter([("gsm8k", asked)]), left_out=left_out)
        )  # fmt: skip
        assert len(samples) == kept
        assert counts["duplicates"] == 1
        assert counts["dropped"] == {"overlaps gsm8k": 1} | ({"repeated": 1} if drop else {})
        assert [entry["row"] for entry in left_out.listed] == ["a.jsonl, line 5", "a.jsonl, line 9"]


def test_no_word_problem_of_training_is_in_a_test_set() -> None:
    settings = DataSettings("wordproblems:200", against=("wordproblems",), max_length=2000)
    assert not any(reason.startswith("overlaps") for reason in prepare(settings, byte_tokenizer()).counts["dropped"])


def test_an_unknown_evaluation_set_is_named() -> None:
    with pytest.raises(UserError, match=r"--decontaminate-against: expected one of gsm8k.*got 'gsm9k'; did you mean"):
        prepare(DataSettings("wordproblems:5", against=("gsm9k",)), byte_tokenizer())


def test_the_cache_gives_what_was_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    plain = prepare(DataSettings("wordproblems:40", max_length=600), byte_tokenizer())
    first = prepare(DataSettings("wordproblems:40", max_length=600, cache=cache), byte_tokenizer())
    from mambacus.tuning import data

    def refuse(*arguments: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "_token_ids", refuse)
    again = prepare(DataSettings("wordproblems:40", max_length=600, cache=cache), byte_tokenizer())
    for found in (first, again):
        assert (found.counts, found.content, found.highest, found.lengths) == (
            plain.counts, plain.content, plain.highest, plain.lengths,
        )  # fmt: skip
        for one, other in zip(plain.samples, found.samples, strict=True):
            assert np.array_equal(one.ids, other.ids) and one.trained_from == other.trained_from
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(DataSettings("wordproblems:41", max_length=600, cache=cache), byte_tokenizer())
    assert len([*cache.iterdir()]) == 1  # what failed left nothing


@pytest.mark.parametrize("alike", [2, 1], ids=["dropped", "places"])
def test_the_cache_gives_no_other_files_counts(tmp_path: Path, alike: int) -> None:
    """Two files of equal examples, one with rows that no answer can be read from, or with one line more between."""
    good = [{"query": f"What is {n}?", "response": f"The answer is: {n}"} for n in (1, 2, 2)]
    bad = {"query": "bad one", "response": "no idea"}
    one, other = jsonl(tmp_path / "a.jsonl", *good), jsonl(tmp_path / "b.jsonl", *[bad] * alike, *good)
    cached = [prepare(DataSettings(source, cache=tmp_path / "cache"), byte_tokenizer()) for source in (one, other)]
    plain = [prepare(DataSettings(source), byte_tokenizer()) for source in (one, other)]
    assert [(found.counts, found.listed) for found in cached] == [(found.counts, found.listed) for found in plain]
    assert plain[0].counts["rows"] == 3 and plain[1].counts["rows"] == 3 + alike
    assert plain[1].listed[-1]["row"] == f"{other}, line {3 + alike}"


def test_the_cache_knows_the_texts_of_evaluation_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"How many of the {n} old dogs ran home today?", "answer": "1"} for n in (1, 2)]
    settings = DataSettings(jsonl(tmp_path / "a.jsonl", *rows), against=("gsm8k",), cache=tmp_path / "cache")
    for number in (1, 2):
        texts = [("gsm8k", f"How many of the {number} old dogs ran home today?")]
        monkeypatch.setattr("mambacus.tuning.prepare.evaluation_texts", lambda *a, texts=texts: texts)
        (listed,) = prepare(settings, byte_tokenizer()).listed
        assert listed["row"].endswith(f"line {number}")


def test_the_content_of_a_run_knows_from_where_samples_are_trained_on(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "abc", "completion": "def"})
    moved = jsonl(tmp_path / "b.jsonl", {"prompt": "ab", "completion": "cdef"})
    one, other = (prepare(DataSettings(path), byte_tokenizer()) for path in (source, moved))
    assert one.lengths == other.lengths and one.content != other.content


def test_rows_are_read_and_tokenised_as_they_are_needed(tmp_path: Path) -> None:
    """What lets a set be larger than memory: nothing runs to the end of its source before it gives the first sample."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": " x"}) + "\n" for n in range(500)) + "{\n")
    examples = iterate_examples(str(path))
    assert [next(examples).prompt for _ in range(100)] == [f"{n}:" for n in range(100)]
    with pytest.raises(UserError, match="line 501"):
        list(examples)
    endless = (Example(f"{n}:", " x") for n in itertools.count())
    assert len(next(encode_stream(endless, byte_tokenizer(), {}, max_length=64))) > 3


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache"):
        prepare(DataSettings("wordproblems:5", max_length=600, cache=tmp_path / "file"), byte_tokenizer())


def test_nearly_all_packed_tokens_are_real() -> None:
    lengths = prepare(DataSettings("wordproblems:512", max_length=2000), byte_tokenizer()).lengths
    for capacity in (2048, 4096):
        layout = plan(lengths, epochs=1, batch_size=128, grad_accum=1, capacity=capacity, seed=0)
        assert layout.efficiency >= 0.97
