"""An output folder is never taken from another run."""

from __future__ import annotations

import pytest

from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import check_writable, claim_directory, claim_empty, claim_file, fingerprint


def test_claim_and_resume(tmp_path):
    out = tmp_path / "run"
    claim_directory(out, "finetune", {"seed": 0}, resume=False)
    claim_directory(out, "finetune", {"seed": 0}, resume=True)
    with pytest.raises(UserError, match="add --resume"):
        claim_directory(out, "finetune", {"seed": 0}, resume=False)
    with pytest.raises(UserError, match=r"another run \(differs in seed\)"):
        claim_directory(out, "finetune", {"seed": 1}, resume=True)
    with pytest.raises(UserError, match="another kind"):
        claim_directory(out, "study", {"seed": 0}, resume=True)


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a mambacus run"):
        claim_directory(tmp_path, "finetune", {}, resume=True)
    with pytest.raises(UserError, match="expected a folder"):
        claim_directory(tmp_path / "thesis.tex", "finetune", {}, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_fingerprint_depends_on_values_not_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_marker_that_cannot_be_read_is_kept(tmp_path):
    for text, message in (("{", "not valid JSON"), ("[]", "expected a JSON object"), ("{}", "another kind")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=message):
            claim_directory(tmp_path, "finetune", {}, resume=True)
        assert (tmp_path / "run.json").read_text() == text


def test_only_new_and_empty_folders_are_claimed_as_empty(tmp_path):
    claim_empty(tmp_path)
    claim_empty(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path, "this one holds files"), (tmp_path / "file", "expected a folder, got a file")):
        with pytest.raises(UserError, match=message):
            claim_empty(path)


def test_files_are_claimed_before_the_work(tmp_path):
    claim_file(tmp_path / "new" / "r.json", overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "r.items.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"r\.items\.jsonl: exists already; add --overwrite"):
        claim_file(tmp_path / "r.json", overwrite=False)
    claim_file(tmp_path / "r.json", overwrite=True)
    with pytest.raises(UserError, match=r"--state .*: expected a file, got a folder"):
        claim_file(tmp_path, overwrite=True, flag="--state")
    with pytest.raises(UserError, match=r"r\.items\.jsonl is a file, not a folder"):
        claim_file(tmp_path / "r.items.jsonl" / "deep" / "r.json", overwrite=True)


def test_a_folder_that_refuses_files_is_named(tmp_path, monkeypatch):
    def refuse(**_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"--out {tmp_path}/a: cannot write to {tmp_path}: Permission denied"):
        check_writable(tmp_path / "a")
