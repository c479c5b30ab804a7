"""The keys of the section `model`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from dist_subspace.errors import UsageError
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.run_folder.status import EXIT_USAGE
from dist_subspace.storage import grouped
from dist_subspace.subspace import disabled
from tests.keys.begun import begin, logits, randomised
from tests.keys.bench import UNSET, Bench
from tests.keys.data_reference import all_trained, assert_same, classifying, marked
from tests.keys.remote_code import folder_with_code
from tests.keys.table import Key
from tests.tiny_models import tiny_config, tiny_model
from tests.tiny_run import make_model

IDS = torch.arange(7, 47).view(4, 10)
EACH = ("fp32", "bf16", "fp16", "nf4", "fp4", "int8", "fp8")
FP8 = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))


def path(bench: Bench) -> None:
    other = str(make_model(bench.folder / "other", seed=3))
    reference = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with disabled(begin(bench, {"model.path": other}).model) as model:
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS))


def revision(bench: Bench) -> None:
    """The commit of a tag in the Hub's cache, which transformers reads under the same name; a folder has none."""
    cache = bench.folder / "hub"
    own = cache / "models--own--model"
    for seed, (name, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items(), start=5):
        make_model(own / "snapshots" / commit, seed=seed)
        (own / "refs").mkdir(exist_ok=True)
        (own / "refs" / name).write_text(commit)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_CACHE", str(cache))
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        found = {}
        for asked in ("v1", "b" * 40, UNSET):
            begun = begin(bench, {"model.path": "own/model", "model.revision": asked})
            theirs = {} if asked is UNSET else {"revision": asked}
            reference = AutoModelForCausalLM.from_pretrained(
                "own/model", dtype=torch.float32, cache_dir=str(cache), local_files_only=True, **theirs
            )
            with disabled(begun.model) as model:
                found[asked] = logits(model, IDS)
            torch.testing.assert_close(found[asked], logits(reference, IDS))
            described = adapter_config(begun.model, "own/model")
            assert described.get("revision") == theirs.get("revision"), "where PEFT looks for it"
        assert torch.equal(found["v1"], found["b" * 40]) and not torch.allclose(found["v1"], found[UNSET])
    with pytest.raises(UsageError, match=r"model\.revision is 'v1', but model\.path is .*, a folder"):
        begin(bench, {"model.revision": "v1"})


def task(bench: Bench) -> None:
    """A head that the base lacks, told the labels; each text is read as if it stood alone, whatever stands beside it."""
    kinds = ("warm", "cold", "hot")
    records = [{"text": "so " * n + kinds[n % 3], "label": kinds[n % 3]} for n in range(9)]
    names = sorted(kinds)
    told = {"num_labels": 3, "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    for folder in (bench.folder / "model", _encoder(bench)):
        changes = {"training.per_device_train_batch_size": 4, "model.path": str(folder)}
        begun = begin(bench, classifying(bench, records) | changes)
        model = begun.model
        reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **told)
        assert type(model).__name__ == type(reference).__name__
        assert (model.config.id2label, model.config.label2id) == (told["id2label"], told["label2id"])
        head = "score" if hasattr(reference, "score") else "classifier"
        trained = {name: p for name, p in model.named_parameters() if name.startswith(head) and p.requires_grad}
        assert len(trained) == len(list(reference.get_submodule(head).parameters())), "the head is trained"
        for name, parameter in trained.items():
            reference.get_submodule(head).get_parameter(name.rpartition(".")[2]).data.copy_(parameter.data)
        for micro in begun.micro_batches:
            ids, mask = micro.inputs["input_ids"], micro.inputs["attention_mask"]
            assert ids.shape[1] == 64, "rows are padded to a multiple of 64, and not to data.max_length"
            alone = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
            expected = torch.cat([logits(reference, row[None]) for row in alone])
            torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected)


def _encoder(bench: Bench) -> Path:
    """A BERT that reads both ways: what pads a row would be seen."""
    folder, own = bench.folder / "encoder", AutoTokenizer.from_pretrained(bench.folder / "model")
    sizes = {"vocab_size": len(own), "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    made = BertForSequenceClassification(tiny_config("BertConfig", num_labels=3, **sizes))
    for parameter in made.parameters():
        parameter.data.mul_(3)
    made.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def storage(bench: Bench) -> None:
    """The linear layers of the blocks, in each storage what bitsandbytes or torch makes of them; all else as it is."""
    for kind in EACH:
        _holds(bench, {"model.storage": kind, "model.double_quant": False}, kind, nested=False)


def double_quant(bench: Bench) -> None:
    """The statistics of 4 bits quantised too, as bitsandbytes does it."""
    size = {}
    for nested in (True, False):
        model = _holds(bench, {"model.storage": "nf4", "model.double_quant": nested}, "nf4", nested=nested)
        size[nested] = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "absmax" in n)
    assert size[True] * 3 < size[False], "statistics in a byte each take a fourth of those in float32"
    unset = begin(bench, {"model.storage": "nf4", "model.double_quant": UNSET}).model
    assert sum(p.numel() * p.element_size() for n, p in unset.named_parameters() if "absmax" in n) == size[True]


def storage_options(bench: Bench) -> None:
    """A storage's own options, which outweigh the older name where that is not given."""
    given = {"model.storage": "fp4", "model.double_quant": UNSET}
    for nested in (True, False):
        _holds(bench, given | {"model.storage_options": {"double_quant": nested}}, "fp4", nested=nested)
    with pytest.raises(UsageError, match=r"model\.storage_options\.block is no option of storage 'fp4'"):
        begin(bench, given | {"model.storage_options": {"block": 32}})


def head_storage(bench: Bench) -> None:
    """The head's matrix is what bitsandbytes makes of it, whatever holds the layers; a head that is the embedding is refused."""
    weight = bench.base_model().lm_head.weight.data
    for kind, given in (("nf4", "int8"), ("int8", "bf16"), (None, "nf4")):
        changes = {"model.storage": given, "model.double_quant": False, "model.head_storage": kind}
        head = begin(bench, changes).model.lm_head
        assert head.storage == (kind or "bf16")
        expected = weight.bfloat16().float() if kind is None else _held(weight, kind, nested=False)
        torch.testing.assert_close(head.dense(torch.float32), expected, rtol=0, atol=0)
    tied = str(make_model(bench.folder / "tied", tied=True))
    with pytest.raises(UsageError, match=r"model\.head_storage is 'nf4', but lm_head .* is its embedding"):
        _ = begin(bench, {"model.path": tied, "model.head_storage": "nf4"}).model


def _holds(bench: Bench, changes: dict[str, Any], kind: str, nested: bool) -> nn.Module:
    model = begin(bench, {"subspace.init_from": UNSET, "subspace.rank": 2, **changes}).model
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(kind, torch.bfloat16)
    base, seen = bench.base_model(), 0
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            held = model.get_submodule(name).base
            expected = _held(module.weight.data, kind, nested)
            torch.testing.assert_close(held.dense(torch.float32), expected, rtol=0, atol=0, msg=f"{kind}: {name}")
            assert held.storage == kind
            seen += 1
    assert seen == 14
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        found = dict(model.named_parameters()).get(name)
        found = model.get_submodule(name.rpartition(".")[0]).weight if found is None else found
        assert torch.equal(found, base.get_parameter(name).to(dtype)), f"{kind}: {name}"
    return model


def _held(weight: Tensor, kind: str, nested: bool) -> Tensor:
    """float32: what a storage keeps of a matrix."""
    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        return codes.float() * (scale.float() / 127)[:, None]
    if kind in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        state.shape = torch.Size((1, weight.numel()))  # its CPU kernel reads rows of less than a block wrongly
        return bnb.dequantize_4bit(packed, state).view_as(weight).float()
    if kind == "fp8":
        edge = [0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128]
        theirs = Fp8Quantize(FP8).convert({"weight": functional.pad(weight, edge)})
        whole = theirs["weight"].float() * theirs["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(
            128, 1
        )
        return whole[: weight.shape[0], : weight.shape[1]]
    return weight.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]).float()


def dtype(bench: Bench) -> None:
    """What is not packed is held in it, and the computation is in it: in float32 the product with what bitsandbytes unpacks."""
    for kind in ("float32", "bfloat16", "float16"):
        model = begin(bench, {"model.storage": "nf4", "model.double_quant": False, "model.dtype": kind}).model
        reference = AutoModelForCausalLM.from_pretrained(bench.folder / "model", dtype=getattr(torch, kind))
        table = model.get_input_embeddings().weight
        assert torch.equal(table, reference.get_input_embeddings().weight) and table.dtype == reference.dtype
        with disabled(model):
            found = logits(model, IDS)
        assert found.dtype == reference.dtype
        if kind != "float32":
            continue
        for name, module in reference.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = _held(module.weight.data, "nf4", nested=False)
        torch.testing.assert_close(found, logits(reference, IDS))
    unset = begin(bench, {"model.storage": "nf4", "model.dtype": UNSET})
    assert unset.plan.dtype == torch.bfloat16 == unset.model.get_input_embeddings().weight.dtype


def attn_implementation(bench: Bench) -> None:
    """Eager attention gives its weights, as transformers' does; unset, the choice is transformers' own."""
    for kind in ("eager", UNSET):
        options = {} if kind is UNSET else {"attn_implementation": kind}
        model = begin(bench, {"model.attn_implementation": kind}).model
        reference = AutoModelForCausalLM.from_pretrained(bench.folder / "model", dtype=torch.float32, **options)
        assert model.config._attn_implementation == reference.config._attn_implementation
        if kind == "eager":
            with torch.no_grad(), disabled(model.eval()):
                found = model(input_ids=IDS, output_attentions=True).attentions
                expected = reference.eval()(input_ids=IDS, output_attentions=True).attentions
            torch.testing.assert_close(found, expected)


def tokenizer(bench: Bench) -> None:
    """Its ids are trained on, and not those of the model's own folder."""
    found = begin(bench, {"model.tokenizer": marked(bench)}).rows
    own = begin(bench, {}).rows
    texts = [json.loads(line)["text"] for line in Path(bench.data).read_text().splitlines()]
    for folder, rows in ((marked(bench), found), (bench.folder / "model", own)):
        other = AutoTokenizer.from_pretrained(folder)
        assert_same(rows, [all_trained(other, text) for text in texts], "model.tokenizer")
    assert sorted(found) != sorted(own)


def new_tokens(bench: Bench) -> None:
    """Rows of their own that begin at the mean, with the gradients of those of larger tables; the tables have none."""
    data = bench.write("new.jsonl", [{"text": f"<b> {n}<a>!"} for n in range(4)])
    changes = {"model.new_tokens": ["<a>", "<b>"], "data.train": data, "subspace.init_from": UNSET, "subspace.rank": 2}
    begun = begin(bench, changes)
    own = AutoTokenizer.from_pretrained(bench.folder / "model")
    own.add_tokens(["<a>", "<b>"], special_tokens=True)
    expected = [all_trained(own, f"<b> {n}<a>!") for n in range(4)]
    assert_same(begun.rows, expected, "each new token is one id")
    reference, model = bench.base_model(), begun.model
    vocabulary = reference.config.vocab_size
    reference.resize_token_embeddings(len(own), mean_resizing=False)
    tables = (reference.get_input_embeddings().weight, reference.get_output_embeddings().weight)
    for table in tables:
        table.data[vocabulary:] = table.data[:vocabulary].mean(0)
    ids = torch.tensor([row for row, _ in expected])
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    reference.train()(input_ids=ids, labels=ids).loss.backward()
    for name, table in zip(("embedding", "head"), tables, strict=True):
        rows = model.get_parameter(f"new_tokens.{name}")
        torch.testing.assert_close(rows.data, table.data[vocabulary:], msg=f"{name} does not begin at the mean")
        torch.testing.assert_close(rows.grad, table.grad[vocabulary:])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert trained == {"new_tokens.embedding", "new_tokens.head"}
    outcome = bench.run(changes | {"training.max_steps": 2, "training.global_batch_size": 4})
    saved = outcome.adapter
    for name, table in zip(("embedding", "head"), tables, strict=True):
        rows = saved[f"base_model.model.new_tokens.{name}"]
        assert rows.shape == (2, 32) and bool((rows != table.data[vocabulary:]).all()), "each row is trained"


def experts_at_once(bench: Bench) -> None:
    """Where a device multiplies with several experts in one call, at most so many of their matrices are dequantised for it, and
    the run computes what it computes one by one."""
    changes = {"model.path": str(_mixture(bench)), "model.storage": "nf4", "subspace.init_from": UNSET}
    changes |= {"subspace.rank": 2, "model.tokenizer": marked(bench)}
    found, seen = {}, []
    real = grouped.grouped_mm
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grouped, "grouped_mm", lambda x, w, ends: seen.append(len(w)) or real(x, w, ends))
        for number in (1, 3, UNSET):
            model = begin(bench, changes | {"model.experts_at_once": number}).model.eval()
            alone = logits(model, IDS)
            assert not seen
            patched.setattr(grouped, "has_grouped_kernel", lambda device, dtype: True)
            torch.testing.assert_close(logits(model, IDS), alone, rtol=2e-2, atol=2e-2)
            patched.setattr(grouped, "has_grouped_kernel", lambda device, dtype: False)
            found[number] = max(seen)
            seen.clear()
    assert found == {1: 1, 3: 3, UNSET: 8}


def _mixture(bench: Bench) -> Path:
    """Twelve experts, four for each token."""
    folder = bench.folder / "mixture"
    torch.manual_seed(0)
    sizes = {"num_local_experts": 12, "num_experts_per_tok": 4, "num_key_value_heads": 2, "vocab_size": 258}
    tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes).save_pretrained(folder)
    return folder


def trust_remote_code(bench: Bench) -> None:
    """Code in the model's folder is run where that is said, as transformers runs it, and refused else."""
    folder = folder_with_code(bench.folder / "code")
    refused = bench.run({"model.path": folder, "model.tokenizer": marked(bench)}, expect=EXIT_USAGE)
    assert (
        "model.trust_remote_code true" in refused.message and refused.said.count("error: ") == 1 and not refused.calls
    )
    changes = {"model.path": folder, "model.tokenizer": marked(bench), "model.trust_remote_code": True}
    model = begin(bench, changes).model
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    assert type(model).__name__ == type(reference).__name__ == "Louder"
    with disabled(randomised(model)):
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS))
    assert not torch.allclose(logits(reference, IDS), logits(bench.base_model(), IDS))


_TRANSFORMERS, _BNB = "transformers' from_pretrained", "bitsandbytes' quantisers"
KEYS = [
    Key("model.path", ("another folder",), "the base model", f"{_TRANSFORMERS}: logits", path),
    Key("model.revision", ("a tag", "a commit"), "the base model", f"{_TRANSFORMERS}: logits", revision),
    Key(
        "model.task",
        ("classification",),
        "the head, and what is padded",
        f"{_TRANSFORMERS}: logits of each row alone",
        task,
    ),
    Key("model.storage", EACH, "the values of the linear layers", f"{_BNB}, torch's casts", storage),
    Key("model.double_quant", (True, False), "statistics in a byte", _BNB, double_quant),
    Key("model.storage_options", ("double_quant",), "the bytes of the linear layers", _BNB, storage_options),
    Key("model.head_storage", ("nf4", "int8", None), "the values of the head", _BNB, head_storage),
    Key("model.dtype", ("float32", "bfloat16", "float16"), "all else, and the computation", _TRANSFORMERS, dtype),
    Key("model.attn_implementation", ("eager",), "the attention", f"{_TRANSFORMERS}: attentions", attn_implementation),
    Key("model.tokenizer", ("another folder",), "the ids", "AutoTokenizer of both folders", tokenizer),
    Key(
        "model.new_tokens", (["<a>", "<b>"],), "rows that are trained", "resize_token_embeddings: gradients", new_tokens
    ),
    Key("model.experts_at_once", (1, 3), "matrices in one product", "the products one by one", experts_at_once),
    Key("model.trust_remote_code", (True, False), "code of the folder", f"{_TRANSFORMERS}: logits", trust_remote_code),
]
