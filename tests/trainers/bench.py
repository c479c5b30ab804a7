"""A tiny model with a tokenizer, data for each of TRL's trainers, and trainers on them: ours, and PEFT's to compare with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import dist_subspace as dsub
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.subspace import attached
from tests.tiny_models import VOCABULARY, tiny_model

WORDS = tuple(f"w{number}" for number in range(3, VOCABULARY))
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
MODELS = {"RewardTrainer": "LlamaForSequenceClassification"}
COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 5,
    "bf16": False,
}


def save_base(folder: Path, trainer: str = "SFTTrainer", **changes: Any) -> Path:
    """A model for a trainer, with a tokenizer of whole words, as a folder."""
    kind = MODELS.get(trainer, "LlamaForCausalLM")
    classes = {"num_labels": 1} if trainer in MODELS else {}
    tiny_model(kind, config_name="LlamaConfig", **SIZES, **classes, **changes).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: number + 3 for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def samples(trainer: str, rows: int = 16, seed: int = 3) -> datasets.Dataset:
    """Sentences of a few words: continuations, preferences, or wanted and unwanted ones."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " " + " ".join(draw.choices(WORDS, k=count))

    made: list[dict[str, Any]] = []
    for number in range(rows):
        prompt, good, bad = words(3 + number % 3), words(4), words(3 + number % 2)
        if trainer == "SFTTrainer":
            made.append({"prompt": prompt, "completion": good})
        elif trainer == "KTOTrainer":
            made.append({"prompt": prompt, "completion": good, "label": number % 2 == 0})
        elif trainer == "RewardTrainer":
            made.append({"chosen": prompt + good, "rejected": prompt + bad})
        else:
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return datasets.Dataset.from_list(made)


def arguments(trainer: str, out: Path | str, **changes: Any) -> Any:
    import trl

    config = getattr(trl, trainer.replace("Trainer", "Config"))
    return config(output_dir=str(out), **COMMON | changes)


def made(
    trainer: str,
    base: Path | str,
    out: Path | str,
    *,
    method: str = "lora",
    rank: int | None = 4,
    storage: str = "fp32",
    options: dict[str, Any] | None = None,
    keywords: dict[str, Any] | None = None,
    load: dict[str, Any] | None = None,
    attach: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of TRL's with the mixin, on a model of ours.

    Arguments:
        options: of the method. keywords: of the trainer. load: of `load_frozen`. attach: of SubspaceConfig. changes: of its
            arguments.
    """
    args = arguments(trainer, out, **changes)
    dtype = {} if storage in ("fp32", "bf16") else {"dtype": "float32"}
    task = {"task": "classification", "num_labels": 1} if trainer in MODELS else {}
    deepspeed = {"deepspeed": changes["deepspeed"]} if changes.get("deepspeed") else {}
    model = dsub.load_frozen(base, storage=storage, **dtype, **task, **deepspeed, **(load or {}))
    settings: dict[str, Any] = {"seed": 1, "options": options or {}}
    settings |= {"modules_to_save": ["score"]} if trainer in MODELS else {}
    settings |= attach or {}
    dsub.attach(model, dsub.SubspaceConfig(method=method, rank=rank, **settings))
    return on(trainer, model, base, args, **(keywords or {}))


def on(trainer: str, model: nn.Module, base: Path | str, args: Any, **keywords: Any) -> Any:
    import trl

    kind = type(f"My{trainer}", (dsub.TrainerMixin, getattr(trl, trainer)), {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    given = {"train_dataset": samples(trainer), "processing_class": tokenizer} | keywords
    return kind(model=model, args=args, **given)


def theirs(trainer: str, base: Path | str, out: Path | str, like: nn.Module, **changes: Any) -> Any:
    """TRL's trainer with PEFT's LoRA, which begins with the values of a model of ours."""
    import peft
    import trl

    loader = "AutoModelForSequenceClassification" if trainer in MODELS else "AutoModelForCausalLM"
    sizes = {"num_labels": 1} if trainer in MODELS else {}
    model = getattr(transformers, loader).from_pretrained(base, dtype=torch.float32, **sizes)
    settings = attached(like).settings
    task = "SEQ_CLS" if trainer in MODELS else "CAUSAL_LM"
    endings = sorted({name.rpartition(".")[2] for name in attached(like).layers})
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=endings, task_type=task)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    made = getattr(trl, trainer)(
        model=model,
        args=arguments(trainer, out, **changes),
        train_dataset=samples(trainer),
        processing_class=tokenizer,
        peft_config=lora,
    )
    result = peft.set_peft_model_state_dict(made.model, adapter_tensors(like))
    assert not result.unexpected_keys
    return made


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
