"""MambaState as a value: forking, selecting, joining, moving, storing."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_twins import error, small_model, tokens

from mambacus.models import MambaState
from mambacus.runtime.errors import UserError


def some_state(batch: int = 3, seed: int = 1) -> MambaState:
    with torch.no_grad():
        return small_model()(tokens(batch, 6, seed=seed)).state


def assert_equal(got: MambaState, expected: MambaState) -> None:
    for name in ("conv_state", "ssm_state", "tokens"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_shapes_follow_the_contract() -> None:
    state = some_state()
    assert state.conv_state.shape == (3, 3, 48, 4)
    assert state.ssm_state.shape == (3, 3, 48, 5)
    assert state.ssm_state.dtype == torch.float32
    assert state.tokens.tolist() == [6, 6, 6] and state.tokens.dtype == torch.int64
    assert state.batch == 3
    assert state.nbytes == 4 * 3 * 3 * 48 * (4 + 5) + 3 * 8


def test_zeros_is_the_state_before_any_token() -> None:
    model = small_model()
    ids = tokens(2, 5)
    start = MambaState.zeros(model.config, batch=2)
    assert error(model(ids, state=start).logits, model(ids).logits) <= 1e-6


def test_conv_state_holds_the_last_inputs_oldest_first_as_in_transformers() -> None:
    from model_twins import transformers_twin

    model = small_model()
    ids = tokens(2, 6)
    with torch.no_grad():
        cache = transformers_twin(model).eval()(ids, use_cache=True).cache_params
        state = model(ids).state
    for layer in range(3):
        assert error(state.conv_state[layer], cache.get_conv_state(layer, state_idx=0)) <= 1e-5
        assert error(state.ssm_state[layer], cache.get_recurrent_state(layer, state_idx=0)) <= 1e-5


def test_fork_repeats_each_row_side_by_side() -> None:
    state = some_state(2)
    assert_equal(state.fork(3), state.select([0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="n: expected >= 1"):
        state.fork(0)


def test_forks_go_their_own_ways_without_touching_the_original() -> None:
    model = small_model()
    prefix, left, right = tokens(1, 5), tokens(1, 4, seed=2), tokens(1, 4, seed=3)
    state = model(prefix).state
    kept = state.ssm_state.clone()
    both = model(torch.cat([left, right]), state=state.fork(2))
    for row, rest in enumerate((left, right)):
        whole = model(torch.cat([prefix, rest], dim=1))
        assert error(both.logits[row : row + 1], whole.logits[:, 5:]) <= 1e-5
    assert torch.equal(state.ssm_state, kept)


def test_select_takes_numbers_or_a_mask_in_any_order() -> None:
    state = some_state(3)
    assert_equal(state.select(torch.tensor([True, False, True])), state.select([0, 2]))
    assert torch.equal(state.select([2, 0]).ssm_state[:, 0], state.ssm_state[:, 2])
    assert state.select([]).batch == 0


def test_cat_joins_rows_and_undoes_select() -> None:
    state = some_state(3)
    assert_equal(MambaState.cat([state.select([0]), state.select([1, 2])]), state)
    with pytest.raises(ValueError, match="at least one"):
        MambaState.cat([])


def test_to_casts_the_convolution_only() -> None:
    state = some_state().to(dtype=torch.bfloat16)
    assert state.conv_state.dtype == torch.bfloat16
    assert state.ssm_state.dtype == torch.float32 and state.tokens.dtype == torch.int64
    assert state.to("meta").ssm_state.is_meta
    assert some_state().to(torch.bfloat16).conv_state.dtype == torch.bfloat16


def test_detach_cuts_the_graph() -> None:
    state = small_model()(tokens(1, 4)).state
    assert state.ssm_state.requires_grad
    assert not state.detach().ssm_state.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_loads_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = some_state().to(dtype=dtype)
    state.save(tmp_path / "prefix.state")
    assert_equal(MambaState.load(tmp_path / "prefix.state"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.state"]


def test_files_that_are_no_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.state"):
        MambaState.load(tmp_path / "missing.state")
    some_state().save(tmp_path / "a")
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(UserError, match="cut: not a readable safetensors file"):
        MambaState.load(tmp_path / "cut")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "model")
    with pytest.raises(UserError, match="expected a state written by mambacus"):
        MambaState.load(tmp_path / "model")


def test_fits_names_what_differs() -> None:
    model = small_model()
    assert some_state().fits(model.config) is None
    assert "ssm_state: expected shape" in (some_state().fits(small_model(d_state=4).config) or "")
