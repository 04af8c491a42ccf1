"""Logits at some positions are those of all positions; of the others the last block makes only what its state needs."""

from __future__ import annotations

import pytest
import torch

from mambacus.models import MambaConfig, MambaLM


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("from_state", [False, True])
def test_logits_at_positions(documents: bool, from_state: bool) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=48, n_layer=3, vocab_size=90)).double()
    ids, at = torch.randint(90, (3, 20)), torch.tensor([[19, 3], [0, 0], [7, 8]])
    seq_idx = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3]).expand(3, -1) if documents else None
    state = model(torch.randint(90, (3, 5))).state if from_state else None
    every, some = model(ids, seq_idx, state), model(ids, seq_idx, state, logits_at=at)
    wanted = every.logits.gather(1, at[..., None].expand(-1, -1, every.logits.shape[-1]))
    torch.testing.assert_close(some.logits, wanted, rtol=1e-6, atol=1e-6)  # logits are float32
    for name in ("conv_state", "ssm_state"):
        torch.testing.assert_close(getattr(some.state, name), getattr(every.state, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(some.state.tokens, every.state.tokens)


def test_other_positions_leave_the_last_block_early() -> None:
    model = MambaLM(MambaConfig(d_model=48, n_layer=3, vocab_size=90))
    seen = []
    for block in model.backbone.layers:
        block.mixer.out_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    model(torch.randint(90, (2, 20)), logits_at=torch.tensor([[19], [4]]))
    assert seen == [20, 20, 1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_some_positions(checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=48, n_layer=2, vocab_size=90)).double()
    ids, at = torch.randint(90, (2, 12)), torch.tensor([[11], [5]])
    model(ids).logits[torch.arange(2), at[:, 0]].square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    model(ids, logits_at=at).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-8)
