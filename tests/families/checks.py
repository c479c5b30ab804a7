"""What is compared for one case, in the order of a user's work: load, quantise, adapt, train, save, merge."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, FrozenStack
from tests.families import reference
from tests.families.cases import Case
from tests.families.exceptions import special

RANK, ALPHA = 2, 6.0
# Of the largest logit: float32 sums in another order, through a few layers; and of a gradient.
LOGITS, GRADIENTS, MERGED = 1e-4, 1e-3, 1e-4


class Wrong(Exception):
    """A check that failed: the text says what and by how much."""


@dataclass
class Words:
    """What was said while something ran: warnings, log lines, and what was printed."""

    lines: list[str] = field(default_factory=list)

    def mention(self, *words: str) -> bool:
        return any(word in line for line in self.lines for word in words)


@contextmanager
def listening() -> Iterator[Words]:
    words = Words()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.lines.append(record.getMessage())

    handler, root, printed = Handler(), logging.getLogger(), io.StringIO()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("always")
            yield words
        words.lines += [str(w.message) for w in caught] + printed.getvalue().splitlines()
    finally:
        root.removeHandler(handler)


@dataclass
class Session:
    """A case at work: its folder, transformers' model of it, inputs and right outputs, and the layers that these called."""

    case: Case
    folder: Path
    right: nn.Module
    given: dict[str, Tensor]
    logits: Tensor
    loss: Tensor
    called: set[str]
    notes: list[str] = field(default_factory=list)
    # storage -> distance of the logits from the right ones, in units of the largest; and what a load said that it leaves dense
    distances: dict[str, float] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)

    def load(self, storage: str, dtype: str | None = None) -> nn.Module:
        return dsub.load_frozen(self.folder, storage=storage, dtype=dtype, task=self.case.task)


def begin(case: Case, folder: Path) -> Session:
    """transformers' part alone: what it raises here is transformers' own."""
    reference.make_folder(case, folder)
    right = reference.load(case, folder)
    given = reference.inputs(case, right)
    with torch.no_grad(), reference.calls(right) as called:
        try:
            logits, loss = reference.run(right, given)
        except ValueError:  # labels of another form than a token each
            given.pop("labels", None)
            logits, loss = reference.run(right, given)
    if not torch.isfinite(logits).all():
        raise ValueError("transformers' own logits are not finite")
    return Session(case, folder, right, given, logits, loss, called)


def close(what: str, ours: Tensor, right: Tensor, bound: float) -> None:
    far = reference.relative(ours, right)
    if not far <= bound:
        raise Wrong(f"{what}: off by {far:.2g} of the largest (at most {bound:g})")


def check_float(session: Session) -> None:
    """fp32: logits and loss are transformers'."""
    model = session.load("fp32")
    with torch.no_grad():
        logits, loss = reference.run(model, session.given)
    session.distances["fp32"] = reference.relative(logits, session.logits)
    close("fp32 logits", logits, session.logits, LOGITS)
    close("fp32 loss", loss, session.loss, LOGITS)


def check_types(session: Session) -> None:
    """16 bits: every parameter and buffer has transformers' type and value; in fp16 too, where a family keeps some in float32."""
    check_type(session, "bf16", torch.bfloat16)
    if getattr(session.right, "_keep_in_fp32_modules", None):
        check_type(session, "fp16", torch.float16)


def check_type(session: Session, storage: str, dtype: torch.dtype) -> None:
    right = reference.own_tensors(reference.load(session.case, session.folder, dtype))
    ours = reference.own_tensors(session.load(storage))
    lost = sorted(right.keys() - ours.keys())
    if lost:
        raise Wrong(f"{lost[0]} is not there{f' and {len(lost) - 1} more' if lost[1:] else ''}")
    for kind in ("dtype", "shape"):
        other = [n for n in right if getattr(right[n], kind) != getattr(ours[n], kind)]
        if other:
            found, wanted = getattr(ours[other[0]], kind), getattr(right[other[0]], kind)
            raise Wrong(f"{storage}: {other[0]} has {kind} {found}, transformers {wanted}; {len(other)} such")
    other = [n for n in right if not torch.equal(right[n].nan_to_num(), ours[n].nan_to_num())]
    if other:
        far = reference.relative(ours[other[0]], right[other[0]])
        raise Wrong(f"{storage}: {other[0]} is off by {far:.2g} from transformers' value; {len(other)} such")


def check_quantised(session: Session, storage: str) -> Tensor:
    """A packed storage: transformers' model with our own dequantised weights computes the same, and where experts are packed it
    has the same gradients before them; something is packed or the load says that nothing is. Returns the right logits."""
    with listening() as words:
        model = session.load(storage, "float32")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear | FrozenStack) and not m.is_float}
    weights, stacks = {}, {n: m for n, m in packed.items() if isinstance(m, FrozenStack)}
    for name, module in packed.items():
        if isinstance(module, FrozenStack):
            weights[name] = dense_stack(module)
            close(f"{storage} weights of {name}", weights[name], session.right.get_parameter(name), 0.3)
            continue
        weight = module.dense(torch.float32)
        own = session.right.get_submodule(name).weight
        close(f"{storage} weight of {name}", weight.t() if module.conv1d else weight, own, 0.3)
        weights[name] = weight.t().contiguous() if module.conv1d else weight
    check_unpacked(session, storage, packed, words)
    dequantised = reference.with_weights(session.right, weights)
    with torch.no_grad():
        right = reference.run(dequantised, session.given)
        ours = reference.run(model, session.given)
    session.distances[storage] = reference.relative(ours[0], right[0])
    if not session.dense:
        session.dense = [
            line for line in words.lines if f"not in {storage}" in line or f"not held in {storage}" in line
        ]
    close(f"{storage} logits", ours[0], right[0], 3 * LOGITS)
    close(f"{storage} loss", ours[1], right[1], 3 * LOGITS)
    session.notes.append(f"{storage}: {len(packed)} packed, {len(stacks)} of them stacks of experts")
    if stacks and model.get_input_embeddings() is not None:
        gradients = [gradient_of_embeddings(m, session) for m in (model, dequantised)]
        close(f"{storage} gradient of the embeddings", gradients[0], gradients[1], GRADIENTS)
    logits: Tensor = right[0]
    return logits


def dense_stack(stack: FrozenStack) -> Tensor:
    """In the layout that transformers has."""
    dense = torch.stack([stack.expert(number).dense(torch.float32) for number in range(stack.experts)])
    return dense.transpose(1, 2).contiguous() if stack.transposed else dense


def gradient_of_embeddings(model: nn.Module, session: Session) -> Tensor:
    """With respect to what the embeddings give: their weight may be the head's, which ours does not train."""
    given: list[Tensor] = []
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: given.append(output.requires_grad_(True)))
    _, loss = reference.run(model, session.given)
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, given[0])
    return gradient


def check_unpacked(session: Session, storage: str, packed: Container[str], words: Words) -> None:
    """More than a quarter of the blocks' matrices (tables of embeddings and convolutions apart) held unpacked is said."""
    sizes: dict[str, int] = {}
    for name, parameter in session.right.named_parameters():
        owner, _, own = name.rpartition(".")
        kind = type(session.right.get_submodule(owner)).__name__.lower()
        matrix = 2 <= parameter.dim() <= 3 and "embedding" not in kind and kind != "conv1d"
        if matrix and name.startswith(blocks(session.right)):
            sizes[owner if own == "weight" else name] = parameter.numel()
    loose = {name: size for name, size in sizes.items() if name not in packed and f"{name}.weight" not in packed}
    if sum(loose.values()) > sum(sizes.values()) / 4 and not words.mention(storage, "quantis"):
        most = max(loose, key=lambda name: loose[name])
        share = f"{sum(loose.values())} of {sum(sizes.values())} weights of the blocks"
        raise Wrong(f"{storage}: {share} are not packed ({most}), and nothing is said")


def blocks(model: nn.Module) -> tuple[str, ...]:
    """How the names of what lies in lists of blocks begin."""
    return tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList))


def check_adapter(session: Session, work: Path) -> None:
    """LoRA with a B that acts: its output and gradients by the definition, its files, and the merged model."""
    model, words = adapted(session)
    names = list(model.subspace.layers)
    with torch.no_grad():
        logits, _ = reference.run(model, session.given)
    dsub.save_adapter(model, work / "adapter", base_model=str(session.folder))
    tensors = adapter_file(work / "adapter")
    right = reference.with_weights(session.right, changed(session.right, tensors, names))
    with torch.no_grad():
        right_logits, _ = reference.run(right, session.given)
    if reference.relative(right_logits, session.logits) < 1e-5:
        raise Wrong(f"LoRA on {len(names)} layers does not act")
    close("LoRA logits", logits, right_logits, 3 * LOGITS)
    check_left_out(session, names, words)
    trains = check_gradients(session, model, right, names)
    again = dsub.load_adapter(session.load("fp32"), work / "adapter")
    with torch.no_grad():
        close("logits of the loaded adapter", reference.run(again, session.given)[0], logits, 1e-6)
    dsub.merge(model, work / "merged", report=None)
    merged = reference.load_again(session.right, session.case, work / "merged")
    with torch.no_grad():
        close("logits of the merged model", reference.run(merged, session.given)[0], right_logits, MERGED)
    if trains:
        check_step(session, model)
    sometimes = special(session.case.task, session.case.model_type).sometimes
    never = [n for n in names if n not in session.called and sometimes not in n]
    if never:
        raise Wrong(f"{len(never)} of {len(names)} adapted layers are never reached by text ({never[0]}): no gradient")


def adapted(session: Session) -> tuple[nn.Module, Words]:
    """Ours in float32 with LoRA on every linear layer, B random; and what was said meanwhile."""
    config = dsub.SubspaceConfig(method="lora", rank=RANK, alpha=ALPHA)
    with listening() as words:
        model = dsub.attach(session.load("fp32"), config)
    session.notes += [f"said: {line[:200]}" for line in words.lines if "left out" in line]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, words


def adapter_file(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def changed(right: nn.Module, tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """W + (α / r) B A of each layer, from the adapter's file."""
    weights = {}
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
        change = ALPHA / RANK * b @ a
        module = right.get_submodule(name)
        weights[name] = module.weight.detach() + (change.t() if reference.transposed(module) else change)
    return weights


def check_left_out(session: Session, names: list[str], words: Words) -> None:
    """Linear layers of the blocks that all-linear leaves out are spoken of, and so are blocks of which nothing is adapted."""
    inside = blocks(session.right)
    left = [n for n in reference.linear_names(session.right) if n not in names]
    if left:
        kinds = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in left))
        session.notes.append(f"not adapted ({len(left)}): {kinds}")
    unsaid = [n for n in left if n.startswith(inside)]
    if unsaid and not words.mention("left out"):
        raise Wrong(f"{len(unsaid)} linear layers of the blocks are not adapted ({unsaid[0]}), and nothing is said")
    if inside and not any(n.startswith(inside) for n in names) and not words.lines:
        raise Wrong(f"nothing of the blocks is adapted, only {', '.join(names[:3])}, and nothing is said")


def check_gradients(session: Session, model: nn.Module, right: nn.Module, names: list[str]) -> bool:
    """dL/dB = γ (dL/dW) Aᵀ and dL/dA = γ Bᵀ (dL/dW), with transformers' dL/dW; where it has one, ours have theirs.
    False where transformers itself cannot make them."""
    weights = {name: right.get_submodule(name).weight for name in names}
    try:
        right_gradients = gradients(session, right, weights)
    except (RuntimeError, AssertionError) as error:
        session.notes.append(f"transformers itself cannot train it: {str(error)[:100]}")
        return False
    model.train()
    model.zero_grad()
    reference.run(model, session.given)[1].backward()
    model.eval()
    largest = max((float(g.abs().max()) for g in right_gradients.values()), default=0.0)
    for name, gradient in right_gradients.items():
        ours = model.get_submodule(name)
        a, b = ours.lora_A, ours.lora_B
        if a.grad is None or b.grad is None:
            raise Wrong(f"{name} has no gradient, though its weight has one in transformers")
        if float(gradient.abs().max()) < 1e-4 * largest:
            continue  # what cancels has no digits to compare
        gradient = gradient.t() if reference.transposed(right.get_submodule(name)) else gradient
        close(f"gradient of B of {name}", b.grad, ALPHA / RANK * gradient @ a.detach().t(), GRADIENTS)
        close(f"gradient of A of {name}", a.grad, ALPHA / RANK * b.detach().t() @ gradient, GRADIENTS)
    return True


def gradients(session: Session, right: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """transformers' gradients of the weights that its loss depends on. Everything asks for one: some backwards need that."""
    right.requires_grad_(True)
    right.train()
    reference.run(right, session.given)[1].backward()
    right.eval()
    return {name: w.grad for name, w in weights.items() if w.grad is not None and w.grad.any()}


def check_step(session: Session, model: nn.Module) -> None:
    """One optimizer step in training mode: finite gradients, and the weights move."""
    trainables = dsub.trainable_parameters(model)
    before = [p.detach().clone() for p in trainables]
    optimizer = torch.optim.AdamW(trainables, lr=1e-3)
    model.train()
    optimizer.zero_grad()
    loss = reference.run(model, session.given)[1]
    if not torch.isfinite(loss):
        raise Wrong(f"the loss in training mode is {loss.item()}")
    loss.backward()
    broken = [p for p in trainables if p.grad is not None and not torch.isfinite(p.grad).all()]
    if broken:
        raise Wrong(f"{len(broken)} of {len(trainables)} trained tensors have a gradient that is not finite")
    optimizer.step()
    if not any((p != old).any() for p, old in zip(trainables, before)):
        raise Wrong("a training step changes nothing")


def verdict_on(error: UsageError, stage: str, session: Session) -> str:
    """`refused` for one true sentence; `wrong` for several lines, for a reason that is false (transformers has just loaded this
    very folder), and for a default target that finds none of the linear layers that the blocks have, or one that is too small."""
    text = str(error)
    false = "incomplete or of another architecture" in text
    linear = [n for n in reference.linear_names(session.right) if n.startswith(blocks(session.right))]
    unfound = stage == "lora" and linear and ("matches no linear layer" in text or "subspace.rank is" in text)
    return "wrong" if "\n" in text or false or unfound else "refused"
