"""How far layers moved: against dense matrices that only the test makes, for every method, from the files alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_subspace as dsub
from dist_subspace import SubspaceConfig, methods
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.parts_without_base import parts_without_base
from dist_subspace.report.adapter import adapter_report, adapter_text
from dist_subspace.report.movement import MEANING, effective_rank, movements, singular_values
from dist_subspace.subspace import SubspaceLinear, attached, trainable_parameters
from tests.interchange.trained import saved_adapter
from tests.tiny_models import tiny_model

each_method = pytest.mark.parametrize("method", sorted(methods()))


@each_method
def test_every_part_of_every_method_is_measured_from_its_files(method: str, tmp_path: Path) -> None:
    model = saved_adapter(method, tmp_path)
    found = {m.layer: m for m in movements(AdapterFolder(tmp_path))}
    assert list(found) == list(attached(model).layers)
    for movement in found.values():
        assert movement.kind in MEANING and math.isfinite(movement.norm) and movement.norm > 0
        assert 0 < movement.largest <= movement.norm * (1 + 1e-6)
        if movement.effective_rank is not None:
            assert 1 <= movement.effective_rank <= movement.rank * (1 + 1e-6)
    trained = sum(p.numel() for p in trainable_parameters(model))
    if method != "p-tuning":  # its file holds what the encoder made
        assert sum(m.trained for m in found.values()) == trained


@each_method
def test_an_update_is_the_merged_matrix_less_the_frozen_one(method: str, tmp_path: Path) -> None:
    model = saved_adapter(method, tmp_path)
    for movement in movements(AdapterFolder(tmp_path)):
        if movement.kind != "update":
            continue
        part: Any = model.get_submodule(movement.layer)
        with torch.no_grad():
            frozen = part.base.dense()
            delta = part.merged(frozen) - frozen
        singular = torch.linalg.svdvals(delta.double())
        assert movement.norm == pytest.approx(float(delta.norm()), rel=1e-3)
        assert movement.largest == pytest.approx(float(singular[0]), rel=1e-3)
        kept = singular[: movement.rank]
        assert movement.effective_rank == pytest.approx(effective_rank(kept), rel=1e-2)
        assert float(singular[movement.rank :].sum()) < 1e-3 * float(kept.sum()), "more singular values than were said"


@pytest.mark.parametrize("method", ["ssl", "ssb", "ia3"])
def test_scalings_are_measured_as_deviations_from_one(method: str, tmp_path: Path) -> None:
    model = saved_adapter(method, tmp_path)
    for movement in movements(AdapterFolder(tmp_path)):
        part = model.get_submodule(movement.layer)
        deviations = torch.cat([p.detach() for p in part.trainables().values()])
        assert movement.kind == "scaling" and movement.effective_rank is None
        assert movement.norm == pytest.approx(float(deviations.norm()), rel=1e-5)
        assert movement.largest == pytest.approx(float(deviations.abs().max()), rel=1e-5)


@pytest.mark.parametrize(("method", "options"), [("bitfit", {}), ("houlsby", {"train_norms": True})])
def test_parts_on_norms_are_measured_by_their_tensors(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = saved_adapter(method, tmp_path, options=options)
    found = {m.layer: m for m in movements(AdapterFolder(tmp_path))}
    norms = [name for name in attached(model).layers if "ln_" in name]
    assert norms
    for name in norms:
        values = torch.cat([p.detach() for p in model.get_submodule(name).trainables().values()])
        assert found[name].kind == "shift" and found[name].norm == pytest.approx(float(values.norm()), rel=1e-5)


@each_method
def test_parts_without_base_hold_what_the_models_parts_hold(method: str, tmp_path: Path) -> None:
    model = saved_adapter(method, tmp_path)
    found = dict(parts_without_base(AdapterFolder(tmp_path)))
    linear = [n for n in attached(model).layers if isinstance(model.get_submodule(n), SubspaceLinear)]
    assert list(found) == linear
    for name, part in found.items():
        real = model.get_submodule(name)
        for suffix, tensor in real.file_tensors().items():
            assert torch.equal(part.file_tensors()[suffix], tensor), f"{name}.{suffix}"


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"constraint": "mpc_n", "alpha": 12.0}),
        ("flora", {"constraint": "mpc_n", "alpha": 12.0}),
        ("trilora", {"constraint": "mpc_n", "alpha": 12.0}),
        ("houlsby", {}),
        ("pfeiffer", {}),
    ],
)
def test_of_what_is_no_fixed_update_the_product_of_the_factors_is_measured(
    method: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = saved_adapter(method, tmp_path, **config)
    found = [movement for movement in movements(AdapterFolder(tmp_path)) if movement.kind == "factors"]
    assert found
    for movement in found:
        own = {name: p.detach() for name, p in model.get_submodule(movement.layer).trainables().items()}
        if "adapter_up" in own:
            product = own["adapter_up"] @ own["adapter_down"]
        else:
            middle = [own[name] for name in own if name not in ("lora_A", "lora_B")]
            core = (torch.diag(middle[0]) if middle[0].dim() == 1 else middle[0]) if middle else torch.eye(4)
            product = 12.0 / 4 * own["lora_B"] @ core @ own["lora_A"]
        assert movement.norm == pytest.approx(float(product.norm()), rel=1e-4)
        assert movement.largest == pytest.approx(float(torch.linalg.svdvals(product)[0]), rel=1e-4)


def test_scales_of_peft_are_measured_as_deviations_from_one(tmp_path: Path) -> None:
    import peft

    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path)
    found = {m.layer: m for m in movements(AdapterFolder(tmp_path))}
    assert len(found) == 4
    for name, movement in found.items():
        scales = model.base_model.model.get_submodule(name).ia3_l["default"].detach()
        assert (movement.kind, movement.trained) == ("scaling", scales.numel())
        assert movement.norm == pytest.approx(float((scales - 1).norm()), rel=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_rotation_is_measured_as_one(shared: bool, tmp_path: Path) -> None:
    """By tan(θ/2) = 1/2: θ is 53.13 degrees, and each of the two directions of its plane moves by 2 sin(θ/2)."""
    options = {"oft_block_size": 8, "block_share": shared, "cayley": "exact"}
    model = dsub.attach(tiny_model(), SubspaceConfig("oft", target_modules=["q_proj"], options=options))
    for parameter in trainable_parameters(model):
        parameter.data[0, 0] = 0.5
    dsub.save_adapter(model, tmp_path)
    for movement in movements(AdapterFolder(tmp_path)):
        planes = 4 if shared else 1  # of 32 inputs
        moved_by = 2 * math.sin(math.atan(0.5))
        assert movement.kind == "rotation" and movement.angle == pytest.approx(math.degrees(2 * math.atan(0.5)))
        assert movement.largest == pytest.approx(moved_by, rel=1e-5) and movement.rank == 32
        assert movement.norm == pytest.approx((2 * planes) ** 0.5 * moved_by, rel=1e-5)
        assert movement.effective_rank == pytest.approx(2 * planes, rel=1e-3)
    assert "largest angle: 53.1 degrees" in adapter_text(adapter_report(tmp_path))


def test_a_layer_with_a_rank_of_its_own_is_made_with_it(tmp_path: Path) -> None:
    saved_adapter("lora", tmp_path, rank_pattern={"mlp.c_fc": 2})
    ranks = {m.layer.rpartition(".")[2]: m.rank for m in movements(AdapterFolder(tmp_path))}
    assert ranks["c_fc"] == 2 and ranks["c_attn"] == 4


def test_singular_values_are_those_of_the_product() -> None:
    for r, d_in, d_out in ((3, 20, 11), (6, 4, 9)):
        a, b = torch.randn(r, d_in), torch.randn(d_out, r)
        expected = torch.linalg.svdvals(b @ a)
        torch.testing.assert_close(
            singular_values(a, b)[: len(expected)], expected[: min(r, d_in)], atol=1e-5, rtol=1e-4
        )
        assert len(singular_values(a, b)) == min(r, d_in, d_out)


@pytest.mark.parametrize(
    ("singular", "expected"),
    [([2.0, 2, 2, 2], 4.0), ([5.0], 1.0), ([3.0, 0, 0], 1.0), ([0.0, 0], 0.0), ([3.0, 1], 1.7547653506)],
)
def test_the_effective_rank_counts_equal_directions(singular: list[float], expected: float) -> None:
    """The last: exp(-(¾ log ¾ + ¼ log ¼))."""
    assert effective_rank(torch.tensor(singular)) == pytest.approx(expected, rel=1e-6)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 40, "down_proj": 1.5},
}


@pytest.mark.parametrize("settings", [{}, PATTERNS, {**PATTERNS, "use_rslora": True}])
def test_an_adapter_of_peft_is_measured_too(settings: dict[str, Any], tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], **settings)
    compare_with_peft(config, tmp_path)


def test_an_adalora_of_peft_is_measured_too(tmp_path: Path) -> None:
    import peft

    targets = ["q_proj", "down_proj"]
    compare_with_peft(
        peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=12, target_modules=targets, total_step=10), tmp_path
    )


@pytest.mark.parametrize(("kind", "fields"), [("MissConfig", {"r": 4}), ("OFTConfig", {}), ("VeraConfig", {"r": 4})])
def test_what_the_shape_of_a_layer_decides_is_measured_as_the_values_that_were_trained(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(target_modules=["q_proj", "down_proj"], **fields))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    found = {m.layer: m for m in movements(AdapterFolder(tmp_path))}
    assert len(found) == 4
    for name, movement in found.items():
        values = torch.cat([p.flatten() for key, p in trained.items() if f".{name}." in key])
        assert movement.kind == "values" and movement.norm == pytest.approx(float(values.norm()), rel=1e-5)


def test_virtual_tokens_of_peft_are_measured_too(tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model.save_pretrained(tmp_path)
    (found,) = movements(AdapterFolder(tmp_path))
    tokens = model.prompt_encoder["default"].embedding.weight
    assert found.kind == "tokens" and found.trained == tokens.numel()
    assert found.norm == pytest.approx(float(tokens.norm()), rel=1e-5)


def compare_with_peft(config: Any, tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    found = {m.layer: m for m in movements(AdapterFolder(tmp_path))}
    assert len(found) == 4
    for name, movement in found.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        assert movement.norm == pytest.approx(float(delta.norm()), rel=1e-4)


def test_a_stack_of_experts_is_measured_as_its_experts_together(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    model = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes)
    dsub.attach(model, SubspaceConfig(method="lora", rank=2, alpha=8.0, target_parameters=["experts.down_proj"]))
    for parameter in trainable_parameters(model):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    dsub.save_adapter(model, tmp_path)
    found = list(movements(AdapterFolder(tmp_path)))
    assert [movement.layer for movement in found] == list(attached(model).layers)
    for movement in found:
        part = model.get_submodule(movement.layer)
        updates = 8.0 / 2 * part.lora_B.detach() @ part.lora_A.detach()
        assert movement.kind == "update" and movement.trained == part.lora_A.numel() + part.lora_B.numel()
        assert movement.norm == pytest.approx(float(updates.norm()), rel=1e-4)
        assert movement.largest == pytest.approx(float(torch.linalg.svdvals(updates).max()), rel=1e-4)
