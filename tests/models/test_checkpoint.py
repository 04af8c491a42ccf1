"""Checkpoints in both formats: what is written, what is read, what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_twins import error, small_model, tokens, transformers_twin

from mambacus.models import MambaLM, load, save
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return byte_tokenizer()


def model_for_bytes(**changes: object) -> MambaLM:
    return small_model(**{"vocab_size": 261, **changes})


def assert_same_parameters(got: MambaLM, expected: MambaLM) -> None:
    expected_parameters = dict(expected.named_parameters())
    assert dict(got.named_parameters()).keys() == expected_parameters.keys()
    for name, parameter in got.named_parameters():
        other = expected_parameters[name]
        assert parameter.dtype == other.dtype and torch.equal(parameter, other), name


@pytest.mark.parametrize("format", ["hf", "original"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_bit_for_bit(
    tmp_path: Path, tokenizer: object, format: str, tied: bool, dtype: torch.dtype
) -> None:
    model = model_for_bytes(tie_embeddings=tied, pad_vocab_size_multiple=4).to(dtype)
    save(model, tmp_path / "m", tokenizer, format)
    again, found = load(tmp_path / "m", dtype=None)
    assert_same_parameters(again, model)
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == tied
    ids = tokens(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert found("2+2=é")["input_ids"] == tokenizer("2+2=é")["input_ids"]
    assert found.decode(found("2+2=é")["input_ids"]) == "2+2=é"
    assert not [path for path in (tmp_path / "m").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_what_we_save_loads_in_transformers_with_equal_logits(
    tmp_path: Path, tokenizer: object, tied: bool, max_shard_bytes: int
) -> None:
    import transformers

    model = model_for_bytes(tie_embeddings=tied)
    save(model, tmp_path, tokenizer, max_shard_bytes=max_shard_bytes)
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 9, vocabulary=261)
    assert error(model(ids).logits, twin(ids).logits) <= 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("12 apples")["input_ids"] == tokenizer("12 apples")["input_ids"]
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_bytes == 20_000)
    assert_same_parameters(load(tmp_path)[0], model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_what_transformers_saves_loads_here(tmp_path: Path, tokenizer: object, tied: bool, max_shard_size: str) -> None:
    model = model_for_bytes(tie_embeddings=tied)
    transformers_twin(model).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(tmp_path)
    assert_same_parameters(load(tmp_path)[0], model)


def test_the_original_format_has_its_names_shapes_and_tied_head(tmp_path: Path) -> None:
    model = model_for_bytes()
    save(model, tmp_path, format="original")
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert stored["backbone.embedding.weight"].shape == (261, 24)
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embedding.weight"])
    assert stored["backbone.layers.1.mixer.conv1d.weight"].shape == (48, 1, 4)
    assert len(stored) == len(list(model.named_parameters())) + 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ssm_cfg"] == {"d_state": 5, "dt_rank": 3}
    assert (config["d_model"], config["n_layer"], config["vocab_size"]) == (24, 3, 261)


def test_loading_in_a_dtype_keeps_the_float32_parameters(tmp_path: Path, tokenizer: object) -> None:
    model = model_for_bytes()
    save(model, tmp_path, tokenizer)
    assert_same_parameters(load(tmp_path, dtype=torch.bfloat16)[0], model.to(torch.bfloat16))


def test_a_model_is_saved_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for_bytes()
    save(model, tmp_path / "m")
    mode = (tmp_path / "m" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "m" / "config.json").stat().st_mode)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a model already"):
        save(small_model(seed=5), tmp_path / "m", format="original")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="expected one of hf, original, got 'gguf'"):
        save(model, tmp_path / "n", format="gguf")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(model, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_a_model_with_an_adapter_is_not_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = model_for_bytes()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["in_proj"]))
    with pytest.raises(UserError, match="expected a MambaLM, got a PeftModel"):
        save(wrapped, tmp_path / "a")
    with pytest.raises(UserError, match="has adapters"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class TestBrokenFolders:
    """Each fault of a model folder is one line that names it."""

    @pytest.fixture
    def folder(self, tmp_path: Path, tokenizer: object) -> Path:
        save(model_for_bytes(), tmp_path / "m", tokenizer)
        return tmp_path / "m"

    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    def rewrite(self, folder: Path, change: object) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    def test_truncated_weights(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(folder, "model.safetensors: corrupt or truncated")

    def test_weights_that_are_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"not a model at all")
        self.refused(folder, "model.safetensors: corrupt or truncated")

    @pytest.mark.parametrize(
        "content", [b"", bytes(1000), (2**60).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b"{garbage}"]
    )
    def test_headers_that_are_no_headers(self, folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        self.refused(folder, "model.safetensors: corrupt or truncated")

    def test_a_pointer_of_git_lfs_is_known(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        self.refused(folder, "git lfs pull")

    def test_weights_that_are_not_numbers(self, folder: Path) -> None:
        name = "backbone.layers.0.mixer.in_proj.weight"
        for value in (float("nan"), float("inf")):
            self.rewrite(folder, lambda tensors, value=value: tensors[name].__setitem__((3, 4), value))
            self.refused(folder, f"1 with NaN or infinity: {name}")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.refused(folder, "no weights: expected model.safetensors")
        (folder / "model.safetensors").mkdir()
        self.refused(folder, "no weights: expected model.safetensors")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, "not a model folder, it has no config.json$")

    def test_folders_of_ours_that_are_no_models_say_what_they_are(self, folder: Path, tmp_path: Path) -> None:
        for name, message in (
            ("adapter_config.json", "it is an adapter: give its base model, and this as --adapter"),
            ("adapter/adapter_config.json", "it is a fine-tuning run: merge it, or give its base model and --adapter"),
            ("model/config.json", "the model is in "),
        ):
            path = tmp_path / name.replace("/", "-") / name
            path.parent.mkdir(parents=True)
            path.write_text("{}")
            self.refused(tmp_path / name.replace("/", "-"), message)

    def test_broken_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        self.refused(folder, "config.json: not valid JSON")
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        self.refused(folder, "it has no config.json")

    def test_missing_unknown_and_misshapen_parameters_are_all_named(self, folder: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            del tensors["backbone.layers.0.mixer.D"]
            tensors["backbone.layers.9.mixer.D"] = torch.zeros(3)
            tensors["backbone.norm_f.weight"] = torch.ones(25)

        self.rewrite(folder, change)
        self.refused(
            folder,
            r"1 missing: backbone.layers.0.mixer.D; 1 unknown: backbone.layers.9.mixer.D; "
            r"1 of another shape: backbone.norm_f.weight \(expected \(24,\), got \(25,\)\)",
        )

    def test_quantised_parameters(self, folder: Path) -> None:
        name = "backbone.layers.0.mixer.in_proj.weight"
        self.rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
        self.refused(folder, f"1 not floating point: {name}")

    def test_a_tied_head_that_differs(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(261, 24)}))
        self.refused(folder, "ties lm_head.weight to backbone.embeddings.weight, but the stored values differ")

    def test_a_tied_head_that_agrees_is_fine(self, folder: Path) -> None:
        self.rewrite(
            folder, lambda tensors: tensors.update({"lm_head.weight": tensors["backbone.embeddings.weight"].clone()})
        )
        assert_same_parameters(load(folder)[0], model_for_bytes())

    def test_a_missing_shard(self, tmp_path: Path, tokenizer: object) -> None:
        save(model_for_bytes(), tmp_path / "s", tokenizer, max_shard_bytes=20_000)
        lost = sorted((tmp_path / "s").glob("model-*.safetensors"))[1]
        lost.unlink()
        self.refused(tmp_path / "s", f"missing {lost.name}")

    def test_an_index_that_lies(self, tmp_path: Path, tokenizer: object) -> None:
        save(model_for_bytes(), tmp_path / "s", tokenizer, max_shard_bytes=20_000)
        shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
        shutil.copy(shards[0], shards[1])
        self.refused(tmp_path / "s", "which does not hold it")

    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path: Path) -> None:
        marker = tmp_path / "executed"

        class Bomb:
            def __reduce__(self) -> tuple:
                return marker.touch, ()

        save(model_for_bytes(), tmp_path / "o", format="original")
        path, tokenizer = tmp_path / "o" / "pytorch_model.bin", self.tokenizer_folder(tmp_path)
        torch.save({"weight": Bomb()}, path)
        with pytest.raises(UserError, match="more than tensors"):
            load(tmp_path / "o", tokenizer=tokenizer)
        path.write_bytes(pickle.dumps(Bomb()))
        with warnings.catch_warnings(), pytest.raises(UserError, match="more than tensors"):
            warnings.simplefilter("error")
            load(tmp_path / "o", tokenizer=tokenizer)
        assert not marker.exists()

    def test_broken_pickles(self, tmp_path: Path) -> None:
        save(model_for_bytes(), tmp_path / "o", format="original")
        path, tokenizer = tmp_path / "o" / "pytorch_model.bin", self.tokenizer_folder(tmp_path)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"junk" * 30):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"pytorch_model\.bin: corrupt") as caught:
                load(tmp_path / "o", tokenizer=tokenizer)
            assert "weights_only=False" not in str(caught.value)  # torch's advice to run what is in the file
        torch.save([1, 2], path)
        with pytest.raises(UserError, match="expected a dict of tensors"):
            load(tmp_path / "o", tokenizer=tokenizer)

    def tokenizer_folder(self, tmp_path: Path) -> Path:
        byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"


def test_loading_leaves_torchs_compiler_alone(tmp_path: Path) -> None:
    # Filling an embedding on the meta device would import torch._dynamo: two seconds and more at every start.
    save(model_for_bytes(), tmp_path / "m", byte_tokenizer())
    code = f"""
import sys
from mambacus.models.checkpoint import load_checkpoint
load_checkpoint(__import__("pathlib").Path({str(tmp_path / "m")!r}), "cpu", None)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
