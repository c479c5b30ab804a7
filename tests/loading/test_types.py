"""Types and computed tables are transformers' own, in every type of the computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.notices import heard
from dist_subspace.storage import FrozenLinear, pack
from tests.ranks import run_on_ranks
from tests.tiny_models import FAMILIES, logits, tiny_config, tiny_model

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LONG = 512
_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MINIMAX = {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8, "head_dim": 8, "num_key_value_heads": 2}
_HUNYUAN = {"num_experts": 2, "moe_topk": 1, "head_dim": 8, "num_key_value_heads": 2}
_LLAMA3 = {"rope_parameters": _ROPE | {"original_max_position_embeddings": 32}}

# families that compute a table when they are made, keep a parameter in float32, never save one, or save a buffer
MADE: dict[str, tuple[str, Any]] = {
    "gptj": ("causal-lm", tiny_config("GPTJConfig", n_positions=_LONG)),
    "codegen": ("causal-lm", tiny_config("CodeGenConfig", n_positions=_LONG)),
    "minimax": ("causal-lm", tiny_config("MiniMaxConfig", **_MINIMAX)),
    "llama3": ("causal-lm", tiny_config("LlamaConfig", **_LLAMA3)),
    "hunyuan": ("causal-lm", tiny_config("HunYuanMoEV1Config", **_HUNYUAN)),
    "deepseek": ("causal-lm", tiny_config("DeepseekV3Config")),
    "marian": ("seq2seq-lm", tiny_config("MarianConfig", max_position_embeddings=_LONG)),
    "m2m100": ("seq2seq-lm", tiny_config("M2M100Config", max_position_embeddings=_LONG)),
    "t5": ("seq2seq-lm", tiny_config("T5Config")),
}
AUTO = {"causal-lm": transformers.AutoModelForCausalLM, "seq2seq-lm": transformers.AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for name, (task, config) in MADE.items():
        model = AUTO[task].from_config(config)
        stored = model.state_dict()
        for buffer in (stored[key] for key, _ in model.named_buffers() if key in stored):
            buffer += torch.rand_like(buffer)  # as training leaves it, and not as it is made
        model.save_pretrained(root / name)
    return {name: root / name for name in MADE}


def named(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", MADE)
def test_every_tensor_has_the_type_and_the_values_that_transformers_gives_it(
    family: str, storage: str, folders: dict[str, Path]
) -> None:
    task = MADE[family][0]
    expected = named(AUTO[task].from_pretrained(folders[family], dtype=STORAGES[storage]))
    ours = named(dsub.load_frozen(folders[family], storage=storage, task=task))
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def overflowing_t5(folder: Path) -> Path:
    """A T5 whose `wo` makes sums that float16 cannot hold, as the real ones do."""
    model = tiny_model("T5ForConditionalGeneration")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wi.weight", "wo.weight")):
                parameter.mul_(60)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("storage", ["fp16", "nf4", "int8"])
def test_what_a_family_keeps_in_float32_does_not_overflow_in_float16(storage: str, tmp_path: Path) -> None:
    overflowing_t5(tmp_path)
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    model = dsub.load_frozen(tmp_path, storage=storage, dtype="float16", task="seq2seq-lm")
    kept = [m for n, m in model.named_modules() if n.endswith(".wo")]
    assert all(isinstance(m, FrozenLinear) and m.storage == "fp32" for m in kept) and len(kept) == 4
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):  # the same weights, so that only the computation is compared
            plain.get_submodule(name).weight.data.copy_(module.dense(torch.float32))
    expected = logits(plain)
    assert expected.isfinite().all()
    torch.testing.assert_close(logits(model).float(), expected.float(), rtol=2e-2, atol=2e-2)


def rewritten(folder: Path, dtype: torch.dtype, factor: float = 1.0) -> dict[str, Tensor]:
    """A Llama's folder with its matrices in another type; what the file holds, in float64."""
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    made = {
        k: (t * (factor if k.endswith("up_proj.weight") else 1)).to(dtype) if t.dim() == 2 else t
        for k, t in tensors.items()
    }
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return {key: tensor.double() for key, tensor in made.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "bf16", "fp16", "fp32"])
def test_a_file_in_another_float_type_is_held_in_every_storage(
    storage: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    held = rewritten(tmp_path, dtype)
    model = dsub.load_frozen(tmp_path, storage=storage)
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and name != "lm_head":
            expected = pack(held[f"{name}.weight"].float(), storage)
            assert torch.equal(module.dense(torch.float32), expected.dense(torch.float32)), name


def test_weights_beyond_float16_are_right_in_int8_and_refused_where_float16_computes(tmp_path: Path) -> None:
    held = rewritten(tmp_path, torch.bfloat16, factor=1e6)
    assert max(float(t.abs().max()) for t in held.values()) > 65504
    for storage, error in (("int8", 1 / 127), ("nf4", 0.16), ("bf16", 0.0), ("fp32", 0.0)):
        model = dsub.load_frozen(tmp_path, storage=storage)
        for name, module in model.named_modules():
            if isinstance(module, FrozenLinear) and name != "lm_head":
                weight = held[f"{name}.weight"]
                bound = error * weight.abs().amax(1 if storage == "int8" else (0, 1), keepdim=True)
                assert ((module.dense(torch.float32) - weight).abs() <= bound).all(), (storage, name)
        assert logits(model).isfinite().all()
    for storage in ("fp16", "nf4", "int8"):
        with pytest.raises(
            UsageError, match=r"up_proj\.weight has values up to [\d,]+, which float16 cannot hold; accepted"
        ):
            dsub.load_frozen(tmp_path, storage=storage, dtype="float16")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["embed_tokens", "up_proj", "model.norm"])
def test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused(
    part: str, kind: torch.dtype, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (key, *_) = [key for key in tensors if key.endswith(f"{part}.weight")]
    tensors[key] = tensors[key].to(kind)
    tensors[key].view(-1)[3] = -1e5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"whose {key} has values up to [\d,]+, which float16 cannot hold"):
        dsub.load_frozen(tmp_path, storage="fp16")


def test_the_rows_that_float16_holds_keep_their_bytes_in_int8() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    large = weight.clone()
    large[2] *= 1e6
    assert math.isinf(float(large.half().abs().max()))
    plain, mixed = pack(weight, "int8"), pack(large, "int8")
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(plain.codes[rows], mixed.codes[rows])
    assert torch.equal(plain.dense()[rows], mixed.dense()[rows])


def test_a_fresh_head_takes_the_initial_values_of_the_innermost_model(tmp_path: Path) -> None:
    tiny_model("T5ForConditionalGeneration").save_pretrained(tmp_path)
    model = dsub.load_frozen(tmp_path, storage="fp32", task="classification")
    head = model.classification_head
    assert 0 < head.out_proj.dense().std() < 1 and not head.out_proj.bias.any()
    assert FAMILIES["T5ForConditionalGeneration"][1] == "seq2seq-lm"


def heard_with_engine(folder: str, stage: int) -> list[str]:
    sentences: list[str] = []
    settings = {"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    with heard(sentences.append):
        dsub.load_frozen(folder, storage="fp16", task="seq2seq-lm", deepspeed=settings)
    return sentences


def test_an_engine_that_will_cast_what_a_family_keeps_in_float32_is_said(tmp_path: Path) -> None:
    tiny_model("T5ForConditionalGeneration").save_pretrained(tmp_path)
    ((said,),) = run_on_ranks(1, heard_with_engine, str(tmp_path), 2)
    assert (
        "DenseReluDense.wo.weight and 3 more in float32, but DeepSpeed casts them with fp16.enabled at stage 2" in said
    )
    assert run_on_ranks(1, heard_with_engine, str(tmp_path), 3) == [[]]


@pytest.mark.parametrize("part", ["embed_tokens", "q_proj", "norm"])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8])
def test_integers_are_no_weights_of_any_layer(kind: torch.dtype, part: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: t.to(kind) if part in k else t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{part}.*weight as {kind}; accepted: a floating-point weight"):
        dsub.load_frozen(tmp_path, storage="fp32")
