"""What the documents say of defaults, references and choices is what the package has."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TABLE = "tests/test_docs.py::test_a_generated_table_is_that_of_the_registry"

MUTANTS = [
    Mutant(
        name="documented-option-has-another-default",
        file="dist_subspace/subspace/combination/lora_dash.py",
        text='"directions": whole(8,',
        becomes='"directions": whole(4,',
        promise="docs/reference.md shows every option of every method with its default.",
        tests=[f"{TABLE}[options]"],
    ),
    Mutant(
        name="documented-key-has-another-default",
        file="dist_subspace/config/schema.py",
        text="eval_steps: Count | None = Field(default=200",
        becomes="eval_steps: Count | None = Field(default=100",
        promise="docs/reference.md shows every key of the configuration with its default.",
        tests=[f"{TABLE}[keys]"],
    ),
    Mutant(
        name="documented-method-has-another-reference",
        file="dist_subspace/subspace/extension/vera.py",
        text='reference="2310.11454"',
        becomes='reference="2310.11453"',
        promise="docs/methods.md names the paper that a method is from.",
        tests=["tests/test_docs.py::test_every_method_has_a_section_with_its_reference_its_count_and_its_options"],
    ),
    Mutant(
        name="documented-storage-costs-otherwise",
        file="dist_subspace/storage/int8.py",
        text="return d_out * d_in + 4 * d_out",
        becomes="return d_out * d_in + 2 * d_out",
        promise="docs/reference.md shows what a matrix takes in every storage.",
        tests=[f"{TABLE}[storages]"],
    ),
]
