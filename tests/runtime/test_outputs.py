"""An output folder is never taken from another run."""

from __future__ import annotations

import pytest

from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_directory, fingerprint


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
