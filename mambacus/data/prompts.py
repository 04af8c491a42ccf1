"""The one prompt format: what a model is tuned on is byte for byte what it is asked with.

A training text is ``qa_prompt(question, options) + qa_completion(solution, answer)`` and the end-of-text token; an
evaluation stops after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

ANSWER_MARK = "####"
OPTION_LETTERS = "ABCDEFGHIJ"


def qa_prompt(question: str, options: Sequence[str] | None = None) -> str:
    """Return ``Question: <question>`` and, on the next line, ``Answer:`` without a trailing space.

    Args:
        question: the text put to the model.
        options: the choices of a multiple-choice question, at most ten; they stand on a line of their own between the
            two, as ``Answer Choices: (A) <first> (B) <second>``.
    """
    listed = ""
    if options:
        choices = zip(OPTION_LETTERS[: len(options)], options, strict=True)
        listed = "\nAnswer Choices: " + " ".join(f"({letter}) {text}" for letter, text in choices)
    return f"Question: {question.strip()}{listed}\nAnswer:"


def qa_completion(solution: str | None, answer: str) -> str:
    """Return what follows the prompt: a space, the worked solution and, on its own line, ``#### <answer>``.

    A solution whose last line is an answer line already is left as it is; without one the answer line stands alone.

    Args:
        solution: worked text or None.
        answer: the final answer.
    """
    body = (solution or "").strip()
    if not body:
        return f" {ANSWER_MARK} {answer.strip()}"
    if body.rsplit("\n", 1)[-1].startswith(ANSWER_MARK):
        return f" {body}"
    return f" {body}\n{ANSWER_MARK} {answer.strip()}"
