"""A card that a person has edited is told from one that nobody has."""

from __future__ import annotations

import pytest

from dist_subspace.interchange.card_signature import is_unedited, signed

CARD = "---\ntags: [a]\n---\n\n# Text\n"


def test_a_card_is_unedited_until_a_character_is_another() -> None:
    card = signed(CARD)
    assert card.startswith(CARD) and is_unedited(card) and is_unedited(card.replace("\n", "\r\n"))
    assert signed(card) == card and is_unedited(signed(card.replace("Text", "Other")))
    for place in range(len(CARD)):
        assert not is_unedited(card[:place] + "X" + card[place + 1 :])


@pytest.mark.parametrize("card", ["", CARD, signed(CARD) + "More.\n", signed(CARD).rstrip(">\n")])
def test_a_card_without_its_last_line_is_somebodys_own(card: str) -> None:
    assert not is_unedited(card)
