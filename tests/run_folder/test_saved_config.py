"""config.yaml of a run is read as far as it can be."""

from __future__ import annotations

from pathlib import Path

from dist_subspace.run_folder.saved_config import saved_sections


def test_sections_are_read_and_what_is_none_is_left_out(tmp_path: Path) -> None:
    assert saved_sections(tmp_path) == {}
    (tmp_path / "config.yaml").write_text("model: {path: m}\nsubspace: 3\ndata:\n")
    assert saved_sections(tmp_path) == {"model": {"path": "m"}}


def test_what_is_no_configuration_has_no_sections(tmp_path: Path) -> None:
    for content in (b"[1, 2]", b"{", b"model: {path: [}", b"\xff\xfe", b"text", b""):
        (tmp_path / "config.yaml").write_bytes(content)
        assert saved_sections(tmp_path) == {}
