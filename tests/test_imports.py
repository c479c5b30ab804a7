"""The layout holds: imports run downwards only, and what other libraries do not promise stays in the files meant for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.private_names import KEEPERS, imports, module_of, private_violations
from tests.ranks import ROOT

PACKAGE = ROOT / "dist_subspace"

AXES = {"storage", "placement", "subspace"}
BELOW_TRAINING = AXES | {
    *("errors", "config", "loading", "interchange", "accounting", "checkpoint", "report", "statistics", "atomic_files"),
    "families",
    "run_folder",
    *("notices", "launcher_processes", "launchers", "stopping", "module_places", "transformers_tables"),
}
ALLOWED: dict[str, set[str]] = {
    "pages": set(),
    "errors": set(),
    "launchers": {"errors"},
    "cuda_allocator": set(),
    "command_line": {"config", "__init__"},
    "late_compile": set(),
    "launcher_processes": {"launchers"},
    "stopping": {"launcher_processes"},
    "torch_internals": set(),
    "families": set(),
    "notices": {"errors"},
    "class_source": set(),
    "module_places": set(),
    "transformers_tables": set(),
    "unread_weight": {"errors", "torch_internals"},
    "linear_map": {"torch_internals"},
    "atomic_files": {"errors"},
    "options": {"errors"},
    "run_folder": {"errors", "atomic_files"},
    "config": {"errors", "storage"},
    "storage": {"errors", "late_compile", "linear_map", "class_source", "module_places", "options", "unread_weight"},
    "placement": {
        *(
            "errors",
            "pages",
            "families",
            "class_source",
            "late_compile",
            "launcher_processes",
            "launchers",
            "linear_map",
            "stopping",
            "torch_internals",
        )
    },
    "subspace": {
        "errors",
        "families",
        "linear_map",
        "module_places",
        "notices",
        "options",
        "torch_internals",
        "transformers_tables",
        "unread_weight",
    },
    "loading": {"errors", "pages", "families", "module_places", "notices", "storage", "placement", "torch_internals"},
    "statistics": {"errors", "atomic_files", "loading"} | AXES,
    "interchange": {"errors", "families", "atomic_files", "run_folder", "loading", "module_places", "notices"} | AXES,
    "accounting": {"errors"} | AXES,
    "checkpoint": BELOW_TRAINING - {"report"},
    "report": BELOW_TRAINING,
    "advancing": {"errors", "statistics"} | AXES,
    "metrics": {"errors"},
    "trainers": BELOW_TRAINING | {"advancing"},
    "generation": {"errors", "families", "loading", "placement", "subspace"},
    "training": BELOW_TRAINING
    | {"api", "advancing", "generation", "publishing", "torch_internals", "linear_map", "metrics"},
    "api": BELOW_TRAINING,
    "adapted": BELOW_TRAINING | {"api", "generation", "training"},
    "talking": BELOW_TRAINING | {"adapted", "generation", "training"},
    "evaluation": BELOW_TRAINING | {"training", "api", "adapted", "generation", "metrics"},
    "rate_search": BELOW_TRAINING | {"training", "advancing", "command_line"},
    "publishing": BELOW_TRAINING | {"api"},
    "doctor": BELOW_TRAINING | {"training"},
    "__init__": BELOW_TRAINING | {"training", "api", "adapted", "advancing", "rate_search", "trainers"},
    "cli": BELOW_TRAINING
    | {"training", "api", "adapted", "talking", "evaluation", "publishing", "rate_search"}
    | {"doctor", "cuda_allocator", "command_line", "__init__"},
    "__main__": {"cli", "doctor", "launchers"},
}


# Layout: which part may import which.


def part_of(source: str, name: str | None, parts: set[str]) -> str | None:
    """The part of the package that an import reaches; None for other packages."""
    top, _, rest = source.partition(".")
    if top != "dist_subspace":
        return None
    if rest:
        return rest.split(".")[0]
    return name if name in parts else "__init__"


def layout_violations(source: str, path: str) -> list[str]:
    """Imports of the file at `path` (relative to the package) that go against the layout."""
    part = Path(path).parts[0].removesuffix(".py")
    if part not in ALLOWED:
        return [f"{path}: {part!r} has no place in the layout; give it one in {Path(__file__).name}"]
    found = []
    for target, name, _, line in imports(ast.parse(source), module_of(path)):
        reached = part_of(target, name, set(ALLOWED))
        if reached is not None and reached != part and reached not in ALLOWED[part]:
            found.append(f"{path}:{line}: {part} must not import {reached}")
    return found


def modules_of_the_package(sources: Mapping[str, str]) -> dict[str, str]:
    """The text of each module, by its dotted name, from texts by path relative to the package."""
    names = {path: ".".join(("dist_subspace", *Path(path).with_suffix("").parts)) for path in sources}
    return {names[path].removesuffix(".__init__"): text for path, text in sources.items()}


def import_circle(sources: Mapping[str, str]) -> list[str]:
    """The modules of one circle of imports, the first again at the end; imports inside functions and for type checkers
    count. Empty where there is none."""
    modules = modules_of_the_package(sources)
    packages = {module for path, module in zip(sources, modules, strict=True) if path.endswith("__init__.py")}
    graph: dict[str, set[str]] = {}
    for module, text in modules.items():
        inside = f"{module}.__init__" if module in packages else module
        found = {(f"{source}.{name}", source) for source, name, _, _ in imports(ast.parse(text), inside)}
        graph[module] = {full if full in modules else source for full, source in found} & modules.keys() - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def package_files() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", package_files())
def test_imports_run_downwards(path: str) -> None:
    assert layout_violations((PACKAGE / path).read_text(), path) == []


# Modules that choose between the placements; nobody else knows one of them.
CHOOSERS = tuple(
    f"placement/{name}.py" for name in ("tensors", "edits", "engines", "for_loading", "process_group", "generation")
)


def placement_violations(source: str, path: str) -> list[str]:
    """Imports of one placement where another one would do as well, and of DeepSpeed outside its own."""
    found = []
    for target, name, _, line in imports(ast.parse(source), module_of(path)):
        full = f"{target}.{name}"
        for own in ("deepspeed", "whole"):
            is_one = f"{full}.".startswith(f"dist_subspace.placement.{own}.")
            if is_one and path not in CHOOSERS and not path.startswith(f"placement/{own}/"):
                found.append(f"{path}:{line}: {full} is for {', '.join(CHOOSERS)}")
        if target.split(".")[0] == "deepspeed" and not path.startswith("placement/deepspeed/"):
            found.append(f"{path}:{line}: DeepSpeed is imported in placement/deepspeed alone")
    return found


@pytest.mark.parametrize("path", package_files())
def test_one_placement_is_known_to_the_modules_that_choose_alone(path: str) -> None:
    assert placement_violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/x.py", "from dist_subspace.placement.deepspeed.engine import initialize"),
        ("api.py", "def f():\n    from dist_subspace.placement import whole"),
        ("placement/whole/x.py", "from ..deepspeed import shards"),
        ("placement/deepspeed/x.py", "from dist_subspace.placement.whole.engine import WholeEngine"),
        ("placement/collectives.py", "import deepspeed.comm"),
        ("placement/tensors.py", "from deepspeed import zero"),
    ],
)
def test_a_placement_that_is_named_elsewhere_is_found(path: str, source: str) -> None:
    assert len(placement_violations(source, path)) == 1


def test_no_imports_run_in_a_circle() -> None:
    assert import_circle({path: (PACKAGE / path).read_text() for path in package_files()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from dist_subspace.storage.x import y",
        "import dist_subspace.storage.x",
        "from .x import y",
        "from . import x",
        "if TYPE_CHECKING:\n    from dist_subspace.storage import x",
        "def f():\n    from dist_subspace.storage.x import y",
        "from dist_subspace.storage.between import z",
    ],
)
def test_a_circle_is_found(source: str) -> None:
    sources = {
        "storage/__init__.py": "",
        "storage/x.py": "from dist_subspace.storage.z import z",
        "storage/z.py": source,
    }
    sources["storage/between.py"] = "import dist_subspace.storage.x"
    found = import_circle(sources)
    assert {"dist_subspace.storage.x", "dist_subspace.storage.z"} <= set(found)
    assert import_circle(sources | {"storage/z.py": "import torch"}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("storage/x.py", "from dist_subspace.placement import zero"),
        ("storage/x.py", "def f():\n    import dist_subspace.subspace.lora"),
        ("subspace/deep/x.py", "from ...storage import four_bit"),
        ("subspace/x.py", "from ..placement.deepspeed.shards import gathered"),
        ("placement/x.py", "from dist_subspace import storage"),
        ("loading/x.py", "from dist_subspace.subspace import lora"),
        ("checkpoint/x.py", "from dist_subspace.training.loop import train"),
        ("report/x.py", "import dist_subspace.training"),
        ("config.py", "from dist_subspace.subspace.core.registry import methods"),
        ("training/x.py", "from dist_subspace.cli import main"),
        ("training/x.py", "from dist_subspace import attach"),
        ("api.py", "from dist_subspace import cli"),
        ("newpart/x.py", "import os"),
    ],
)
def test_an_arrow_against_the_layout_is_found(path: str, source: str) -> None:
    assert len(layout_violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("storage/x.py", "from dist_subspace.errors import UsageError"),
        ("storage/x.py", "from dist_subspace.storage.operator import FrozenLinear\nfrom .dense import Dense"),
        ("training/data/x.py", "from ...checkpoint import store\nfrom dist_subspace import report"),
        ("__init__.py", "from dist_subspace.api import attach"),
        ("__main__.py", "from dist_subspace.cli import main"),
        ("cli.py", "import dist_subspace as dsub\nimport torch"),
    ],
)
def test_an_arrow_of_the_layout_passes(path: str, source: str) -> None:
    assert layout_violations(source, path) == []


# Private names: what other libraries do not promise stays in the files for it (tests/private_names.py).


@pytest.mark.parametrize("path", package_files())
def test_private_names_of_libraries_stay_in_their_file(path: str) -> None:
    assert private_violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from deepspeed.runtime.zero.partition_parameters import Init",
        "from deepspeed import runtime",
        "import deepspeed\ndeepspeed.zero.Init._convert(p)",
        "import deepspeed as d\nx = d.runtime",
        "shard = parameter.ds_tensor",
        "hasattr(parameter, 'ds_id')",
        "from bitsandbytes.functional import quantize_4bit",
        "import bitsandbytes as bnb\nbnb.functional.quantize_4bit(x)",
        "from transformers.modeling_utils import _load_state_dict",
        "import transformers\ntransformers.modeling_utils._load_state_dict()",
        "from transformers.loss.loss_utils import LOSS_MAPPING",
        "from transformers import modeling_utils",
        "import transformers\ntransformers.masking_utils.create_causal_mask()",
        "import importlib\nimportlib.import_module('transformers.models.llama.modeling_llama')",
        "import torch\ntorch._C._current_graph_task_id()",
        "import torch._dynamo",
        "from torch._C import DisableTorchFunctionSubclass",
        "from torch import Tensor\nTensor._make_wrapper_subclass(kind, shape)",
        "import torch\ntorch.ops.aten._unsafe_view(x, shape)",
    ],
)
def test_what_a_library_does_not_promise_is_found(source: str) -> None:
    assert private_violations(source, "training/x.py")


@pytest.mark.parametrize(
    "source",
    [
        "mapping = getattr(parameter, '_hp_mapping', None)",
        "if hasattr(parameter, '_hp_mapping'):\n    pass",
        "setattr(model, '_tied_weights_keys', [])",
        "for name in ('_forward_hooks', '_backward_hooks'):\n    getattr(module, name)",
        "x = module._parameters",
        "class Layer(nn.Module):\n    def f(self):\n        return self._buffers",
        "x = vars(parameter)['_hp_mapping']",
        "from operator import attrgetter\nattrgetter('_hp_mapping')(parameter)",
    ],
)
def test_a_private_name_that_the_file_does_not_define_is_found(source: str) -> None:
    assert private_violations(source, "training/x.py")


@pytest.mark.parametrize(
    "source",
    [
        "names = type(module).forward.__globals__",
        "code = getattr(function, '__code__', None)",
        "frame.f_locals['x'] = 1",
        "'x' in function.__code__.co_names",
    ],
)
def test_a_look_into_functions_and_frames_is_found(source: str) -> None:
    assert private_violations(source, "training/x.py")


@pytest.mark.parametrize(
    "source",
    [
        "self.engine.micro_steps += 1",
        "engine.optimizer.overflow = False",
        "setattr(engine, 'module', other)",
        "del engine.optimizer",
        "hasattr(engine.optimizer, 'overflow')",
        "engine.fp16_enabled()",
    ],
)
def test_what_an_engine_does_not_promise_is_found_and_whatever_is_written_on_it(source: str) -> None:
    assert private_violations(source, "training/x.py")
    assert private_violations(source, "placement/deepspeed/x.py") == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "training/x.py",
            "engine = start_engine(m, optimizer)\nengine.rates = [0.1]\nengine.step(True)\noptimizer.state",
        ),
        (
            "training/x.py",
            "import transformers\ntransformers.AutoModel.from_pretrained('x')\nself._private = 1\nx._private",
        ),
        ("training/x.py", "from transformers import get_scheduler\nfrom transformers.masking_utils import sdpa_mask"),
        ("training/x.py", "import bitsandbytes as bnb\nbnb.optim.AdamW8bit([p])"),
        ("training/x.py", "import os\nos._exit(1)\nname.removesuffix('_token')\nf'{name}_token'"),
        ("training/x.py", "import torch\ntorch.nn.functional.linear(x, w).__class__"),
        ("placement/deepspeed/shards.py", "from deepspeed.runtime.zero import partition_parameters\np.ds_tensor"),
        ("placement/deepspeed/fragments.py", "getattr(p, '_hp_mapping', None)"),
        ("loading/transformers_internals.py", "from transformers.initialization import no_init_weights"),
        ("transformers_tables.py", "function.__globals__\nfunction.__code__.co_names"),
        ("torch_internals.py", "import torch\ntorch._C._current_graph_task_id()"),
        ("storage/bnb.py", "from bitsandbytes import functional"),
    ],
)
def test_public_names_and_the_keepers_pass(path: str, source: str) -> None:
    assert private_violations(source, path) == []


@pytest.mark.parametrize(("library", "path"), [(library, path) for library, paths in KEEPERS.items() for path in paths])
def test_a_keeper_says_which_version_was_read(library: str, path: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / path).read_text())) or ""
    assert re.search(rf"\b{library} \d+\.\d+", " ".join(said.split()))
