"""`python -m tests.keys`: the table of keys, in Markdown."""

from __future__ import annotations

from tests.keys.table import SECTIONS, rows


def main() -> None:
    print("| key | changed to | what it changes | reference | test |\n|---|---|---|---|---|")
    for section in SECTIONS:
        for row in rows(section):
            values = ", ".join(f"`{value}`" for value in row.values)
            print(f"| {row.name} | {values} | {row.changes} | {row.reference} | `{row.test}` |")


if __name__ == "__main__":
    main()
