"""Recipes by file and by bare name: one way for both kinds of study."""

from __future__ import annotations

import pytest

from mambacus.runtime.errors import UserError
from mambacus.studies import recipe as studies
from mambacus.synthetic import recipe as controlled


@pytest.mark.parametrize(("kind", "name"), [(studies, "demo"), (controlled, "mqar")])
def test_a_packaged_recipe_is_read_by_name_whatever_folder_is_called_so(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert name in kind.packaged_recipes() and kind.read_recipe(name).name == name
    for wrong, words in ((name + "x", f"did you mean '{name}'"), ("no.yaml", f"no such recipe: no.yaml .*{name}")):
        with pytest.raises(UserError, match=words):
            kind.read_recipe(wrong)
    (tmp_path / "bare").write_text("[1]")
    with pytest.raises(UserError, match="expected keys and values, got a list"):
        kind.read_recipe("bare")
