"""What a recipe's header says, computed from its YAML, the shape of its model and the storage's own count of bytes.

`python -m tests.config.recipes` writes the computed lines of every header in configs/.
"""

from __future__ import annotations

import functools
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from dist_subspace.config import Config, load_config
from dist_subspace.families.blocks import blocks
from dist_subspace.families.heads import classification_heads, is_head_layer
from dist_subspace.loading.experts_internals import adopt_stacks
from dist_subspace.placement.deepspeed.in_place import PIECE
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.engines import GATHERED, IN_PIECES, LOOKED_UP, use_of
from dist_subspace.storage import FrozenLinear, FrozenStack, adopt_all, options_for, storage_info
from dist_subspace.subspace import StackedPart, attach_method, attached, methods, trainable_parameters
from dist_subspace.subspace.blocks.svd import OVERSAMPLING, PUBLISHED_ROUNDS
from dist_subspace.training.data.settings import PAIRED
from dist_subspace.training.loss import logits_memory
from dist_subspace.training.sections import batch_settings, subspace_config
from tests.config.headers import RECIPES, header
from tests.config.shapes import SHAPES

GIB = 2**30
# What a token leaves of a block for backward, in 16-bit numbers of the hidden and of the inner width: at most.
OF_HIDDEN, OF_INNER = 14, 5
OF_ROUTED = 3  # of the hidden width, for each expert that the token goes to
OUTSIDE = GIB  # of CUDA's context, NCCL's buffers and the allocator's gaps


@dataclass(frozen=True)
class Hardware:
    """The line `Hardware` of a header. memory: of a card, in GiB (0: there is none); host: of a node, where it is said."""

    nodes: int
    devices: int
    memory: int
    host: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @classmethod
    def read(cls, line: str) -> Hardware:
        """From words like "one GPU of 8 GB", "one node with 8 GPUs of 80 GB", "2 nodes with 8 GPUs of 80 GB each"."""
        processes = re.fullmatch(r"no GPU; (\d+) processes", line)
        if processes is not None:
            return cls(1, int(processes[1]), 0, 0)
        words = re.fullmatch(
            r"(?:(one|\d+) nodes? with )?(one|\d+) GPUs? of (\d+) GB(?: each)?(?:, and (\d+) GB of memory)?", line
        )
        assert words is not None, f"Hardware: {line}"
        nodes, devices, memory, host = (1 if word in (None, "one") else int(word) for word in words.groups())
        return cls(nodes, devices, memory, host if words[4] else 0)


@dataclass(frozen=True)
class Sizes:
    """Of a model with its method on it.

    frozen: bytes of the frozen parameters, in all; copied: of buffers, which every rank has; trained: parameters.
    block: bytes of the largest block; head: of the head or the embeddings, the larger, as far as they are gathered at a time;
    in_pieces: whether the head comes in pieces; matrix: weights of the largest operator, or of so many experts as are
    dequantised at once.
    sites: the adapted matrices, as (d_out, d_in); rank: of the method, where it has one.
    """

    frozen: int
    copied: int
    trained: int
    block: int
    head: int
    matrix: int
    sites: tuple[tuple[int, int], ...]
    rank: int | None
    in_pieces: bool = False


def sizes_of(model: nn.Module, config: Config) -> Sizes:
    """Puts the recipe's method on a model of the meta device, and counts."""
    storage, dtype = storage_info(config.model.storage), torch.bfloat16
    options = options_for(config.model.storage, config.model.double_quant, config.model.storage_options)
    adopt_all(model)
    adopt_stacks(model)
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    held: dict[nn.Parameter, int] = {p: p.numel() * dtype.itemsize for p in model.parameters()}
    operators = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear) and m is not head}
    for name, operator in operators.items():
        if not is_head_layer(name) and not name.startswith(tuple(classification_heads(model))):
            weight = max(operator.parameters(), key=lambda p: p.numel())
            held[weight] = storage.bytes_held(operator.out_features, operator.in_features, **options)
    stacks = [module for module in model.modules() if isinstance(module, FrozenStack)]
    for stack in stacks:
        held[next(stack.parameters())] = stack.experts * storage.bytes_held(*stack.expert_shape, **options)
    if config.model.head_storage is not None:
        kind = config.model.head_storage
        own = options if kind == config.model.storage else options_for(kind, config.model.double_quant)
        held[head.weight] = storage_info(kind).bytes_held(head.out_features, head.in_features, **own)
    largest = max(sum(held[p] for p in block.parameters()) for block in blocks(model))
    tables = [m for m in (head, model.get_input_embeddings()) if m is not None]  # type: ignore[operator]
    uses = {table: use_of(table, table is head) for table in tables}
    if config.model.head_storage is not None:
        uses[head] = GATHERED
    at_once = {GATHERED: None, LOOKED_UP: 0, IN_PIECES: 2 * PIECE}
    parts = {table: at_once[use] for table, use in uses.items()}
    whole = max(sum(held[p] for p in t.parameters()) if part is None else part for t, part in parts.items())
    matrix = max(m.in_features * m.out_features for m in operators.values())
    matrix = max([matrix, *(config.model.experts_at_once * math.prod(stack.expert_shape) for stack in stacks)])
    buffers = set(model.buffers())
    put_method(model, config)
    factors = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad and p not in held)
    copied = sum(b.numel() * b.element_size() for b in model.buffers() if b not in buffers)
    trained = sum(p.numel() for p in trainable_parameters(model))
    on = attached(model)
    sites = [site for site in map(model.get_submodule, on.layers) if not isinstance(site, StackedPart)]
    shapes = tuple((site.out_features, site.in_features) for site in sites)
    in_pieces = uses.get(head) == IN_PIECES
    return Sizes(
        sum(held.values()) + factors, copied, trained, largest, whole, matrix, shapes, on.settings.rank, in_pieces
    )


def put_method(model: nn.Module, config: Config) -> None:
    """With the frozen pairs that a decomposition will leave beside a trained one."""
    asked = subspace_config(config)
    if config.model.task == "classification":
        asked = replace(asked, modules_to_save=classification_heads(model))
    attach_method(model, asked, lambda parameters: nullcontext())
    for name in attached(model).layers:
        part: Any = model.get_submodule(name)
        kept = getattr(part, "kept_factors", ())
        if kept:
            part.set_factors(dict(zip(kept, (part.lora_A.detach(), part.lora_B.detach()), strict=True)))


@functools.cache
def real_sizes(path: Path) -> Sizes:
    return sizes_for(load_config(path))


def sizes_for(config: Config) -> Sizes:
    """Of the model that the configuration names, built on the meta device in its real size."""
    with torch.device("meta"):
        kind = AutoModelForSequenceClassification if config.model.task == "classification" else AutoModelForCausalLM
        model = kind.from_config(SHAPES[config.model.path], dtype=torch.bfloat16)
        return sizes_of(model, config)


@dataclass(frozen=True)
class Held:
    """Bytes of a rank between two steps: weights and adapter (with its optimizer's state) on its device and in its memory."""

    weights: float
    node_weights: float
    adapter: float
    host_weights: float = 0.0
    host_adapter: float = 0.0


def held(sizes: Sizes, preset: str, ranks: int, node_ranks: int) -> Held:
    """How ZeRO's stages hold frozen bytes, and a trained parameter in float32 with its master and two moments.

    At stage 0 the parameter is its own master; at stages 1 and 2 it is whole everywhere, and the rest is split; at stage 3 its
    shard is there beside the whole. `zero3-hpz` holds the frozen shards of a node a second time.
    """
    stage, trained = PRESETS[preset], 4 * sizes.trained
    state = 3 * trained / ranks if stage else 2 * trained
    adapter = trained + (trained / ranks if stage == 3 else 0)
    weights = sizes.frozen / (ranks if stage == 3 else 1)
    second = sizes.frozen / node_ranks if preset.endswith("-hpz") else 0.0
    zero = section(preset, sizes)
    on_host = {key: zero.get(key, {}).get("device") == "cpu" for key in ("offload_optimizer", "offload_param")}
    if not on_host["offload_optimizer"]:
        return Held(weights + sizes.copied, second, adapter + state)
    if not on_host["offload_param"]:
        return Held(weights + sizes.copied, second, adapter, 0.0, state)
    return Held(sizes.copied, second, trained, weights, adapter - trained + state)


def section(preset: str, sizes: Sizes) -> dict[str, Any]:
    made = deepspeed_config(
        preset,
        ranks_per_node=2,
        micro_batch=1,
        rounds=1,
        world_size=1,
        max_grad_norm=1.0,
        trainable_numel=sizes.trained,
        nvme_path="/nvme",
    )
    return dict(made["zero_optimization"])


def block_activations(shape: PretrainedConfig, tokens: int) -> int:
    """Bytes; tests/devices/test_activations.py counts them."""
    hidden, inner, experts = OF_HIDDEN, shape.intermediate_size, getattr(shape, "num_experts_per_tok", 0)
    if experts:
        hidden, inner = hidden + OF_ROUTED * experts, experts * shape.moe_intermediate_size
    return int(2 * tokens * (hidden * shape.hidden_size + OF_INNER * inner))


@dataclass(frozen=True)
class Recipe:
    path: Path

    @property
    def said(self) -> dict[str, str]:
        return header(self.path)

    @property
    def hardware(self) -> Hardware:
        return Hardware.read(self.said["Hardware"])

    @functools.cached_property
    def config(self) -> Config:
        return load_config(self.path)

    @property
    def sizes(self) -> Sizes:
        return real_sizes(self.path)

    @property
    def stage(self) -> int:
        return PRESETS[self.config.deepspeed.preset]

    @property
    def held(self) -> Held:
        return held(self.sizes, self.config.deepspeed.preset, self.hardware.ranks, self.hardware.devices)

    @property
    def tokens(self) -> int:
        """Of a step: rows of a packed batch are full; samples of an unpacked one are at most that long."""
        batch = self.config.training.global_batch_size
        assert batch is not None
        return batch * texts_of_a_sample(self.config) * self.config.data.max_length

    def computed(self) -> dict[str, str]:
        """The lines of the header that follow from the rest."""
        most = "" if batch_settings(self.config).packing else "at most "
        lines = {
            "Tokens a step": f"{most}{self.tokens:,}",
            "Split over the ranks": self._split(),
            "Bytes a rank": self._bytes(),
        }
        if self.hardware.memory:
            lines["Peak of a GPU"] = f"about {size_text(self.peak, 0)} of {self.hardware.memory}, estimated"
        if "Set-up" in self.said and methods()[self.config.subspace.method].statistic == "top-r SVD":
            lines["Set-up"] = self._decompositions()
        return lines

    def _split(self) -> str:
        if self.hardware.ranks == 1:
            return "nothing; there is one"
        packed = storage_info(self.config.model.storage).dtype is None
        weights = f"{'packed ' if packed else ''}weights, embeddings, head, "
        second = "; each node holds the weights a second time, split over its ranks"
        words = ("nothing", "optimizer state", "gradients, optimizer state", f"{weights}optimizer state")[self.stage]
        return words + (second if self.config.deepspeed.preset.endswith("-hpz") else "")

    def _decompositions(self) -> str:
        """The products of a subspace iteration (`svd.largest`), and the pairs that it leaves in RUN/factors, in float32."""
        sites, rank = self.sizes.sites, self.sizes.rank
        assert rank is not None
        operations = sum(2 * d_out * d_in * (rank + OVERSAMPLING) * (2 * PUBLISHED_ROUNDS + 2) for d_out, d_in in sites)
        kept = sum(4 * rank * (d_out + d_in) for d_out, d_in in sites)
        return (
            f"the {rank} largest singular vectors of {len(sites)} matrices, once: {operations / 1e12:.0f}e12 operations in "
            f"float32, shared by the ranks; RUN/factors keeps them ({size_text(kept)})"
        )

    def _bytes(self) -> str:
        held = self.held
        weights = size_text(held.weights)
        if held.node_weights:
            weights += f" and for its node {size_text(held.node_weights)}"
        words = f"{weights} weights, {size_text(held.adapter)} adapter and its optimizer state"
        if held.host_weights or held.host_adapter:
            words = (
                f"in memory {size_text(held.host_weights)} weights, {size_text(held.host_adapter)} optimizer state; "
            )
            words += f"on the GPU {size_text(held.adapter)} adapter"
        return words

    @property
    def peak(self) -> float:
        return peak(self.config, self.sizes, self.held)


def texts_of_a_sample(config: Config) -> int:
    return 2 if config.data.format in PAIRED else 1


def peak(config: Config, sizes: Sizes, held: Held) -> float:
    """Bytes of a card in the middle of a step, about: what is held, what is gathered, logits, and activations."""
    shape, training, stage = SHAPES[config.model.path], config.training, PRESETS[config.deepspeed.preset]
    tokens = training.per_device_train_batch_size * texts_of_a_sample(config) * config.data.max_length
    block = block_activations(shape, tokens)
    inputs = 2 * tokens * shape.hidden_size
    layers = shape.num_hidden_layers
    kept = layers * inputs if training.gradient_checkpointing else (layers - 1) * block
    activations = block + (2 * inputs if training.activation_offload else kept)  # one goes, one comes
    logits = logits_memory(tokens * shape.vocab_size) if config.model.task == "causal-lm" else 0
    gathered = 2 * sizes.block + sizes.head if stage == 3 else 0
    if stage == 3 and sizes.in_pieces:  # what each token sums of the pieces, and its label's row (float32, 16 bits)
        gathered += 8 * tokens * shape.hidden_size
    unpacked = 2 * sizes.matrix if storage_info(config.model.storage).dtype is None else 0
    gradients = 8 * sizes.trained  # and a bucket of them
    on_card = held.weights + held.node_weights + held.adapter
    return on_card + gathered + unpacked + gradients + logits + activations + OUTSIDE


def size_text(size: float, digits: int = 1) -> str:
    if size >= GIB:
        return f"{size / GIB:.{digits}f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def written(text: str, lines: dict[str, str]) -> str:
    """The recipe's text with these lines of its header as they are now."""
    for name, words in lines.items():
        text, times = re.subn(rf"^# {name}: .*$", f"# {name}: {words}", text, count=1, flags=re.MULTILINE)
        assert times == 1, name
    return text


if __name__ == "__main__":
    for path in RECIPES:
        path.write_text(written(path.read_text(encoding="utf-8"), Recipe(path).computed()), encoding="utf-8")
