"""Methods on the experts of families: logits, gradients, merge, and an expert without tokens on one of two ranks.

    python -m tests.families.experts_table [FAMILY ...] [METHOD ...]     prints the table

Judges: transformers' own model with the matrices that the formula gives (`experts_formula.py`), for lora and rslora PEFT's
`target_parameters` too, and transformers' own reader for what a merge writes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.families.experts import stacks_of
from dist_subspace.interchange.description import OWN, TURNED
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.peft.experts import experts_tensors
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenLinear, FrozenStack
from dist_subspace.subspace import StackedPart
from tests.families import reference
from tests.families.cases import Case
from tests.families.experts_formula import FORMULAS, OPTIONS, changed, dense, randomise
from tests.matrix import tiny

FAMILIES = {
    "Mixtral": "mixtral",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3-MoE": "qwen3_moe",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
    "GLM-4-MoE": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "Llama 4": "llama4_text",
    "OLMoE": "olmoe",
    "Granite-MoE": "granitemoe",
    "Qwen3-Next": "qwen3_next",
    "DBRX": "dbrx",
}
IN_PEFT = ("lora", "rslora")
# Of the largest right value: float32 sums in another order.
BOUNDS = {"logits": 1e-4, "gradients": 1e-3, "peft": 1e-3, "merge": 1e-4, "ranks": 2e-3}


@dataclass
class Row:
    """One family and method: how far off each thing is, in units of the largest right value; or the one sentence of a refusal."""

    family: str
    method: str
    off: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.refused:
            return "refused"
        wrong = [what for what, far in self.off.items() if not far <= BOUNDS[what]]
        return "wrong: " + ", ".join([*wrong, *self.notes]) if wrong or self.notes else "right"

    def __str__(self) -> str:
        numbers = " ".join(f"{self.off[what]:9.1e}" if what in self.off else " " * 8 + "-" for what in BOUNDS)
        return (
            f"{self.family:12} {self.method:7} {numbers}  {self.verdict}{f': {self.refused}' if self.refused else ''}"
        )


HEAD = f"{'family':12} {'method':7} " + " ".join(f"{what:>9}" for what in BOUNDS) + "  verdict"


def make(family: str, folder: Path) -> None:
    reference.make_folder(Case("causal-lm", FAMILIES[family]), folder / FAMILIES[family])


def endings(right: nn.Module) -> list[str]:
    """What names the family's stacks; the word for experts where it has none that are known."""
    found = [(name, stacks) for name, module in right.named_modules() if (stacks := stacks_of(module)) is not None]
    return sorted({f"{n.rpartition('.')[2]}.{own}" for n, stacks in found for own in stacks.names}) or ["experts"]


def config_of(method: str, targets: Sequence[str]) -> dsub.SubspaceConfig:
    return dsub.SubspaceConfig(method=method, target_parameters=targets, **OPTIONS.get(method, {}))


def adapted(folder: Path, method: str, targets: Sequence[str], storage: str = "fp32", **load: Any) -> nn.Module:
    model = dsub.load_frozen(folder, storage=storage, dtype="float32", **load)
    dsub.attach(model, config_of(method, targets))
    randomise(model)
    return model.eval()


def by_formula(model: nn.Module, right: nn.Module, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """transformers' output with the formula's matrices, and with those that the other layers of ours really have; and the
    leaves by the names that our trained parameters have."""
    weights: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, StackedPart):
            matrices, own = changed(module)
            weights[name] = matrices.transpose(1, 2) if module.base.transposed else matrices
            leaves |= {f"{name}.{key}": leaf for key, leaf in own.items()}
        elif isinstance(module, FrozenStack) and not name.endswith(".base"):
            weights[name] = dense(module).transpose(1, 2) if module.transposed else dense(module)
        elif isinstance(module, FrozenLinear):
            weights[f"{name}.weight"] = module.dense()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return functional_call(right, weights, kwargs=given), leaves


def keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= set(handle.keys())
    return found


def check(family: str, method: str, root: Path, storage: str = "fp32") -> Row:
    """On one rank: everything but what two ranks do."""
    row, folder, case = Row(family, method), root / FAMILIES[family], Case("causal-lm", FAMILIES[family])
    right = reference.load(case, folder)
    given = reference.inputs(case, right)
    try:
        model = adapted(folder, method, endings(right), storage)
    except UsageError as error:
        row.refused = str(error)
        return row
    torch.manual_seed(3)
    ours = model(**given)
    theirs, leaves = by_formula(model, right, given)
    row.off["logits"] = reference.relative(ours.logits, theirs.logits)
    with torch.no_grad():
        moved = reference.relative(ours.logits, right(**given).logits)
    row.notes += ["nothing is changed"] if moved < 1e-3 else []
    ours.loss.backward()
    theirs.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    row.notes += ["other parameters are trained"] if trained.keys() != leaves.keys() else []
    far = [reference.relative(p.grad, leaves[n].grad) for n, p in trained.items()]  # type: ignore[arg-type]
    row.off["gradients"] = max(far)
    if method in IN_PEFT and storage == "fp32":
        row.off["peft"] = peft_gradients(model, right, given, root / f"{FAMILIES[family]}-{method}-peft")
    merged = root / f"{FAMILIES[family]}-{method}-merged"
    dsub.merge(model, merged, report=None)
    row.notes += [] if keys(merged) == keys(folder) else ["the merge has other names than the checkpoint"]
    with torch.no_grad():
        row.off["merge"] = reference.relative(reference.load(case, merged)(**given).logits, ours.logits)
    return row


def peft_gradients(model: nn.Module, right: nn.Module, given: dict[str, Tensor], out: Path) -> float:
    """How far PEFT's gradients on the exported folder are from ours, which `model` has."""
    dsub.export_peft(model, out, report=None)
    theirs = PeftModel.from_pretrained(right, out, is_trainable=True)
    theirs(**given).loss.backward()
    stacks = [name for name, module in model.named_modules() if isinstance(module, StackedPart)]
    own = {file_key(n, f"lora_{f}.weight"): model.get_parameter(f"{n}.lora_{f}").grad for n in stacks for f in "AB"}
    wanted = experts_tensors(own, stacks, adapter_config(model)[OWN].get(TURNED, ()))  # type: ignore[arg-type]
    held = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if ".lora_" in n}
    assert held.keys() == wanted.keys()
    far = max(reference.relative(held[key].grad, grad) for key, grad in wanted.items())  # type: ignore[arg-type]
    theirs.unload()
    return far


def on_two_ranks(root: str, family: str, methods: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """In each of two processes, under ZeRO-3: how every trained value moved in one step of rate 1, which experts had tokens,
    and a merge."""
    folder, made = Path(root) / FAMILIES[family], {}
    for method in methods:
        config = tiny.ds_config(3, trainable_numel=1, world_size=world().size)
        config |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 2}
        model = adapted(folder, method, targets, deepspeed=config)
        out = Path(root) / f"{FAMILIES[family]}-{method}-two"
        dsub.merge(model, out, report=None)
        hit: list[list[int]] = []

        def look(stack: nn.Module, args: Any, hit: list[list[int]] = hit) -> None:
            hit.append([number for number, count in enumerate(args[1]) if count])

        for module in model.modules():
            if isinstance(module, FrozenStack):
                module.register_forward_pre_hook(look)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        engine = tiny.make_engine(model.train(), config, lambda parameters, lr: torch.optim.SGD(parameters, lr=1.0))
        tiny.train_step(engine, two_rows(world().rank))
        with gathered(dsub.trainable_parameters(model)):
            moved = {n: before[n] - p.detach() for n, p in model.named_parameters() if p.requires_grad}
        made[method] = {"moved": moved, "hit": hit}
        engine.destroy()
    return made


def two_rows(rank: int | None = None) -> Tensor:
    """A token twice on each rank, so that half of the experts have none: `(2, 2)`, or a rank's own row."""
    rows = torch.tensor([[5, 5], [40, 40]])
    return rows if rank is None else rows[rank : rank + 1]


def check_ranks(rows: Mapping[str, Row], root: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Fill in what two ranks made of one family's methods."""
    for method, row in rows.items():
        folder, case = root / FAMILIES[row.family], Case("causal-lm", FAMILIES[row.family])
        right = reference.load(case, folder)
        model = adapted(folder, method, endings(right))
        ids = two_rows()
        theirs, leaves = by_formula(model, right, {"input_ids": ids, "labels": ids})
        theirs.loss.backward()
        far = [reference.relative(m[method]["moved"][n], leaf.grad) for m in ranks for n, leaf in leaves.items()]  # type: ignore[arg-type]
        row.off["ranks"] = max(far)
        apart = any(set(one) - set(other) for one, other in zip(*(m[method]["hit"] for m in ranks), strict=True))
        every = any(s.call == "every_token" for m in right.modules() if (s := stacks_of(m)) is not None)
        row.notes += [] if apart or every else ["every expert has tokens on both ranks"]
        one, two = (root / f"{FAMILIES[row.family]}-{method}-{how}" for how in ("merged", "two"))
        same = all(file.read_bytes() == (two / file.name).read_bytes() for file in one.glob("*.safetensors"))
        row.notes += [] if same else ["two ranks merge to other bytes than one"]


def table(families: Sequence[str], methods: Sequence[str]) -> list[Row]:
    from tests.ranks import run_on_ranks

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as held:
        root = Path(held)
        for family in families:
            make(family, root)
            own = {method: check(family, method, root) for method in methods}
            able = {method: row for method, row in own.items() if not row.refused}
            if able:
                right = reference.load(Case("causal-lm", FAMILIES[family]), root / FAMILIES[family])
                ranks = run_on_ranks(2, on_two_ranks, str(root), family, list(able), endings(right))
                check_ranks(able, root, ranks)
            rows += own.values()
            print("\n".join(map(str, own.values())), flush=True)
    return rows


def count(rows: Sequence[Row]) -> str:
    verdicts = [row.verdict.partition(":")[0] for row in rows]
    return ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("right", "refused", "wrong"))


def main(words: Sequence[str]) -> int:
    families = [word for word in words if word in FAMILIES] or list(FAMILIES)
    methods = [word for word in words if word in FORMULAS] or list(FORMULAS)
    print(HEAD, flush=True)
    rows = table(families, methods)
    print(count(rows))
    return int(any(row.verdict.startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
