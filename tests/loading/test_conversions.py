"""Families whose files hold other tensors than the model (experts one by one, fused projections) load as in transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.loading.original import original_of
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenLinear
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_config, tiny_inputs

_QWEN = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
_QWEN |= {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
_LOCAL = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}

# what the file holds -> task, configuration
FAMILIES: dict[str, tuple[str, Any]] = {
    # 10 comes before 2 in the order of texts
    "experts one by one": ("causal-lm", tiny_config("MixtralConfig", **_LOCAL | {"num_local_experts": 11})),
    "experts beside a shared one": ("causal-lm", tiny_config("Qwen2MoeConfig", **_QWEN)),
    "experts as one tensor": ("causal-lm", tiny_config("GraniteMoeConfig", **_LOCAL)),
    "experts with biases": ("causal-lm", tiny_config("GptOssConfig", **_LOCAL, head_dim=8, sliding_window=8)),
    "one projection for three": ("masked-lm", tiny_config("NomicBertConfig")),
}
AUTO = {"causal-lm": transformers.AutoModelForCausalLM, "masked-lm": transformers.AutoModelForMaskedLM}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for name, (task, config) in FAMILIES.items():
        torch.manual_seed(0)
        model = AUTO[task].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name, max_shard_size="20KB")
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_what_transformers_makes_of_the_file(
    family: str, storage: str, folders: dict[str, Path]
) -> None:
    task = FAMILIES[family][0]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    expected = AUTO[task].from_pretrained(folders[family], dtype=dtype).eval()
    model = dsub.load_frozen(folders[family], storage=storage, task=task)
    ours = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(ours[name], parameter), name
    if storage == "fp32":  # torch multiplies stacks of so few columns in no 16 bits
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-4)


def test_parts_of_a_fused_projection_are_packed_and_read_again(folders: dict[str, Path]) -> None:
    task, _ = FAMILIES["one projection for three"]
    folder = folders["one projection for three"]
    plain = AUTO[task].from_pretrained(folder)
    model = dsub.load_frozen(folder, storage="nf4", task=task)
    for part in ("q_proj", "k_proj", "v_proj"):
        (name,) = [n for n, _ in model.named_modules() if n.endswith(f"0.self_attn.{part}")]
        operator = model.get_submodule(name)
        assert isinstance(operator, FrozenLinear) and operator.storage == "nf4"
        assert torch.equal(original_of(operator), plain.get_submodule(name).weight)


def merged(family: str, folders: dict[str, Path], out: Path) -> tuple[Tensor, Tensor]:
    task = FAMILIES[family][0]
    model = dsub.load_frozen(folders[family], storage="fp32", task=task)
    model = dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=1))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    dsub.merge(model, out, report=None)
    return logits(model.eval()), logits(AUTO[task].from_pretrained(out).eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_is_read_as_the_model_that_was_merged(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours, again = merged(family, folders, tmp_path / "out")
    torch.testing.assert_close(again, ours, rtol=1e-4, atol=1e-4)


def changed(folders: dict[str, Path], path: Path, family: str, pattern: str, value: Tensor | None) -> Path:
    """A copy as one file, without the keys that the pattern finds, or with other values for them."""
    tensors: dict[str, Tensor] = {}
    for file in folders[family].glob("*.safetensors"):
        tensors |= load_file(file)
    found = [key for key in tensors if re.search(pattern, key)]
    assert found
    for key in found:
        del tensors[key]
    tensors |= {} if value is None else dict.fromkeys(found, value)
    FAMILIES[family][1].save_pretrained(path)
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
    )
    return path


@pytest.mark.parametrize(
    ("pattern", "value", "sentence"),
    [
        (
            r"layers\.1\..*experts\.2\.w1",
            None,
            r"experts\..*w1\.weight and \d+ more cannot become .*experts\.gate_up_proj \(",
        ),
        (
            r"layers\.1\..*experts\.2\.w2",
            None,
            r"\(and what belongs to it\) for .*down_proj as \[10, 32, 44\], but .*\[11, ",
        ),
        (r"layers\.1\..*experts", None, r"whose weights lack model\.layers\.1\..*experts\.\w+_proj"),
        (r"layers\.0\..*experts\.0\.w2", torch.ones(32, 43), r"cannot become the model's .*experts\.down_proj \("),
    ],
)
def test_experts_that_are_missing_or_of_another_shape_are_one_sentence(
    pattern: str, value: Tensor | None, sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    changed(folders, tmp_path, "experts one by one", pattern, value)
    with pytest.raises(UsageError, match=sentence) as caught:
        dsub.load_frozen(tmp_path, storage="nf4")
    assert "\n" not in str(caught.value)


def split(folder: str) -> tuple[bool, Tensor]:
    stage3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    model = dsub.load_frozen(folder, storage="nf4", dtype="float32", deepspeed=stage3)
    parameters = list(model.parameters())
    with gathered(parameters):
        return all(map(is_partitioned, parameters)), logits(model)


def test_on_split_weights_too(folders: dict[str, Path]) -> None:
    folder = folders["experts one by one"]
    expected = logits(dsub.load_frozen(folder, storage="nf4", dtype="float32"))
    for partitioned, rank in run_on_ranks(2, split, str(folder)):
        assert partitioned
        torch.testing.assert_close(rank, expected, rtol=1e-4, atol=1e-4)
