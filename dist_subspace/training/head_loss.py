"""The loss of a language model, made inside its head: the matrix of tokens x vocabulary never exists.

Hooks hang on the model for one forward. The first, before the head, keeps the rows that the head is given and lets one of
them through, so that the model's own forward runs as ever on the logits of one token. The second, when the head has run and its
weight is still whole (a sharding engine gathers it in hooks around the head, once), makes the loss and its gradient of all
rows, piece by piece. The last gives the loss out as the model's, through the engine's own hooks. Where the head's own rows come
in pieces, the loss is made before the head runs, and that one token's logits with it: so the rows come once.

Whether a model's loss is what its head's rows say is not known from its name: `prove` runs a few tokens once, records what the
model does with the head's result (`recorded.py`), and compares. Where it is not, the caller makes the loss of whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.module_places import hook_names
from dist_subspace.placement.protocol import Engine
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import NewTokens, attachment
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.training.activation_offload import kept_here
from dist_subspace.training.cross_entropy import Finish, Head, head_cross_entropies, head_cross_entropy, targets_of
from dist_subspace.training.cross_entropy_in_pieces import (
    FreshLogits,
    Probe,
    cross_entropies_in_pieces,
    cross_entropy_in_pieces,
)
from dist_subspace.training.head_kinds import InPieces, head_of
from dist_subspace.training.recorded import Program, Recorder, close

TOKENS = 4  # of the run that proves it


@dataclass(frozen=True)
class Proof:
    """reason: why the loss cannot be made inside the head, None where it can; program: what the model does with the head's
    result; hooks: what hung on its and the model's forward then, in which autocast that was, and whether a trained copy of the
    head was in use."""

    reason: str | None
    program: Program = field(default_factory=Program)
    hooks: tuple[Any, ...] = ()


_PROOFS: WeakKeyDictionary[nn.Module, Proof] = WeakKeyDictionary()


def proof_of(model: nn.Module | Engine, ids: Tensor, device: torch.device) -> Proof:
    """Collective where parameters are split, alike on every rank: what is known of the model, found out on a first call and
    again when other hooks hang on its head.

    Arguments:
        ids: `(b, t)` tokens that the model knows; a few go to its device, where something is to be found out.
    """
    module = _module(model)
    head = output_embeddings(module)
    hooks = () if head is None else (*hook_names(head), *hook_names(module), *_autocast(device), *_in_use(head))
    known = _PROOFS.get(module)
    if known is None or known.hooks != hooks:
        reason, program = ("it names no output layer", None) if head is None else _prove(model, head, ids, device)
        known = _PROOFS[module] = Proof(reason, program or Program(), hooks)
    return known


def loss_in_head(
    model: nn.Module | Engine,
    run: Callable[[], Any],
    labels: Tensor,
    targets: int,
    program: Program,
    apart: bool = False,
) -> Tensor:
    """Collective where parameters are split: the sum over the targets, float32, of a model that is proved.

    Arguments:
        run: makes the model's one forward of the micro-batch, and returns its output.
        labels: `(b, t)`, on the CPU; targets: how many of them are predicted.
        apart: the loss of each target instead, `(targets,)`, in the order of `labels`; with autograd of a head that is frozen.
    """
    module = _module(model)
    made = _InHead(module, labels, targets, program, apart)
    with _hooks(module, made.before, made.ready, made.inside, made.called, made.after), made.put_back():
        loss: Tensor = run()["loss"]
    return loss


def _module(model: nn.Module | Engine) -> nn.Module:
    module: Any = getattr(model, "module", model)
    return module  # type: ignore[no-any-return]


def _autocast(device: torch.device) -> tuple[Any, ...]:
    """The caller's; an engine's own is found out when it runs."""
    return (torch.get_autocast_dtype(device.type),) if torch.is_autocast_enabled(device.type) else ()


def _in_use(head: nn.Module) -> tuple[bool, ...]:
    return (head.enabled,) if isinstance(head, TrainedCopy) else ()


def _without_autocast(rows: Tensor) -> Any:
    """What is made here is in the types that it says."""
    return torch.autocast(rows.device.type, enabled=False)


def _fresh(module: nn.Module, rows: Tensor) -> tuple[Tensor | None, NewTokens | None]:
    """The logits of new tokens for the rows, where the model has such tokens, and who joins them to the others."""
    attached = attachment(module)
    tokens = None if attached is None else attached.new_tokens
    return (None, None) if tokens is None or not tokens.enabled else (tokens(rows), tokens)


def _finish(program: Program, tokens: NewTokens | None) -> Finish | None:
    if tokens is None:
        return (lambda logits, fresh: program(logits)) if program.steps else None

    def joined(logits: Tensor, fresh: Tensor | None) -> Tensor:
        return program(logits if fresh is None else tokens.joined(logits, fresh))

    return joined


class _InHead:
    """The hooks of one forward."""

    def __init__(self, module: nn.Module, labels: Tensor, targets: int, program: Program, apart: bool) -> None:
        self.module, self.labels, self.targets, self.program = module, labels, targets, program
        self.apart = apart
        self.rows: Tensor | None = None
        self.loss: Tensor | None = None
        self.passed: Tensor | None = None
        self.answered: Any = None

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        if self.rows is not None or args[0].shape[:2] != self.labels.shape:
            raise RuntimeError(
                f"the head of a {type(self.module).__name__} is called in another way than it was before"
            )
        self.rows = args[0]
        return (args[0][:1, :1].detach(),)

    def ready(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        """The last before the head's forward."""
        kind, row = _known_head(head, args[0]), args[0]
        if not isinstance(kind, InPieces):
            return
        rows, classes = self._targets()
        fresh, tokens = _fresh(self.module, rows)
        own = None if fresh is None or tokens is None else FreshLogits(fresh, torch.tensor(tokens.known))
        probe = Probe(row.flatten(0, 1), row.new_empty(1, kind.classes, dtype=kind.dtype))
        each = self.program if self.program.steps else None
        with _without_autocast(rows), kept_here():
            made = cross_entropies_in_pieces if self.apart else cross_entropy_in_pieces
            self.loss = made(rows, own, classes, kind, each, probe)
        self.answered = kind.layer
        kind.layer.product = lambda x: probe.logits  # type: ignore[method-assign]

    def inside(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.loss is not None:
            return
        rows, classes = self._targets()
        fresh, tokens = _fresh(self.module, rows)
        kind = _known_head(head, rows)
        assert not isinstance(kind, InPieces)  # whose loss is there
        classes = classes.to(rows.device, non_blocking=True)
        with _without_autocast(rows), kept_here():
            made = head_cross_entropies if self.apart else head_cross_entropy
            self.loss = made(rows, fresh, classes, kind, _finish(self.program, tokens))

    def _targets(self) -> tuple[Tensor, Tensor]:
        """The rows that predict a target, and the targets, which lie on the CPU."""
        assert self.rows is not None  # the hook before has run
        places, classes = targets_of(self.labels, self.targets)
        return self.rows.flatten(0, 1).index_select(0, places.to(self.rows.device, non_blocking=True)), classes

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Behind the forward, however it ends, the head makes its products itself."""
        try:
            yield
        finally:
            if self.answered is not None:
                del self.answered.product  # type: ignore[method-assign]

    def called(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.passed = output.detach().clone()

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The one token's logits are what the program makes of its row, or loss and gradients are no numbers, and the step is
        skipped: a model may do in training what it did not do when it was proved. Nobody waits for the answer."""
        if self.loss is None or self.passed is None:
            raise RuntimeError(f"the head of a {type(model).__name__} is not called as it was before")
        as_before = (self.program(self.passed) == output["logits"].detach()).all()
        output["loss"] = self.loss * torch.where(as_before, self.loss.new_ones(()), math.nan)
        return output


def _known_head(head: nn.Module, rows: Tensor) -> Head | InPieces:
    found = _head_in(head, rows)
    if found is None:
        raise RuntimeError(f"the head, a {type(head).__name__}, is another one than before")
    return found


def _head_in(head: nn.Module, rows: Tensor) -> Head | InPieces | None:
    """In an autocast a frozen operator takes its type, and other heads are none."""
    dtypes = _autocast(rows.device)
    if dtypes and not isinstance(head, FrozenLinear):
        return None
    return head_of(head, dtypes[0] if dtypes else rows.dtype)


class _Seen:
    """The hooks of the forward that proves it: what the model did, and what would be done in its place."""

    def __init__(self, module: nn.Module, shape: torch.Size) -> None:
        self.module, self.shape = module, shape
        self.recorder = Recorder()
        self.rows: Tensor | None = None
        self.mine: tuple[Tensor, Tensor | None, NewTokens | None] | None = None
        self.logits: Tensor | None = None
        self.reason: str | None = None

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        self.rows = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None

    def inside(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.rows is None or self.rows.shape[:-1] != self.shape:
            self.reason = "its head is given something else than a row a token"
        else:
            rows = self.rows.flatten(0, 1)
            kind = _head_in(head, rows)
            if kind is None:
                autocast = ", in whose place autocast makes logits of another type" if _autocast(rows.device) else ""
                self.reason = f"its head is a {type(head).__name__}{autocast}"
            else:
                fresh = _fresh(self.module, rows)
                with _without_autocast(rows):
                    self.mine = (kind.logits(rows.to(kind.dtype)), *fresh)

    def called(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.recorder.begin(output)

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.recorder.end()
        self.logits = output.get("logits") if isinstance(output, Mapping) else None

    def verdict(self, output: Any) -> tuple[str | None, Program | None]:
        """output: what the caller of the model has got, behind all hooks."""
        if self.reason is not None:
            return self.reason, None
        program = None if self.logits is None else self.recorder.program(self.logits)
        if self.mine is None or program is None:
            unknown = self.recorder.unknown
            return "its logits are not its head's" + (f" alone ({unknown})" if unknown else ""), None
        logits, fresh, tokens = self.mine
        finish = _finish(program, tokens)
        mine = logits if finish is None else finish(logits, fresh)
        agrees = close(mine, output["logits"].flatten(0, 1))
        return (None, program) if agrees else ("its head gives something else than its weight says", None)


def _prove(
    model: nn.Module | Engine, head: nn.Module, ids: Tensor, device: torch.device
) -> tuple[str | None, Program | None]:
    module, ids = _module(model), ids[:1, :TOKENS].to(device)
    seen, training = _Seen(module, ids.shape), module.training
    module.eval()
    try:
        with torch.no_grad(), _hooks(module, seen.before, None, seen.inside, seen.called, seen.after), seen.recorder:
            output = model(input_ids=ids, use_cache=False)
    finally:
        module.train(training)
    return seen.verdict(output)


@contextmanager
def _hooks(module: nn.Module, before: Any, ready: Any | None, inside: Any, called: Any, after: Any) -> Iterator[None]:
    """Around the head and the model. What others hang there acts outside of `before` and `inside`, and within `ready` and
    `called`."""
    head = output_embeddings(module)
    assert head is not None  # there is none to prove anything of
    handles = [
        head.register_forward_pre_hook(before, prepend=True),
        *([] if ready is None else [head.register_forward_pre_hook(ready)]),
        head.register_forward_hook(inside, prepend=True),
        head.register_forward_hook(called),
        module.register_forward_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
