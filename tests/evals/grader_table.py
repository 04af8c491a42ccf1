"""The grader's table: awkward completions, what is extracted and by which rule, and whether it is right.

Run as a script it prints docs/grading.md: the same rows beside the verdicts of lm_eval's two ``gsm8k`` filters.
"""

from __future__ import annotations

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
    # units, fractions, two answers, run-on text, LaTeX, what is no number
    ("#### 29.0 dollars", "29", "29.0", "####", True),
    ("#### USD 1,234.50", "1234.5", "1,234.50", "####", True),
    ("#### $ 15", "15", "15", "####", True),
    ("#### 1,234.5", "1234.50", "1,234.5", "####", True),
    ("#### +7", "7", "+7", "####", True),
    ("#### 7 (seven)", "7", "7", "####", True),
    ("#### about 7", "7", "7", "####", True),
    ("#### 7/1", "7", "7/1", "####", True),
    ("#### 14/2", "7", "14/2", "####", True),
    ("#### 2 1/3", "7/3", "2 1/3", "####", True),
    ("#### -1/2", "-0.5", "-1/2", "####", True),
    ("#### 0.50", "1/2", "0.50", "####", True),
    ("#### 1.5e3", "1500", "1.5e3", "####", True),
    ("#### 12.5%", "0.125", "12.5%", "####", True),
    ("#### 12.5 %", "12.5", "12.5 %", "####", True),
    ("#### 100%", "1", "100%", "####", True),
    ("#### 3:30", "3", "3", "####", True),
    ("#### 5 hours and 30 minutes", "5", "5", "####", True),
    ("#### 10-3", "10", "10", "####", True),
    ("#### = 9", "9", "9", "####", True),
    ("#### **$9**", "9", "$9", "####", True),
    ("#### `9`", "9", "9", "####", True),
    ("#### (9)", "9", "9", "####", True),
    ("#### 9!", "9", "9", "####", True),
    ("#### 9,", "9", "9", "####", True),
    ("#### 9;", "9", "9", "####", True),
    ("#### 9th", "9", None, "unparsed", False),
    ("#### ninety", "90", None, "unparsed", False),
    ("#### ????", "3", None, "unparsed", False),
    ("#### $", "3", None, "unparsed", False),
    ("#### 1 000", "1000", "1", "####", False),
    ("#### 10.000,5", "10000.5", "10.000", "####", False),
    ("Total: 5 + 3 = 8\n\n#### 8\n\nQ: and 9?", "8", "8", "####", True),
    ("so 12 - 4 = 8.\n#### 8.\nThe end 99", "8", "8", "####", True),
    ("#### 8 #### 9", "8", "8", "####", True),
    ("The answer is -3.", "-3", "-3", "answer is", True),
    ("The answer is −3", "-3", "−3", "answer is", True),
    ("The answer is $1,234.50.", "1234.5", "$1,234.50", "answer is", True),
    ("The answer is 3 1/2 hours.", "3.5", "3 1/2", "answer is", True),
    ("The answer is 1/2.", "0.5", "1/2", "answer is", True),
    ("The answer is 50%.", "50", "50%", "answer is", True),
    ("The answer is: **18**", "18", "18", "answer is", True),
    ("The final answer is 18 dollars per day.", "18", "18", "answer is", True),
    ("So the answer would be 18.", "18", "18", "answer is", True),
    ("answer = 18", "18", "18", "answer is", True),
    ("ANSWER: 18", "18", "18", "answer is", True),
    ("The answer is not 5 but 6", "6", "5", "answer is", False),
    ("The answer is unknown. 5", "5", None, "unparsed", False),
    ("Answers: 3 and 4", "4", "4", "last number", True),
    ("$\\boxed{-3}$", "-3", "-3", "boxed", True),
    ("\\boxed{1{,}234}", "1234", "1,234", "boxed", True),
    ("\\boxed{\\$12.50}", "12.5", "$12.50", "boxed", True),
    ("\\boxed{50\\%}", "50", "50", "boxed", True),
    ("\\boxed{\\dfrac{3}{4}}", "0.75", "\\dfrac{3}{4}", "boxed", True),
    ("\\boxed{3\\frac{1}{2}}", "3.5", "3\\frac{1}{2}", "boxed", True),
    ("\\boxed{-\\frac{1}{2}}", "-0.5", "-\\frac{1}{2}", "boxed", True),
    ("\\boxed{\\text{12 apples}}", "12", "12", "boxed", True),
    ("\\boxed{}", "0", None, "unparsed", False),
    ("\\boxed{12", "12", "12", "boxed", True),
    ("\\boxed{2^3}", "8", "2^3", "boxed", True),
    ("He has 12 apples. Each costs $3.", "3", "$3", "last number", True),
    ("That is 5, or 6 with tax.", "6", "6", "last number", True),
    ("It is 3.50", "3.5", "3.50", "last number", True),
    ("It takes 1,5 hours", "1.5", "1", "last number", False),
    ("10 / 4 = 2.5", "2.5", "2.5", "last number", True),
    ("5 x 3 = 15", "15", "15", "last number", True),
    ("3*4=12", "12", "12", "last number", True),
    ("-5 + 3 = -2", "-2", "-2", "last number", True),
    ("5 - 8 = -3.", "-3", "-3", "last number", True),
    ("we get 3/4", "0.75", "3/4", "last number", True),
    ("temperature of -12°C", "-12", "-12", "last number", True),
    ("It is room 101b", "101", "101", "last number", True),
    ("Version v2", "2", None, "unparsed", False),
    ("He was 1st", "1", None, "unparsed", False),
    ("1. First step\n2. Second step: 40", "40", "40", "last number", True),
    ("Step 1: 4\nStep 2: 8\n", "8", "8", "last number", True),
    ("the total is 8 .", "8", "8", "last number", True),
    ("the total is 8%", "8", "8%", "last number", True),
    ("9\n9\n9\n", "9", "9", "last number", True),
    ("9.9.9", "9", "9.9", "last number", False),
    ("٣", "3", "٣", "last number", True),
    ("½", "0.5", None, "unparsed", False),
    ("12\xa0000", "12000", "000", "last number", False),
    ("5\nProblem: what is 7?", "5", "5", "last number", True),
    ("5\n\nQ1: what is 7?", "5", "5", "last number", True),
    ("5 Question: 7", "5", "5", "last number", True),
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
    ("#### A", "A", "####"),
    ("#### **B**", "B", "####"),
    ("#### Option D", "D", "####"),
    ("#### E) None of these", "E", "####"),
    ("#### 60 km/h", "D", "option text"),
    ("#### 7", None, "unparsed"),
    ("The answer is (A) 32400.", "A", "answer is"),
    ("The answer is A or B", "A", "answer is"),
    ("answer: d", None, "unparsed"),
    (r"so \boxed{(B)}", "B", "boxed"),
    (r"\boxed{\text{E}}", "E", "boxed"),
    ("(A) no, (B) no, (C) yes", "C", "last letter"),
    ("I choose C.", "C", "last letter"),
    ("It's B!", "B", "last letter"),
    ("6000", "B", "option text"),
    ("#### B\n\nQuestion: next\n#### C", "B", "####"),
    ("", None, "unparsed"),
]


def lm_eval_verdicts(completion: str, gold: str) -> tuple[str, str]:
    """Return what lm_eval's ``strict-match`` and ``flexible-extract`` take, marked where it scores as right."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks._yaml_loader import load_yaml

    from mambacus.evals.catalogue import LOCAL_TASKS

    definition = load_yaml(LOCAL_TASKS / "gsm8k.yaml")
    options = {key: definition["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation")}
    found = []
    for filters in definition["filter_list"]:
        arguments = {key: value for key, value in filters["filter"][0].items() if key != "function"}
        (taken,) = RegexFilter(**arguments).apply([[completion]], [{}])
        score = exact_match_fn(
            references=[f"#### {gold}"], predictions=[taken[0]],
            regexes_to_ignore=definition["metric_list"][0]["regexes_to_ignore"], **options,
        )["exact_match"]  # fmt: skip
        found.append(f"{taken[0]}{' ✓' if score else ''}")
    return found[0], found[1]


def main() -> None:
    """Print docs/grading.md."""
    print(
        "# Grading, row by row\n\n"
        "Awkward completions, what each rule takes for the answer, and whether it counts as right (✓). Ours is\n"
        "`mambacus solve`'s ([how](evaluation.md)); the last two columns are lm_eval's `gsm8k` filters on it.\n"
        "Made from the test table by `python tests/evals/grader_table.py > docs/grading.md`.\n\n"
        "| completion | gold | ours | by | strict-match | flexible-extract |\n|---|---|---|---|---|---|"
    )
    for completion, gold, extracted, reason, correct in NUMBERS:
        strict, flexible = lm_eval_verdicts(completion, gold)
        ours = f"{'' if extracted is None else extracted}{' ✓' if correct else ''}"
        cells = (repr(completion)[1:-1], gold, ours, reason, strict, flexible)
        print("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")


if __name__ == "__main__":
    main()
