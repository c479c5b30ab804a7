"""The models that the speed benchmark times, each pair checked for equal results first."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from bitsandbytes import nn as bnb_nn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dist_subspace as dsub
from dist_subspace import storage as storages

RANK, ALPHA = 8, 16
BATCH, LENGTH, VOCABULARY = 2, 256, 2000
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], Tensor]
DEVICE = torch.device("cpu")  # of every model and batch; `speed.py --device` changes it


def random_llama(dtype: torch.dtype = torch.bfloat16, blocks: int = 6) -> LlamaForCausalLM:
    """A random LLaMA, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=LENGTH + 64,  # virtual tokens take some
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(DEVICE, dtype).train()
    return model.requires_grad_(False)


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def step_of(model: nn.Module) -> Step:
    """Forward, loss and backward; gradients are dropped before each step."""
    ids = tokens()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


def step_to_embeddings(model: nn.Module) -> Step:
    """The same, with a gradient asked for at the input embeddings."""
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        inputs = embeddings.requires_grad_(True)
        inputs.grad = None
        loss = model(inputs_embeds=inputs, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


def computed_in(storage: str) -> torch.dtype:
    return torch.float32 if storage == "fp32" else torch.bfloat16


def frozen(storage: str, blocks: int = 6) -> LlamaForCausalLM:
    """The model with every linear of its blocks as a frozen operator; the head stays in the type of the computation."""
    model = random_llama(computed_in(storage), blocks)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in LINEARS:
                storages.replace(model, name, storages.pack(module.weight.detach(), storage))
    storages.adopt_all(model)
    return model


def attached(storage: str, method: str) -> nn.Module:
    options = {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"} if method == "lora" else {}
    return dsub.attach(frozen(storage), dsub.SubspaceConfig(method=method, **options)).train()


def peft_lora(storage: str, float32_adapters: bool) -> nn.Module:
    """PEFT's LoRA on the same frozen matrices: bfloat16 linears, bitsandbytes' 4-bit layers, or our int8 product."""
    model = random_llama()
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in LINEARS:
            continue
        if storage == "nf4":
            storages.replace(model, name, four_bit(module))
        if storage == "int8":
            storages.replace(model, name, SameProduct(module))
    if storage == "nf4":
        model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=float32_adapters).train()


def four_bit(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' own NF4 layer."""
    layer = bnb_nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.weight = bnb_nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    return layer.to(DEVICE)


class SameProduct(nn.Linear):
    """An `nn.Linear` for PEFT's eyes, whose product is our int8 operator's: bitsandbytes' own quantises activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
        self.operator = storages.pack(linear.weight.detach(), "int8")

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


def lora_against_peft(storage: str, float32_adapters: bool) -> tuple[Step, Step]:
    ours, theirs = attached(storage, "lora"), peft_lora(storage, float32_adapters)
    generator = torch.Generator().manual_seed(2)
    layers = {name: module for name, module in ours.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        other = theirs.get_submodule("base_model.model." + name)
        left = 0.02 * torch.randn(layer.lora_B.shape, generator=generator)
        with torch.no_grad():
            layer.lora_B.copy_(left)
            other.lora_B["default"].weight.copy_(left)
            other.lora_A["default"].weight.copy_(layer.lora_A)
    steps = step_of(ours), step_of(theirs)
    losses = [step() for step in steps]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    for name, layer in layers.items():
        other = theirs.get_submodule("base_model.model." + name)
        _close(layer.lora_A.grad, other.lora_A["default"].weight.grad, name)
        _close(layer.lora_B.grad, other.lora_B["default"].weight.grad, name)
    return steps


def method_against_frozen(method: str, storage: str) -> tuple[Step, Step]:
    """A scaling method's training step, against the frozen model's forward and backward to its input embeddings."""
    ours, theirs = attached(storage, method), frozen(storage)
    steps = step_of(ours), step_to_embeddings(theirs)
    losses = [step() for step in steps]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    _check_scaling_gradients(ours)
    return steps


def frozen_against_frozen(storage: str) -> tuple[Step, Step]:
    """What the frozen operator itself costs: ours against the same model with plain or bitsandbytes' layers."""
    theirs = random_llama()
    for name, module in list(theirs.named_modules()):
        if storage != "bf16" and name.rpartition(".")[2] in LINEARS:
            storages.replace(theirs, name, four_bit(module) if storage == "nf4" else SameProduct(module))
    return step_to_embeddings(frozen(storage)), step_to_embeddings(theirs)


def _check_scaling_gradients(model: nn.Module) -> None:
    """The gradients of the scales against the same model's in float32 with dense matrices."""
    reference = copy.deepcopy(model).float()
    for name, module in list(reference.named_modules()):
        if isinstance(module, storages.FrozenLinear):
            storages.replace(reference, name, storages.pack(module.dense(torch.float32), "fp32"))
    step_of(reference)()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _close(parameter.grad, wanted[name].grad, name)


def _close(actual: Tensor | None, wanted: Tensor | None, name: str) -> None:
    """Equal up to what bfloat16 activations leave: the difference's norm within 5% of the gradient's."""
    assert actual is not None and wanted is not None, name
    difference = (actual.float() - wanted.float()).norm() / wanted.float().norm()
    assert difference < 0.05, f"{name}: gradients differ by {difference:.3f}"
