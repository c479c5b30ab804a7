"""The methods of a class as its source has them: its own, those that it inherits, and none of the libraries' bases."""

from __future__ import annotations

import ast

from torch import nn

from dist_subspace.class_source import definitions, functions, methods_of


class Base:
    def common(self) -> int:
        return 1

    def above(self) -> int:
        return 2


class Middle(Base):
    def common(self) -> int:
        return super().common() + 10


class Block(Middle, nn.Module):
    def forward(self) -> int:
        return self.common()


def answers(kind: type, name: str) -> list[tuple[type, str]]:
    return [(owner, ast.unparse(node.body[-1])) for owner, node in definitions(kind, name)]


def test_a_method_is_found_in_every_class_that_has_it_the_nearest_first() -> None:
    found = answers(Block, "common")
    assert found == [(Middle, "return super().common() + 10"), (Base, "return 1")]
    assert answers(Block, "above") == [(Base, "return 2")]
    assert answers(Block, "missing") == []


def test_the_methods_of_torch_itself_are_not_the_models() -> None:
    assert answers(Block, "state_dict") == [] and answers(nn.Linear, "state_dict") == []
    assert [owner for owner, _ in answers(nn.Linear, "forward")] == [nn.Linear]
    assert [owner for owner, _ in answers(Block, "forward")] == [Block]


def test_classes_of_one_name_within_functions_are_told_apart() -> None:
    def first() -> type:
        class Inner:
            def one(self) -> None: ...

        return Inner

    def second() -> type:
        class Inner:
            def two(self) -> None: ...

        return Inner

    assert set(methods_of(first())) == {"one"} and set(methods_of(second())) == {"two"}


def test_a_module_has_its_functions_and_one_without_source_has_none() -> None:
    assert {"answers", "test_a_module_has_its_functions_and_one_without_source_has_none"} <= set(functions(__name__))
    assert "first" not in functions(__name__)
    assert functions("sys") == {} and functions("no.such.module") == {}
    made = type("Typed", (), {"__module__": "no.such.module"})
    assert methods_of(made) == {}
