"""From a name to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from model_twins import error, small_model, tokens

from mambacus.models import MambaConfig, load, load_config, load_tokenizer, model_type, registry, save
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError


@pytest.fixture
def no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBACUS_DATA_DIR", raising=False)

    def unreachable(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


def test_random_models_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (load("random:micro", seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = tokens(1, 5)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not torch.equal(first(ids).logits, other(ids).logits)
    assert not first.training and first.name_or_path == "random:micro"


def test_random_models_come_in_a_dtype() -> None:
    model, _ = load("random:micro", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32


PUBLISHED = {
    "130m": 129_135_360, "370m": 371_516_416, "790m": 793_204_224, "1.4b": 1_372_178_432, "2.8b": 2_768_345_600
}  # fmt: skip


@pytest.mark.parametrize(("size", "parameters"), PUBLISHED.items())
def test_published_shapes_have_the_published_numbers_of_parameters(size: str, parameters: int) -> None:
    from mambacus.models.counting import count_parameters

    assert sum(count_parameters(load_config(f"random:{size}"))[0].values()) == parameters


def test_the_byte_tokenizer_spells_everything() -> None:
    _, tokenizer = load("random:micro")
    text = "12+30=42\n\tNaïve <|endoftext|> 数"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) <= 256 and ids.count(tokenizer.eos_token_id) == 1 and tokenizer.eos_token_id == 0
    assert len(tokenizer("abc")["input_ids"]) == 3


def test_published_sizes_take_the_neox_tokenizer(data_dir: Path) -> None:
    tokenizer = load_tokenizer("random:130m", data_dir=data_dir)
    assert len(tokenizer) == 50277
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer("Hello world, 1234")["input_ids"]) == "Hello world, 1234"
    assert tokenizer("Hello world")["input_ids"] == [12092, 1533]


def test_a_published_checkpoint_in_the_original_format_takes_the_neox_tokenizer(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, no_data_dir: None
) -> None:
    model = small_model(vocab_size=50277, pad_vocab_size_multiple=8, d_model=8, n_layer=1)
    save(model, tmp_path, format="original")
    assert load(tmp_path, data_dir=data_dir)[1].eos_token == "<|endoftext|>"
    monkeypatch.setenv("MAMBACUS_DATA_DIR", str(data_dir))
    assert len(load(tmp_path)[1]) == 50277
    monkeypatch.delenv("MAMBACUS_DATA_DIR")
    with pytest.raises(UserError, match="no tokenizer beside the model; give --tokenizer"):
        load(tmp_path)


def test_a_random_model_has_no_tokenizer_where_there_is_none(no_data_dir: None) -> None:
    assert load_tokenizer("random:130m") is None


def test_a_given_tokenizer_wins(tmp_path: Path, data_dir: Path) -> None:
    given = data_dir / "tokenizer" / "20B_tokenizer.json"
    assert len(load("random:micro", tokenizer=given)[1]) == 50277
    for wrong, message in ((tmp_path / "none", "no tokenizer at"), (tmp_path, "no tokenizer: expected one of")):
        with pytest.raises(UserError, match=message):
            load("random:micro", tokenizer=wrong)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        load("random:micro", tokenizer=tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:13m", "expected random:SIZE .* did you mean '130m'"),
        ("./nowhere", "model './nowhere': no such folder"),
        ("a/b/c", "model 'a/b/c': no such folder"),
        (__file__, "expected a folder, got a file"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    for function in (load, load_config, load_tokenizer, model_type):
        with pytest.raises(UserError, match=message):
            function(name)


def test_tiny_is_a_clear_error_where_it_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(UserError, match="model 'tiny': not in this installation"):
        load("tiny")


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"model 'tinny': .* not to be had .* \(not cached\); did you mean 'tiny'"):
        load("tinny")


def test_a_hub_model_takes_pickled_weights_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_model(vocab_size=261), tmp_path, byte_tokenizer(), format="original")
    asked: list[list[str]] = []

    def fetch(hub_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model, _ = load("someone/small-mamba")
    assert model.name_or_path == "someone/small-mamba"
    assert [any(".bin" in pattern for pattern in patterns) for patterns in asked] == [False, True]
    asked.clear()
    assert load_config("someone/small-mamba").d_model == 24
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)


def test_model_type_tells_mamba_from_others(tmp_path: Path) -> None:
    import transformers

    assert model_type("random:micro") == "mamba"
    save(small_model(), tmp_path / "m", format="original")
    assert model_type(tmp_path / "m") == "mamba"
    transformers.GPTNeoXConfig().save_pretrained(tmp_path / "pythia")
    assert model_type(tmp_path / "pythia") == "gpt_neox"
    with pytest.raises(UserError, match=r"expected a Mamba-1 model .* got 'gpt_neox'"):
        load_config(tmp_path / "pythia")


def test_a_backend_is_passed_on() -> None:
    model, _ = load("random:micro", backend="reference")
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"reference"}
    with pytest.raises(UserError, match="expected one of auto"):
        load("random:micro", backend="cud")[0](tokens(1, 3))


class TestAdapters:
    """An adapter fits its model entirely or is refused."""

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(load("random:micro")[0], LoraConfig(r=4, target_modules=["in_proj", "out_proj"]))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / "adapter")
        self.attached = model.eval()(input_ids=tokens(2, 5)).logits
        return tmp_path / "adapter"

    def test_is_attached(self, adapter: Path) -> None:
        model, _ = load("random:micro", adapter=adapter)
        assert torch.equal(model(input_ids=tokens(2, 5)).logits, self.attached)
        assert not model.training
        plain, _ = load("random:micro")
        assert error(plain(tokens(2, 5)).logits, self.attached) > 1e-3

    def test_the_run_that_made_it_stands_for_it(self, adapter: Path) -> None:
        model, _ = load("random:micro", adapter=adapter.parent)
        assert torch.equal(model(input_ids=tokens(2, 5)).logits, self.attached)

    def test_of_another_width_is_refused(self, adapter: Path) -> None:
        with pytest.raises(
            UserError, match=r"made for random:micro, does not fit random:tiny: .* input width 256 here, 64 in"
        ):
            load("random:tiny", adapter=adapter)

    def test_of_another_depth_is_refused(self, adapter: Path, tmp_path: Path) -> None:
        shape = {"d_model": 64, "vocab_size": 512}
        for n_layer, message in ((1, "adapts backbone.layers.1.* does not have"), (3, "layers.2.* missing")):
            folder = tmp_path / f"deep{n_layer}"
            save(registry.random_model(MambaConfig(n_layer=n_layer, **shape)), folder, byte_tokenizer())
            with pytest.raises(UserError, match=message):
                load(folder, adapter=adapter)

    def test_broken_folders_are_named(self, adapter: Path, tmp_path: Path) -> None:
        (tmp_path / "nothing").mkdir()
        with pytest.raises(UserError, match=r"missing adapter_config\.json, adapter_model\.safetensors$"):
            load("random:micro", adapter=tmp_path / "nothing")
        (tmp_path / "nothing" / "config.json").write_text("{}")
        with pytest.raises(UserError, match="it holds a whole model, which is given as --model"):
            load("random:micro", adapter=tmp_path / "nothing")
        with pytest.raises(UserError, match="nowhere: no such folder"):
            load("random:micro", adapter=tmp_path / "nowhere")
        with pytest.raises(UserError, match="expected a PEFT adapter folder, got a file"):
            load("random:micro", adapter=tmp_path / "nothing" / "config.json")
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(UserError, match=r"corrupt adapter_model\.safetensors"):
            load("random:micro", adapter=adapter)
        (adapter / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match="not a PEFT configuration"):
            load("random:micro", adapter=adapter)
