"""Every key of the configuration, changed: what the run does then, against a reference in plain torch and transformers.

`table.py` lists the rows, one a leaf of the schema; `bench.py` runs the product on a tiny model; `reference.py` is the loop of
ten lines that it is compared with. `python -m tests.keys` prints the table.
"""

import pkgutil

import pytest

# So that a comparison in a row's check shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
