"""A library's import compiles nothing; its functions are compiled when they are called, with the options that it gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_subspace.late_compile import compiled_when_called


def test_a_function_is_compiled_at_its_first_call_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []

    def compiler(model: Any, **options: Any) -> Any:
        made.append((model, options))
        return lambda x: ("compiled", model(x))

    monkeypatch.setattr(torch, "compile", compiler)
    with compiled_when_called():

        @torch.compile(dynamic=False)
        def double(x: int) -> int:
            """Twice."""
            return 2 * x

        plain = torch.compile(abs)
        assert made == [] and double.__doc__ == "Twice."
    assert torch.compile is compiler
    assert double(3) == ("compiled", 6) and double(4) == ("compiled", 8) and plain(-1) == ("compiled", 1)
    assert [options for _, options in made] == [{"dynamic": False}, {}]


def test_the_compiler_is_back_where_an_import_fails() -> None:
    before = torch.compile
    with pytest.raises(ImportError), compiled_when_called():
        raise ImportError
    assert torch.compile is before
