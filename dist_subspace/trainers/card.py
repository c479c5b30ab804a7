"""The card of an adapter that somebody else's trainer has trained. Local: rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_subspace.interchange.card_signature import is_unedited, signed
from dist_subspace.interchange.card_training import Training
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.trainers.refusals import trainer_of_trl


def write_card(
    trainer: Any,
    name: str | None = None,
    datasets: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    license_name: str | None = None,
) -> None:
    """`README.md` in the trainer's output folder. A card that this package has not written, or that was edited since, stays."""
    file = Path(trainer.args.output_dir) / "README.md"
    if file.is_file() and not is_unedited(file.read_text(encoding="utf-8")):
        return
    training = Training(
        facts=_facts(trainer, name),
        datasets=tuple(_list(datasets)),
        license={} if license_name is None else {"license": license_name},
    )
    text = model_card(adapter_config(trainer.model), training)
    more = [*_list(getattr(trainer.model, "model_tags", None)), *_list(tags)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_tagged(text, more), encoding="utf-8")


def _facts(trainer: Any, name: str | None) -> dict[str, Any]:
    args, measured = trainer.args, [line for line in trainer.state.log_history if "eval_loss" in line]
    return {
        "name": name,
        "trainer": trainer_of_trl(type(trainer)) or "Trainer",
        "steps": trainer.state.global_step,
        "eval loss": measured[-1]["eval_loss"] if measured else None,
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "ranks": args.world_size,
        "seed": args.seed,
    }


def _tagged(text: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    head: Any = card.data
    head.tags = list(dict.fromkeys([*(head.tags or []), *tags]))
    return signed(str(card))


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
