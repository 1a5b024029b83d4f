"""CONTRIBUTING's recipes are the files that they name."""

from support.includes import ROOT, filled, included

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_recipes_are_literal_includes():
    found = included(TEXT)
    assert len(found) == TEXT.count("<!-- include: ") == 2  # a fence that is not recognised would stay as it is
    for path, code in found.items():
        same = code == (ROOT / path).read_text(encoding="utf-8")
        assert same, f"CONTRIBUTING.md does not show {path} as it is now; run `make recipes`"


def test_the_comparison_notices_a_changed_line():
    path, code = next(iter(included(TEXT).items()))
    changed = TEXT.replace(code, code.replace("return", "return None  #", 1))
    assert changed != TEXT and included(changed)[path] != code and filled(changed) == filled(TEXT)
