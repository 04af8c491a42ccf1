"""The grader's table: awkward completions, what is extracted and by which rule, and whether it is right."""

from __future__ import annotations

import pytest

from mambacus.evals.answers import canonical, extract_letter, extract_number, first_answer, same_number

NUMBERS = [
    # completion, gold, extracted, reason, correct
    (" 3 + 4 = 7\n#### 7", "7", "7", "####", True),
    (" 3 + 4 = 7\n#### 7\n", "7", "7", "####", True),
    ("#### 29.00", "29", "29.00", "####", True),
    ("#### 29.50", "29", "29.50", "####", False),
    ("#### $1,234.50", "1234.5", "$1,234.50", "####", True),
    ("#### 1,234,567", "1234567", "1,234,567", "####", True),
    ("#### 12,34", "1234", "12", "####", False),
    ("#### 1/2", "0.5", "1/2", "####", True),
    ("#### 1 / 2", "0.5", "1 / 2", "####", True),
    ("#### -3", "-3", "-3", "####", True),
    ("#### −3", "-3", "−3", "####", True),
    ("#### - 3", "-3", "-3", "####", True),
    ("#### -3", "3", "-3", "####", False),
    ("#### -$5", "-5", "-$5", "####", True),
    ("#### $-5", "-5", "$-5", "####", True),
    ("#### 3 1/2", "3.5", "3 1/2", "####", True),
    ("#### 3 and 1/2", "3.5", "3 and 1/2", "####", True),
    ("#### -3 1/2", "-3.5", "-3 1/2", "####", True),
    ("#### 50%", "50", "50%", "####", True),
    ("#### 50%", "0.5", "50%", "####", True),
    ("#### 50 percent", "50", "50 percent", "####", True),
    ("#### 50%", "5", "50%", "####", False),
    ("#### 5 apples", "5", "5", "####", True),
    ("#### 5kg", "5", "5", "####", True),
    ("#### €20", "20", "€20", "####", True),
    ("#### 18.", "18", "18", "####", True),
    ("#### .5", "0.5", ".5", "####", True),
    ("#### $.50", "1/2", "$.50", "####", True),
    ("#### 007", "7", "007", "####", True),
    ("#### 0", "0", "0", "####", True),
    ("#### 1e3", "1000", "1e3", "####", True),
    ("#### **42**", "42", "42", "####", True),
    ("####42", "42", "42", "####", True),
    ("####\n42", "42", "42", "####", True),
    ("##### 42", "42", "42", "####", True),
    ("#### 5 + 3 = 8", "8", "8", "####", True),
    ("#### x = 5", "5", "5", "####", True),
    ("#### 0.333333", "1/3", "0.333333", "####", True),
    ("#### 0.33", "1/3", "0.33", "####", False),
    ("#### 12\n#### 13", "12", "12", "####", True),
    ("#### 7\n\nQuestion: Tom has 9 pens.\nAnswer: 9\n#### 9", "7", "7", "####", True),
    (" 3 + 4 = 7\n#### 7\nQuestion: Next?\nAnswer: #### 9", "9", "7", "####", False),
    ("He has 5.\n####", "5", None, "unparsed", False),
    ("#### none", "0", None, "unparsed", False),
    ("So 2 + 2 = 4. #### unknown", "4", None, "unparsed", False),
    ("The answer is 42.", "42", "42", "answer is", True),
    ("The answer is 42. Then 3 more.", "42", "42", "answer is", True),
    ("The final answer is: $1,000", "1000", "$1,000", "answer is", True),
    ("the answer is:\n42", "42", "42", "answer is", True),
    ("Answer: 42", "42", "42", "answer is", True),
    ("The answer is 3.14 meters.", "3.14", "3.14", "answer is", True),
    ("The answer is 5. No, the answer is 6.", "6", "6", "answer is", True),
    ("The answer is 5 + 3 = 8 apples", "8", "8", "answer is", True),
    ("The answer is twelve.", "12", None, "unparsed", False),
    ("The answer is 8, not 9.", "8", "8", "answer is", True),
    (r"So we get \boxed{12}.", "12", "12", "boxed", True),
    (r"So \boxed{\frac{1}{2}} it is, the answer is 3", "0.5", r"\frac{1}{2}", "boxed", True),
    (r"\boxed{5} then \boxed{6}", "6", "6", "boxed", True),
    (r"\boxed{x = 7}", "7", "7", "boxed", True),
    ("3 + 4 = 7 fruits in all.", "7", "7", "last number", True),
    ("He pays 5 dollars", "5", "5", "last number", True),
    ("10-3", "-3", "3", "last number", False),
    ("10 - 3 = 7", "7", "7", "last number", True),
    ("x = -3", "-3", "-3", "last number", True),
    ("It costs $5.00.", "5", "$5.00", "last number", True),
    ("7 dollars on the 2nd day", "7", "7", "last number", True),
    ("7 pens on the 21st", "7", "7", "last number", True),
    ("He drinks 5 bottles of H2O", "5", "5", "last number", True),
    ("So ... 12", "12", "12", "last number", True),
    ("well...12", "12", "12", "last number", True),
    (" 4\n\nQuestion: How many? 9", "4", "4", "last number", True),
    (" 4 Question: How many? 9", "4", "4", "last number", True),
    (" 4\nQ: How many? 9", "4", "4", "last number", True),
    ("Question: what is 4?", "4", None, "unparsed", False),
    ("I do not know.", "5", None, "unparsed", False),
    ("", "5", None, "unparsed", False),
    ("   \n", "5", None, "unparsed", False),
    ("between 3 and 5", "5", "5", "last number", True),
    ("100,000 people", "100000", "100,000", "last number", True),
    ("ratio 3/0", "3", "3/0", "last number", False),
]

OPTIONS = ["32400", "6000", "5(√3 + 1)", "60 km/h", "None of these"]
LETTERS = [
    ("#### C", "C", "####"),
    ("#### (c)", "C", "####"),
    ("#### c)", "C", "####"),
    ("#### B.", "B", "####"),
    ("#### 6000", "B", "option text"),
    ("#### 32,400", "A", "option text"),
    ("#### 5(√3 + 1)", "C", "option text"),
    ("The answer is D", "D", "answer is"),
    ("The answer is (b).", "B", "answer is"),
    ("The correct answer is option E", "E", "answer is"),
    ("Answer: A) 32400", "A", "answer is"),
    ("The answer is a train", None, "unparsed"),
    ("The answer is None of these.", "E", "option text"),
    ("The answer is F", None, "unparsed"),
    ("so (A) is wrong and (D) holds", "D", "last letter"),
    ("D", "D", "last letter"),
    ("A", "A", "last letter"),
    ("A train needs long.", None, "unparsed"),
    ("Correct choice: E\n\nQuestion: next (A)", "E", "last letter"),
    (r"\boxed{C}", "C", "boxed"),
    ("no idea", None, "unparsed"),
]


@pytest.mark.parametrize(("completion", "gold", "extracted", "reason", "correct"), NUMBERS)
def test_number_table(completion: str, gold: str, extracted: str | None, reason: str, correct: bool) -> None:
    found = extract_number(completion)
    assert (found.text, found.reason) == (extracted, reason)
    assert (found.text is not None and same_number(gold, found.text)) is correct


@pytest.mark.parametrize(("completion", "letter", "reason"), LETTERS)
def test_letter_table(completion: str, letter: str | None, reason: str) -> None:
    found = extract_letter(completion, OPTIONS)
    assert (found.text, found.reason) == (letter, reason)


def test_the_table_is_large_and_has_every_rule() -> None:
    assert len(NUMBERS) + len(LETTERS) >= 100
    assert {row[3] for row in NUMBERS} == {"####", "boxed", "answer is", "last number", "unparsed"}


def test_first_answer_keeps_text_without_a_new_question() -> None:
    assert first_answer("The question was hard. 5") == "The question was hard. 5"


def test_degenerate_completions_cost_nothing_and_earn_nothing() -> None:
    endless = "#### " + "9" * 6000
    found = extract_number(endless)
    assert found.text == "9" * 6000
    assert not same_number("9", found.text)
    assert extract_number("1," * 20_000).reason == "last number"
    assert extract_number("-" * 20_000).reason == "unparsed"


def test_canonical_counts_equal_numbers_as_one_vote() -> None:
    assert {canonical(text) for text in ("29", "29.00", "$29", "29.", "58/2")} == {"29"}
    assert canonical("3 1/2") == canonical("3.5") == "7/2"
    assert canonical("-3") != canonical("3")
    assert canonical(r"\frac{1}{2}") == r"\frac{1}{2}"
