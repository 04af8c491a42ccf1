"""Passes over rows of unequal lengths end where that saves padding."""

from __future__ import annotations

import pytest
import torch

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.prompt_passes import PromptPasses
from mambacus.inference.reading import PASS_TOKENS, unpadded_width
from mambacus.models import MambaLM


def padding(lengths: list[int], width: int) -> int:
    return sum(max(0, width - length) for length in lengths)


@pytest.mark.parametrize(
    "lengths",
    [[64] * 40 + [2] * 24, list(range(64, 0, -1)), [64, 63, 2], [64] * 5, [200] * 3 + [9] * 4, [7, 3]],
    ids=str,
)
def test_a_pass_ends_where_it_saves_most(lengths: list[int]) -> None:
    most = min(64, lengths[0])
    width = unpadded_width(lengths, most)

    def cost(end: int) -> int:
        later = [length - end for length in lengths if length > end]
        second = padding(later, most - end) + PASS_TOKENS if end < most else 0
        return padding(lengths, end) + second

    assert cost(width) == min(cost(end) for end in range(1, most + 1))


def test_less_padding_is_read_and_the_texts_are_the_same(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [*range(2, 66, 2), 90]
    prompts = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]
    sizes: list[tuple[int, int]] = []
    run = PromptPasses.run

    def counted(self, parts, state):
        sizes.append((len(parts), max(map(len, parts))))
        return run(self, parts, state)

    monkeypatch.setattr(PromptPasses, "run", counted)
    params = SamplingParams(max_new_tokens=5)
    got = Engine(model, batch_size=64, prefill_tokens=4096).generate(prompts, params)
    computed = sum(rows * width for rows, width in sizes)
    assert len(sizes) > 2 and computed < 1.6 * sum(lengths) < 90 * len(lengths)
    assert got == [Engine(model, batch_size=1).generate([prompt], params)[0] for prompt in prompts]
