"""Virtual tokens before the input: a stack gets more tokens than its caller gave, and gives back as many as he gave.

Everything happens around the stack of blocks: what stands above it (head, loss, pooling by the last token, `logits_to_keep`,
`generate`) sees inputs, logits and labels of the caller's own length. Token ids are lengthened by copies of a real token's, and
the rows of the embedding's output that belong to them are written over, so that whatever the model derives from ids
(padding, token types, scales of the embedding) goes its usual way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.attention import is_causal
from dist_subspace.families.classes import reads_every_token
from dist_subspace.families.configuration import config_of, is_encoder_decoder, text_config
from dist_subspace.families.positions import first_position
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.part import VirtualTokens
from dist_subspace.subspace.virtual_tokens.segments import kernel_lengths, longest_sample

FRONT, AFTER_FIRST = "front", "after-first"
# Arguments that are lengthened by copies of a real token's.
PER_TOKEN = ("input_ids", "token_type_ids", "inputs_embeds")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a lengthened row `(b, T)` come from, with T = t + n blocks of virtual tokens.

    origin: the real token at each place, or, for a virtual one, the first token of its sample, `(b, T)`.
    within: a virtual token's number in its block, `(b, T)`; virtual: where they are; real: where each given token went, `(b, t)`.
    shift: how far a token's position moves from its origin's, `(b, T)`.
    """

    origin: Tensor
    within: Tensor
    virtual: Tensor
    real: Tensor
    shift: Tensor

    @staticmethod
    def of(firsts: Tensor, length: int, count: int, skip: int) -> Layout:
        """Blocks of `count` virtual tokens, each `skip` tokens behind the first token of a sample.

        Arguments:
            firsts: `(b, k)` ascending places of each sample's first token; `length` where a row has fewer samples than k: its
                block then stands at the end, and is a sample of its own that nobody looks at.
        """
        gaps = (firsts + skip).clamp(max=length)
        number = torch.arange(gaps.shape[1], device=gaps.device)
        starts = (gaps + number * count).contiguous()
        places = torch.arange(length + count * gaps.shape[1], device=gaps.device).expand(len(gaps), -1).contiguous()
        block = torch.searchsorted(starts, places, right=True) - 1
        last = block.clamp(min=0)
        within = places - starts.gather(1, last)
        virtual = (block >= 0) & (within < count)
        first = firsts.gather(1, last).clamp(max=length - 1)
        origin = torch.where(virtual, first, (places - count * (block + 1)).clamp(0, length - 1))
        given = torch.arange(length, device=gaps.device).expand(len(gaps), -1).contiguous()
        real = given + count * torch.searchsorted(gaps.contiguous(), given, right=True)
        sample = (torch.searchsorted(firsts.contiguous(), origin, right=True) - 1).clamp(min=0)
        moved = (origin - firsts.gather(1, sample) >= skip).long() * count
        return Layout(origin, within, virtual, real, torch.where(virtual, within + skip, moved))

    def lengthen(self, rows: Tensor) -> Tensor:
        """Rows `(b or 1, t, ...)` of the caller's length, lengthened to `(b, T, ...)`."""
        rows = rows.expand(len(self.origin), *rows.shape[1:])
        index = self.origin.view(*self.origin.shape, *[1] * (rows.dim() - 2))
        return rows.gather(1, index.expand(*self.origin.shape, *rows.shape[2:]))

    def cut(self, rows: Tensor) -> Tensor:
        """Rows `(b, T, d)` without the virtual tokens, `(b, t, d)`."""
        return rows.gather(1, self.real.unsqueeze(-1).expand(*self.real.shape, rows.shape[-1]))

    def insert(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Lengthened embeddings `(b, T, d)` with the virtual tokens `(n, d)` written into them."""
        values = tokens.to(rows.device, rows.dtype)[self.within.clamp(0, len(tokens) - 1)]
        return torch.where(self.virtual.unsqueeze(-1), values, rows)


class Insertion:
    """Gives one stack the tokens of a part, by hooks around it. It is no module: the part is one."""

    def __init__(self, part: VirtualTokens, model: nn.Module, stack: nn.Module, placement: str) -> None:
        self.part, self.stack, self.config = part, stack, text_config(config_of(model))
        self.skip = int(placement == AFTER_FIRST)
        self.layout: Layout | None = None
        stack.register_forward_pre_hook(self.before_stack, with_kwargs=True)
        stack.register_forward_hook(self.after_stack)
        stacks.at_input(stack, self.insert_tokens)

    def before_stack(
        self, stack: nn.Module, args: tuple[object, ...], kwargs: stacks.Arguments
    ) -> tuple[tuple[()], stacks.Arguments] | None:
        self.layout = None
        if not self.part.enabled:
            return None
        arguments = stacks.named_arguments(stack, args, kwargs)
        stacks.refuse_static_cache(arguments, f"method {self.part.info.name}")
        cached = stacks.cached_length(arguments)
        past = cached - self.part.count if cached else 0
        mask = stacks.padding_mask(arguments, past, f"method {self.part.info.name}")
        rows, length, device = stacks.length_and_device(arguments)
        edges = stacks.packed_edges(arguments)
        stacks.check_length(self.config, first_position(stack), self.part.count, past + longest_sample(edges, length))
        positions = stacks.positions(stack, arguments, mask, past)
        if mask is not None:
            arguments["attention_mask"] = self.with_virtual(mask)
        if cached:
            positions = positions + self.part.count
        else:
            firsts = self._firsts(mask, edges, rows, length, device)
            layout = self.layout = Layout.of(firsts, length, self.part.count, self.skip)
            positions = layout.lengthen(positions.expand(rows, -1)) + layout.shift
            for name in PER_TOKEN:
                if arguments.get(name) is not None:
                    arguments[name] = layout.lengthen(arguments[name])
            if "cu_seq_lens_q" in arguments:
                arguments |= kernel_lengths(positions)
        if stacks.takes(stack, "position_ids"):
            arguments["position_ids"] = positions
        if arguments.get("inputs_embeds") is not None and self.layout is not None:
            arguments["inputs_embeds"] = self.insert_tokens(arguments["inputs_embeds"])
        return (), arguments

    def insert_tokens(self, rows: Tensor) -> Tensor | None:
        if self.layout is None or rows.shape[:2] != self.layout.origin.shape:
            return None
        return self.layout.insert(rows, self.part())

    def after_stack(self, stack: nn.Module, args: tuple[object, ...], output: Any) -> Any:
        layout, self.layout = self.layout, None
        return output if layout is None else cut(output, layout)

    def with_virtual(self, mask: Tensor) -> Tensor:
        """The mask `(b, length)` of real tokens with ones where the virtual ones stand."""
        layout = Layout.of(_first_tokens(mask), mask.shape[1], self.part.count, self.skip)
        return layout.lengthen(mask).masked_fill(layout.virtual, 1)

    def _firsts(
        self, mask: Tensor | None, edges: list[list[int]] | None, rows: int, length: int, device: torch.device
    ) -> Tensor:
        if mask is not None:
            return _first_tokens(mask)
        if edges is None:
            return torch.zeros(rows, 1, dtype=torch.long, device=device)
        most = max(len(row) - 1 for row in edges)
        return torch.tensor([row[:-1] + [length] * (most + 1 - len(row)) for row in edges], device=device)


class EncoderInsertion(Insertion):
    """The same in the encoder of an encoder-decoder model: the decoder attends to the virtual tokens too, so they stay in the
    encoder's result, and are cut off what the model's caller sees of it."""

    def __init__(self, part: VirtualTokens, model: nn.Module, placement: str) -> None:
        encoder, decoder = stacks.stacks(model)
        super().__init__(part, model, encoder, placement)
        decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True)
        model.register_forward_hook(self.after_model, with_kwargs=True)

    def after_stack(self, stack: nn.Module, args: tuple[object, ...], output: Any) -> Any:
        self.layout = None
        return output

    def before_decoder(
        self, decoder: nn.Module, args: tuple[object, ...], kwargs: stacks.Arguments
    ) -> tuple[tuple[()], stacks.Arguments] | None:
        arguments = stacks.named_arguments(decoder, args, kwargs)
        mask, states = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
        if not self.part.enabled or mask is None or states is None:
            return None
        if mask.shape[-1] != states.shape[1] - self.part.count:
            raise UsageError(
                f"encoder_outputs have {states.shape[1]} tokens and attention_mask {mask.shape[-1]}: outputs of this model's own "
                f"encoder hold {self.part.count} virtual tokens more than the mask"
            )
        arguments["encoder_attention_mask"] = self.with_virtual(mask)
        return (), arguments

    def after_model(self, model: nn.Module, args: tuple[object, ...], kwargs: stacks.Arguments, output: Any) -> Any:
        states = output.get("encoder_last_hidden_state") if isinstance(output, Mapping) else None
        if not self.part.enabled or states is None:
            return None
        mask = stacks.named_arguments(model, args, kwargs).get("attention_mask")
        length = states.shape[1] - self.part.count
        firsts = (
            torch.zeros(len(states), 1, dtype=torch.long, device=states.device) if mask is None else _first_tokens(mask)
        )
        layout = Layout.of(firsts, length, self.part.count, self.skip)
        output["encoder_last_hidden_state"] = layout.cut(states)
        if output.get("encoder_hidden_states") is not None:
            output["encoder_hidden_states"] = tuple(layout.cut(rows) for rows in output["encoder_hidden_states"])
        return output


def cut(output: Any, layout: Layout) -> Any:
    """A stack's result without the virtual tokens: its last hidden states, and those of every block where they were asked for."""
    if isinstance(output, tuple):
        return (layout.cut(output[0]), *output[1:])
    output["last_hidden_state"] = layout.cut(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(layout.cut(rows) for rows in output["hidden_states"])
    return output


def _first_tokens(mask: Tensor) -> Tensor:
    """The place `(b, 1)` of each row's first token, behind padding on its left."""
    return mask.long().argmax(dim=1, keepdim=True)


def default_placement(model: nn.Module) -> str:
    """Where the tokens stand: after the first token where an encoder's head reads that (BERT's pooled `[CLS]`), else in front."""
    if is_causal(model) or is_encoder_decoder(model):
        return FRONT
    return FRONT if reads_every_token(type(model).__name__) else AFTER_FIRST
