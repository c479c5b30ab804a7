"""`load_frozen`: the same function as transformers' own loading, for every family, in one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.loading import computation_type
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.storage import FrozenLinear, storage_info, storages
from tests.tiny_models import FAMILIES, logits, tiny_config, tiny_inputs, tiny_model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def saved(folder: Path, name: str = "LlamaForCausalLM", **changes: Any) -> Any:
    shard_size = changes.pop("max_shard_size", "5GB")
    model = tiny_model(name, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_logits_are_those_of_transformers(name: str, max_shard_size: str, tmp_path: Path) -> None:
    original = saved(tmp_path, name, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    model = dsub.load_frozen(tmp_path, storage="fp32", task=FAMILIES[name][1])
    assert type(model) is type(original) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("storage", sorted(storages()))
def test_in_every_storage_the_model_computes_what_its_dense_weights_compute(
    name: str, storage: str, tmp_path: Path
) -> None:
    original = saved(tmp_path, name)
    dtype = storage_info(storage).dtype or torch.float32
    model = dsub.load_frozen(tmp_path, storage=storage, task=FAMILIES[name][1], dtype=dtype, double_quant=True)
    plain = getattr(transformers, name).from_pretrained(tmp_path, dtype=dtype).eval()
    held = 0
    for module_name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            held += module.storage == storage
            weight = plain.get_submodule(module_name).weight
            dense = module.dense(dtype)
            weight.data.copy_(dense.t() if type(plain.get_submodule(module_name)).__name__ == "Conv1D" else dense)
    assert held >= 8
    size = logits(original).abs().max().item()
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
def test_without_a_dtype_the_computation_is_in_bfloat16(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    monkeypatch.setattr(computation_type, "cpu_multiplies", lambda dtype: True)
    model = dsub.load_frozen(tmp_path, storage=storage)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_a_float_storage_is_computed_in_its_own_type(storage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    model = dsub.load_frozen(tmp_path, storage=storage)
    assert logits(model).dtype == DTYPES[storage] and model.model.norm.weight.dtype == DTYPES[storage]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.float16])
def test_a_packed_storage_takes_any_dtype(dtype: str | torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert logits(dsub.load_frozen(tmp_path, storage="nf4", dtype=dtype)).dtype == expected


def test_a_checkpoint_in_another_type_is_cast(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = dsub.load_frozen(tmp_path, storage="fp32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(plain))


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "T5ForConditionalGeneration"):
        saved(tmp_path / name, name, tie_word_embeddings=True)
        model = dsub.load_frozen(tmp_path / name, storage="nf4", task=FAMILIES[name][1])
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, name
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight


def test_untied_embeddings_stay_two(tmp_path: Path) -> None:
    original = saved(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=False)
    model = dsub.load_frozen(tmp_path, storage="fp32")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_rotary_frequencies_are_real_and_right_in_every_dtype(tmp_path: Path) -> None:
    original = saved(tmp_path)
    for storage in ("fp32", "bf16", "nf4"):
        model = dsub.load_frozen(tmp_path, storage=storage)
        assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


def test_every_operator_remembers_where_its_rows_lie(tmp_path: Path) -> None:
    original = saved(tmp_path, "GPT2LMHeadModel", max_shard_size="20KB")
    model = dsub.load_frozen(tmp_path, storage="nf4")
    index = open_checkpoint(tmp_path)
    operators = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear) and n != "lm_head"}
    assert len(operators) == 8
    for name, operator in operators.items():
        assert operator.origin is not None
        assert Path(operator.origin.file) == index.files[operator.origin.key]
        assert torch.equal(index.read(operator.origin.key), original.get_submodule(name).weight)


def test_a_body_alone_gets_a_new_head_that_is_a_function_of_the_seed(tmp_path: Path) -> None:
    body = tiny_model("BertModel", config_name="BertConfig")
    body.save_pretrained(tmp_path)

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed + 100)  # what ran before must not matter
        return dsub.load_frozen(tmp_path, storage="fp32", task="classification", seed=seed, num_labels=3)

    first, again, other = load(0), load(0), load(1)
    assert first.classifier.weight.shape == (3, 32)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert 0 < first.classifier.weight.std() < 0.1 and not first.classifier.bias.any()
    inputs = tiny_inputs(body)
    torch.testing.assert_close(first.bert(**inputs).last_hidden_state, body(**inputs).last_hidden_state)


def test_a_fresh_head_does_not_touch_the_random_state(tmp_path: Path) -> None:
    tiny_model("BertModel", config_name="BertConfig").save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    dsub.load_frozen(tmp_path, storage="fp32", task="classification")
    assert torch.equal(torch.rand(3), expected)


def test_a_body_alone_loads_as_a_causal_lm_through_its_tied_head(tmp_path: Path) -> None:
    body = tiny_model("GPT2Model", config_name="GPT2Config")
    body.save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(dsub.load_frozen(tmp_path, storage="fp32")), logits(plain))


def test_a_whole_model_loads_as_its_body_alone(tmp_path: Path) -> None:
    original = saved(tmp_path)
    body = dsub.load_frozen(tmp_path, storage="fp32", task="base")
    inputs = tiny_inputs(original)
    torch.testing.assert_close(body(**inputs).last_hidden_state, original.model(**inputs).last_hidden_state)


def test_a_roberta_body_gets_its_whole_new_head(tmp_path: Path) -> None:
    tiny_model("RobertaModel", config_name="RobertaConfig").save_pretrained(tmp_path)
    model = dsub.load_frozen(tmp_path, storage="nf4", dtype="float32", task="classification")
    for part in (model.classifier.dense, model.classifier.out_proj):
        assert part.storage == "fp32" and part.dense().std() > 0, "a new head stays in the type of the computation"


def test_the_models_of_the_data_folder_load(stories260k: Path) -> None:
    model = dsub.load_frozen(stories260k, storage="fp32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(stories260k).eval()
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-4)


def test_progress_counts_every_byte_of_the_checkpoint_once(tmp_path: Path) -> None:
    saved(tmp_path)  # embedding and head are one tensor
    seen: list[tuple[int, int]] = []
    dsub.load_frozen(tmp_path, storage="nf4", progress=lambda done, total: seen.append((done, total)))
    index = open_checkpoint(tmp_path)
    total = sum(map(index.size, index))
    assert {every for _, every in seen} == {total} and seen[-1][0] == total
    counts = [done for done, _ in seen]
    assert counts == sorted(counts) and len(set(counts)) > 10


def test_generation_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    original = tiny_model()
    original.generation_config.max_new_tokens = 3
    original.save_pretrained(tmp_path)
    model = dsub.load_frozen(tmp_path, storage="fp32")
    inputs = tiny_inputs(model)
    assert torch.equal(model.generate(**inputs, do_sample=False), original.generate(**inputs, do_sample=False))


# What is wrong with a folder is said in one sentence, before anything large is read.


def test_no_such_folder_is_said() -> None:
    with pytest.raises(
        UsageError, match=r"model\.path is './no/such/folder', which is no folder; accepted: a transformers"
    ):
        dsub.load_frozen("./no/such/folder")


def test_a_folder_without_a_configuration_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.path is .* which is no model folder: it has no config\.json"):
        dsub.load_frozen(tmp_path)


def test_a_configuration_that_nobody_knows_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-like-it"}))
    with pytest.raises(UsageError, match=r"config\.json is not understood by transformers .*nothing-like-it"):
        dsub.load_frozen(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not understood by transformers"):
        dsub.load_frozen(tmp_path)


def test_a_folder_without_weights_is_said(tmp_path: Path) -> None:
    tiny_config("LlamaConfig", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"holds no weights; looked for model\.safetensors and model\.safetensors\.index\.json"
    ):
        dsub.load_frozen(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    tiny_config("LlamaConfig").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        UsageError, match=r"only as pickles \(pytorch_model\.bin\), and pickles run code when read; convert"
    ):
        dsub.load_frozen(tmp_path)


def test_a_truncated_file_is_said(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        UsageError, match=r"model\.safetensors is no whole safetensors file .*; copy or download it again"
    ):
        dsub.load_frozen(tmp_path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UsageError, match=f"index.json names {shard.name}, which is not in the folder"):
        dsub.load_frozen(tmp_path)


def test_a_tensor_that_the_index_lacks_is_said(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    key = next(k for k in listed["weight_map"] if "q_proj" in k)
    only = [k for k, f in listed["weight_map"].items() if f == listed["weight_map"][key]]
    for k in only:
        del listed["weight_map"][k]
    index.write_text(json.dumps(listed))
    with pytest.raises(
        UsageError, match=r"whose weights lack .*; the checkpoint is incomplete or of another architecture"
    ):
        dsub.load_frozen(tmp_path)


def test_a_tensor_that_the_file_lacks_is_said(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(listed["weight_map"].values()))
    index.write_text(json.dumps(listed))
    with pytest.raises(UsageError, match=r"says that 'model\.layers\.7\..*' is in .*, but the file does not hold it"):
        dsub.load_frozen(tmp_path)


def test_an_index_that_is_none_is_said(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    for text in ("{", "[]", '{"weights": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UsageError, match=r"index\.json is no checkpoint index .*; expected JSON with a weight_map"):
            dsub.load_frozen(tmp_path)


def test_a_shape_that_contradicts_the_configuration_is_said(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(UsageError, match=r"holds .*_proj\.weight as \[.*44.*\], but config\.json asks for \[.*48.*\]"):
        dsub.load_frozen(tmp_path)


def test_more_layers_than_the_weights_have_are_said(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UsageError, match=r"whose weights lack model\.layers\.2\..* and \d+ more"):
        dsub.load_frozen(tmp_path, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "nf5"}, r"storage is 'nf5' \(did you mean 'nf4'\?\); accepted: .*int8"),
        ({"task": "casual-lm"}, r"model\.task is 'casual-lm' \(did you mean 'causal-lm'\?\); accepted: causal-lm, "),
        ({"storage": "nf4", "dtype": "float8"}, r"model\.dtype is 'float8' .*; accepted: float32, bfloat16, float16"),
        (
            {"storage": "fp32", "dtype": "bfloat16"},
            r"model\.dtype is 'bfloat16', which contradicts model\.storage 'fp32'; accepted with it: float32, null",
        ),
        ({"deepspeed": "no/such.json"}, r"deepspeed(\.config)? is 'no/such.json', which cannot be read \(No such file"),
        ({"task": "seq2seq-lm"}, r"a llama model cannot be made for model\.task 'seq2seq-lm'"),
    ],
)
def test_an_argument_that_is_not_accepted_is_said(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UsageError, match=message):
        dsub.load_frozen(tmp_path, **arguments)


def test_a_deepspeed_file_that_is_not_json_is_said(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "ds.json").write_text('{\n"zero_optimization": }')
    with pytest.raises(UsageError, match=r"which is not JSON at line 2"):
        dsub.load_frozen(tmp_path, deepspeed=str(tmp_path / "ds.json"))


def test_a_language_model_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    tiny_model("Qwen2Model", config_name="Qwen2Config", tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"whose weights lack lm_head\.weight; the checkpoint is incomplete"):
        dsub.load_frozen(tmp_path)


def test_an_old_checkpoint_with_gamma_and_beta_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = saved(tmp_path, "BertForMaskedLM")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for k, t in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, file, metadata={"format": "pt"})
    torch.testing.assert_close(logits(dsub.load_frozen(tmp_path, storage="fp32", task="masked-lm")), logits(original))


def test_an_argument_that_nothing_takes_is_refused_and_one_of_the_configuration_taken(tmp_path: Path) -> None:
    tiny_model("BertForSequenceClassification").save_pretrained(tmp_path)
    for wrong in ({"storge": "nf4"}, {"load_in_4bit": True}, {"num_lables": 3}):
        with pytest.raises(
            UsageError, match=f"{next(iter(wrong))} is no argument of load_frozen and no entry of a bert"
        ):
            dsub.load_frozen(tmp_path, task="classification", **wrong)
    assert dsub.load_frozen(tmp_path, task="classification", hidden_dropout_prob=0.3).config.hidden_dropout_prob == 0.3


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_no_base_model(whole: bool, tmp_path: Path) -> None:
    base = dsub.attach(tiny_model(), dsub.SubspaceConfig(method="lora", rank=2))
    dsub.save_adapter(base, tmp_path)
    if whole:  # transformers would put the adapter on
        tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"holds an adapter \(adapter_config\.json\).*give the base model"):
        dsub.load_frozen(tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "auto"}, "no attribute 'auto'"),
        ({"hidden_size": "large"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "foo"}, "KeyError 'foo'"),
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, "KeyError 'foo'"),
        ({"pad_token_id": 1000}, "Padding_idx must be within num_embeddings"),
    ],
    ids=str,
)
def test_a_value_that_the_family_does_not_know_is_one_sentence(
    entry: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(UsageError, match=said) as caught:
        dsub.load_frozen(tmp_path)
    assert "\n" not in str(caught.value)
