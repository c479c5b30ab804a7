"""The table of keys is whole."""

from __future__ import annotations

from tests.keys.table import SECTIONS, leaves, rows


def test_every_key_of_the_schema_has_a_row_and_no_other_key_has() -> None:
    assert sorted(row.name for section in SECTIONS for row in rows(section)) == leaves()


def test_a_row_says_what_its_key_changes_and_what_that_is_compared_with() -> None:
    for section in SECTIONS:
        for row in rows(section):
            assert row.section == section and row.changes and row.reference and row.values
