"""A conversation as a state: the answers of the plain prompt, for the price of what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.chat_template import ChatTemplate, load_template
from mambacus.inference.conversation import Conversation, Turn
from mambacus.models import MambaLM, load
from mambacus.models.state_files import StateFile, read_state, write_state
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError

PLAIN = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
QUESTIONS = ("How many apples?", "And pears?", "More.", "Naïve café 東京?")
LETTERS = "abcdefghijklmnopqrstuvwxyz,.?"


def sampling(**changes: Any) -> SamplingParams:
    """Return parameters under which the model says letters, so that texts and tokens are the same thing."""
    allowed = set(byte_tokenizer()(LETTERS)["input_ids"])
    bias = {token: -1000.0 for token in range(257) if token not in allowed} | changes.pop("logit_bias", {})
    return SamplingParams(**{"max_new_tokens": 9, "ignore_eos": True, "logit_bias": bias, **changes})


PARAMS = sampling()


def say(conversation: Conversation, question: str, params: SamplingParams = PARAMS) -> str:
    return "".join(conversation.ask(question, params))


@pytest.fixture
def talk(model: MambaLM, tokenizer: Any) -> Conversation:
    return Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, PLAIN), "Be brief.")


def plain(model: MambaLM, tokenizer: Any, conversation: Conversation, question: str, template: str = PLAIN) -> str:
    """What the whole conversation, read anew, is answered with."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    text = ChatTemplate(tokenizer, template).prompt(messages)
    return Engine(model, tokenizer).generate([text], PARAMS)[0][0].text


def test_a_turn_reads_its_new_tokens_and_answers_as_the_whole(
    model: MambaLM, tokenizer: Any, talk: Conversation
) -> None:
    for number, question in enumerate(QUESTIONS):
        expected, before = plain(model, tokenizer, talk, question), talk.engine.stats.prompt_tokens
        assert say(talk, question) == expected
        new = len(f"\nuser:{question}\nassistant:".encode())
        turn = talk.turns[-1]
        # a byte a token: the answer's last token, chosen but not read yet, and the new text
        assert turn.read == talk.engine.stats.prompt_tokens - before == (new + 1 if number else 16 + new - 1 + 1)
        assert turn.again == 0 and turn.generated == 9 and turn.finish_reason == "length"
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 4]
    assert talk.nbytes == talk._places[0].state.nbytes and talk.tokens == len(talk._places[0].token_ids)


def test_an_answer_may_end_at_a_stop_string_or_the_end_of_the_text(
    model: MambaLM, tokenizer: Any, talk: Conversation
) -> None:
    whole = say(talk, QUESTIONS[0])
    talk.reset()
    stop = whole[3:5]
    cut = say(talk, QUESTIONS[0], sampling(stop=[stop]))
    assert cut == whole[: whole.index(stop)] and talk.turns[-1].finish_reason == "stop"
    assert say(talk, QUESTIONS[1]) == plain(model, tokenizer, _shortened(talk), QUESTIONS[1])
    assert talk.turns[-1].again == 4  # the first letter of the stop string was read, so the answer is read again
    ends = sampling(ignore_eos=False, logit_bias={0: 1000})
    assert say(talk, QUESTIONS[2], ends) == "" and talk.turns[-1].finish_reason == "eos"
    assert talk.messages[-1] == {"role": "assistant", "content": ""}
    expected = plain(model, tokenizer, talk, QUESTIONS[3])
    assert say(talk, QUESTIONS[3]) == expected and talk.turns[-1].again == 0


def test_a_saved_conversation_has_read_what_was_said_and_not_the_stop_string(
    model: MambaLM, tokenizer: Any, talk: Conversation, tmp_path: Path
) -> None:
    whole = say(talk, QUESTIONS[0])
    talk.reset()
    cut = say(talk, QUESTIONS[0], sampling(stop=[whole[3:6]]))
    talk.save(tmp_path / "talk.state")
    file = read_state(tmp_path / "talk.state", model, tokenizer)
    assert tokenizer.decode(file.token_ids) == f"system:Be brief.\nuser:{QUESTIONS[0]}\nassistant:{cut}"
    assert (file.state.ssm_state - talk.engine.prefill(file.token_ids).ssm_state).abs().max() < 1e-4
    other = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, PLAIN))
    other.load(tmp_path / "talk.state", "--state")
    assert say(other, QUESTIONS[1]) == say(talk, QUESTIONS[1]) and other.turns[-1].again == 0


def _shortened(conversation: Conversation) -> Any:
    """The conversation without its last question and answer."""
    import types

    return types.SimpleNamespace(messages=conversation.messages[:-2])


@pytest.mark.parametrize(
    "template", [PLAIN.replace("']:", "'] }}: {{ '"), PLAIN.replace("m['content']", "m['content'] | trim")]
)
def test_templates_with_another_opinion_on_spaces(model: MambaLM, tokenizer: Any, template: str) -> None:
    talk = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, template))
    for question in QUESTIONS:
        say(talk, question)
        assert talk.turns[-1].again <= 9
        messages = talk.messages[:-1]
        expected = Engine(model, tokenizer).generate([ChatTemplate(tokenizer, template).prompt(messages)], PARAMS)
        assert talk.messages[-1]["content"] == expected[0][0].text


def test_a_space_that_the_template_puts_itself_is_not_put_twice(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    talk = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, spaced))
    monkeypatch.setattr(model, "forward", saying(tokenizer(" yes,")["input_ids"], model.forward))
    for question in QUESTIONS[:3]:
        assert say(talk, question, SamplingParams(max_new_tokens=9)) == " yes, yes"
        assert talk.turns[-1].again == 0
    assert [message["content"] for message in talk.messages[1::2]] == ["yes, yes", "yes, yes", " yes, yes"]


def saying(ids: list[int], forward: Any) -> Any:
    """Return a model's forward pass with the logits of one that says ``ids`` over and over."""
    said = 0

    def scripted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal said
        said = 0 if input_ids.shape[1] > 1 else said + 1
        out = forward(input_ids, **kwargs)
        return out._replace(
            logits=torch.nn.functional.one_hot(torch.tensor(ids[said % len(ids)]), 257) * 2000.0 + 0 * out.logits
        )

    return scripted


def test_a_template_that_forgets_costs_the_whole_conversation(model: MambaLM, tokenizer: Any) -> None:
    last = "{% for m in messages[-1:] %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
    talk = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, last))
    say(talk, "One, two")
    before = talk.tokens
    expected = plain(model, tokenizer, talk, "three", last)
    assert say(talk, "three") == expected
    assert talk.turns[-1].read == len("user:three\nassistant:") == talk.turns[-1].again < before


def test_a_stopped_answer_stays_as_far_as_it_came(model: MambaLM, tokenizer: Any, talk: Conversation) -> None:
    say(talk, QUESTIONS[0])
    pieces = []
    for piece in talk.ask(QUESTIONS[1], sampling(max_new_tokens=500)):
        pieces.append(piece)
        if len(pieces) == 5:
            talk.stop()
    assert talk.turns[-1].finish_reason == "cancelled" and talk.turns[-1].generated < 8
    assert talk.messages[-1]["content"] == "".join(pieces)
    expected = plain(model, tokenizer, talk, QUESTIONS[2])
    assert say(talk, QUESTIONS[2]) == expected
    said = list(talk.messages)
    for _ in talk.ask(QUESTIONS[3], PARAMS):
        break  # the listener leaves: nothing was said
    assert talk.messages == said
    assert say(talk, QUESTIONS[3]) == plain(model, tokenizer, _shortened(talk), QUESTIONS[3])


def test_a_question_given_up_while_it_is_read_was_not_asked(model: MambaLM, tokenizer: Any) -> None:
    talk = Conversation(Engine(model, tokenizer, prefill_tokens=8), ChatTemplate(tokenizer, PLAIN))
    talk.engine.on_read = lambda _: talk.stop()
    assert say(talk, "A long question, " * 20) == ""
    assert talk.messages == [] and talk.turns == [] and talk.engine.stats.prompt_tokens == 8
    talk.engine.on_read = None
    expected = plain(model, tokenizer, talk, "Well?")
    assert say(talk, "Well?") == expected


def test_a_saved_conversation_goes_on_where_it_ended(
    model: MambaLM, tokenizer: Any, talk: Conversation, tmp_path: Path
) -> None:
    for question in QUESTIONS[:2]:
        say(talk, question)
    talk.save(tmp_path / "s")
    other = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, PLAIN))
    other.load(tmp_path / "s", "/load")
    assert other.messages == talk.messages and other.tokens == talk.tokens
    assert say(other, QUESTIONS[2]) == say(talk, QUESTIONS[2])
    assert other.turns[-1] == talk.turns[-1] and other.turns[-1].again == 0
    other.reset()
    assert other.messages == [] and other.tokens == 0
    with pytest.raises(UserError, match="nothing to save"):
        other.save(tmp_path / "t")
    stranger = Conversation(Engine(*load("random:micro")), ChatTemplate(tokenizer, PLAIN))
    with pytest.raises(UserError, match=r"/load .*of another model"):
        stranger.load(tmp_path / "s", "/load")


def test_a_conversation_may_begin_from_a_compiled_prompt(model: MambaLM, tokenizer: Any, tmp_path: Path) -> None:
    engine = Engine(model, tokenizer)
    prefix = "You add numbers.\n"
    ids = tuple(engine.encode(prefix))
    write_state(tmp_path / "p", StateFile(engine.prefill(prefix), ids), model, tokenizer)
    talk = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, PLAIN))
    talk.load(tmp_path / "p", "--state")
    for question in QUESTIONS[:2]:
        expected = plain(model, tokenizer, talk, question, prefix.replace("\n", "\\n").join(('{{ "', '" }}')) + PLAIN)
        assert say(talk, question) == expected
    assert talk.turns[0] == Turn(len(f"user:{QUESTIONS[0]}\nassistant:"), 0, 9, "length")
    talk.save(tmp_path / "s")
    talk.reset()
    assert talk.tokens == 0 and say(talk, QUESTIONS[0])
    talk.load(tmp_path / "s", "/load")
    assert len(talk.messages) == 4 and talk.messages[2]["content"] == QUESTIONS[1]
    with pytest.raises(UserError, match="not in its file"):
        talk.reset()
    changed = Conversation(Engine(model, tokenizer), ChatTemplate(tokenizer, PLAIN.replace(":", "=")))
    changed.load(tmp_path / "s", "/load")
    with pytest.raises(UserError, match="writes this conversation otherwise"):
        say(changed, "Well?")


def test_penalties_know_the_whole_conversation(model: MambaLM, tokenizer: Any, talk: Conversation) -> None:
    params = sampling(max_new_tokens=6, repetition_penalty=1.5)
    for question in QUESTIONS[:2]:
        messages = [*talk.messages, {"role": "user", "content": question}]
        whole = ChatTemplate(tokenizer, PLAIN).prompt(messages)
        assert say(talk, question, params) == Engine(model, tokenizer).generate([whole], params)[0][0].text


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{% for %}", "line 1"), (b"\xff", "not UTF-8"), (None, "No such file")],
)
def test_template_files_that_are_none(content: bytes | None, message: str, tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=f"--chat-template .*t.*{message}"):
        load_template(tokenizer, tmp_path / "t")


def test_a_template_may_refuse_messages(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}")
    template = load_template(tokenizer, tmp_path / "t")
    (tmp_path / "t").write_text("{{ messages[0]['content'] + 1 }}")  # Python's own error, no template's
    with pytest.raises(UserError, match="does not take these messages: can only concatenate str"):
        load_template(tokenizer, tmp_path / "t").prompt([{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="does not take these messages: no system"):
        template.prompt([{"role": "user", "content": "?"}])
    assert template.prompt([{"role": "system", "content": "?"}]) == ""
