"""What a run knows for the card, and whose card the one in a folder is."""

from __future__ import annotations

from pathlib import Path

from dist_subspace.interchange.card_signature import signed
from dist_subspace.training.card import edited_card


def test_the_card_of_an_earlier_end_is_kept_where_a_person_has_edited_it(tmp_path: Path) -> None:
    assert edited_card(tmp_path) is None
    (tmp_path / "README.md").write_text(signed("---\ntags: []\n---\n\nOurs.\n"))
    assert edited_card(tmp_path) is None
    (tmp_path / "README.md").write_text("Theirs.\n")
    assert edited_card(tmp_path) == "Theirs.\n"
