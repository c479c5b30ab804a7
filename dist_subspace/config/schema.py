"""Every key of the configuration: its type, its default, its range, and one line on what it does.

Where Hugging Face's `TrainingArguments` has a name for a thing, the key has that name. Rules over two keys of a section
stand below the keys.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from dist_subspace.config import names
from dist_subspace.config.fields import (
    Count,
    DtypeName,
    NameList,
    Rate,
    Reporters,
    Repository,
    Resume,
    Seconds,
    Section,
    Text,
    Texts,
)
from dist_subspace.config.preference import PreferenceArguments, check_arguments
from dist_subspace.errors import UsageError


class ModelSection(Section):
    """The frozen model: where it is, and in which bytes it is held."""

    path: Text = Field(description="A transformers model folder with safetensors, or a Hub name.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a Hub name; null: the newest of its main branch."
    )
    task: names.Task = Field(default="causal-lm", description="Which head the model has (the transformers auto class).")
    storage: Text = Field(default="nf4", description="How the large linear weights are held.")
    storage_options: dict[str, Any] = Field(default={}, description="The storage's own further options.")
    double_quant: bool = Field(default=True, description="The option double_quant of the storages that have it.")
    head_storage: Text | None = Field(
        default=None, description="How a language model's head is held; null: in the type of the computation."
    )
    dtype: DtypeName | None = Field(
        default=None,
        description="Type of all else and of the computation; null: a float storage's own, else bfloat16, or float32 on a CPU "
        "without 16-bit products.",
    )
    attn_implementation: Text | None = Field(
        default=None, description="Attention of transformers (sdpa, eager, ...); null: its choice."
    )
    tokenizer: Text | None = Field(
        default=None, description="Folder, Hub name or sentencepiece file; null: the model's own."
    )
    new_tokens: NameList = Field(
        default=(), description="Tokens that the tokenizer gets; their embedding and head rows are trained too."
    )
    experts_at_once: Count = Field(
        default=8, description="How many matrices of a mixture's experts are dequantised at once, at most."
    )
    trust_remote_code: bool = Field(
        default=False, description="Let the model's folder bring Python code, which is then run."
    )

    @model_validator(mode="after")
    def _double_quant_is_said_once(self) -> ModelSection:
        option = self.storage_options.get("double_quant", self.double_quant)
        if "double_quant" in self.model_fields_set and option != self.double_quant:
            raise UsageError(
                f"model.double_quant is {self.double_quant} and model.storage_options.double_quant is {option!r}; "
                "accepted: one of them"
            )
        return self


class SubspaceSection(Section):
    """What is trained. Values left null are the method's own."""

    method: Text = Field(default="lora", description="The subspace method; `dist-subspace methods` lists them.")
    rank: Count | None = Field(default=None, description="Rank of methods that have one; null: the method's own.")
    alpha: float | None = Field(default=None, gt=0, description="Scale, as alpha / rank; null: the method's own.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training.")
    target_modules: Text | Texts | None = Field(
        default=None, description="all-linear, a list of name endings, or a regular expression; null: the method's own."
    )
    exclude_modules: NameList = Field(default=(), description="Name endings that are no targets.")
    modules_to_save: NameList = Field(default=(), description="Modules trained in full and saved with the adapter.")
    target_parameters: NameList = Field(
        default=(),
        description="Name endings of stacks of experts that are targets (experts.gate_up_proj); alone: the only ones.",
    )
    expert_parameters: names.ExpertParameters = Field(
        default="own",
        description="Whether each expert of such a stack has parameters of its own, or all share one set.",
    )
    constraint: names.Constraint | None = Field(
        default=None, description="Matrix pattern constraint; null: the method's own."
    )
    constraint_weight: float = Field(default=0.1, ge=0, description="Weight of the constraint's penalty in the loss.")
    options: dict[str, Any] = Field(default={}, description="The method's own further options.")
    rank_pattern: dict[Text, Count] = Field(default={}, description="Ranks of single layers, by name ending.")
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Alphas of single layers, by name ending."
    )
    init_from: Text | None = Field(
        default=None,
        description="Adapter (folder or hub name, ours or PEFT's) whose weights a new run begins with; null: anew.",
    )


class DataSource(Section):
    """One of several training files."""

    path: Text = Field(description="A file or a Hub data set.")
    weight: float = Field(
        default=1.0, gt=0, description="How often its samples come in one epoch; a fraction: a seeded part."
    )


class DataSection(Section):
    """The samples, and how a record becomes one."""

    train: Text | Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)] = Field(
        description="A .json .jsonl .csv .parquet .txt file, a Hub data set, or a list of {path, weight}."
    )
    eval: Text | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="A file or Hub data set, or the fraction of the training data that is held out."
    )
    format: names.Format = Field(default="alpaca", description="Which columns a record has, and how they become text.")
    max_length: int = Field(
        default=2048,
        ge=2,
        description="Most tokens of a sample, of a packed row; unset: at most the model's positions.",
    )
    packing: bool = Field(default=True, description="Several samples in a row, kept apart in attention and positions.")
    template: Text | None = Field(
        default=None, description="Replaces alpaca's prompt: text with {instruction}, {input} or any column."
    )
    text_field: Text | None = Field(default=None, description="Column in the place of text.")
    prompt_field: Text | None = Field(default=None, description="Column in the place of prompt.")
    completion_field: Text | None = Field(default=None, description="Column in the place of completion.")
    instruction_field: Text | None = Field(default=None, description="Column in the place of instruction.")
    input_field: Text | None = Field(default=None, description="Column in the place of input, which may be absent.")
    output_field: Text | None = Field(default=None, description="Column in the place of output.")
    chosen_field: Text | None = Field(default=None, description="Column in the place of chosen.")
    rejected_field: Text | None = Field(default=None, description="Column in the place of rejected.")
    messages_field: Text | None = Field(default=None, description="Column in the place of messages.")
    label_field: Text | None = Field(default=None, description="Column in the place of label.")
    tools_field: Text | None = Field(default=None, description="Column in the place of tools, which may be absent.")
    documents_field: Text | None = Field(default=None, description="Column in the place of documents; may be absent.")
    chat_template_kwargs_field: Text | None = Field(
        default=None, description="Column in the place of chat_template_kwargs (variables of the template)."
    )
    truncation: names.Truncation = Field(
        default="turns", description="What a too long conversation loses first: oldest turns, or tokens from the left."
    )
    split: Text = Field(default="train", description="Split of a Hub data set that is trained on.")
    eval_split: Text = Field(default="validation", description="Split of a Hub data set that is evaluated on.")
    cache_dir: Text | None = Field(default=None, description="Where tokenised data is kept; null: in the run's folder.")

    @model_validator(mode="before")
    @classmethod
    def _streaming_is_no_key(cls, data: Any) -> Any:
        """Configurations that earlier versions wrote have `streaming: false`, which is how samples are read."""
        if not isinstance(data, dict) or "streaming" not in data:
            return data
        if data["streaming"] is not False:
            raise UsageError(
                f"data.streaming is {str(data['streaming']).lower()}, and samples are always read from a tokenised copy on disk "
                "(in data.cache_dir); accepted: leave the key out"
            )
        return {key: value for key, value in data.items() if key != "streaming"}


class CheckpointingArguments(Section):
    """How gradient checkpointing is done."""

    use_reentrant: bool = Field(default=False, description="The older form of torch.utils.checkpoint.")


def _with_ratio(schema: dict[str, Any]) -> None:
    """`warmup_ratio` is accepted, but becomes `warmup_steps`: editors know it all the same."""
    schema["properties"]["warmup_ratio"] = {
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 1,
        "description": "warmup_steps as a share of all steps; not together with it.",
    }


class TrainingSection(Section):
    """The optimizer, its schedule and the batch."""

    model_config = ConfigDict(json_schema_extra=_with_ratio)

    objective: names.Objective = Field(
        default="sft", description="What is minimised: the samples' loss (sft), or TRL's loss of preferences."
    )
    preference: PreferenceArguments = Field(
        default=PreferenceArguments(), description="What dpo, kto and orpo need beside their data."
    )
    max_steps: Count | None = Field(default=1000, description="Optimizer steps; null where num_train_epochs is given.")
    num_train_epochs: float | None = Field(default=None, gt=0, description="Epochs, in the place of max_steps.")
    global_batch_size: Count | None = Field(
        default=64,
        description="Samples (packed rows) of a step, over all ranks; null: all of an epoch, in whole micro-batches.",
    )
    per_device_train_batch_size: Count = Field(default=1, description="Samples (packed rows) of a micro-batch.")
    per_device_eval_batch_size: Count | None = Field(
        default=None, description="The same in evaluation; null: as in training."
    )
    optim: names.Optimizer = Field(default="adamw_torch", description="Optimizer, by its Hugging Face name.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean gradient.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the squared gradient.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to the root of the squared gradient.")
    learning_rate: Rate = Field(
        default="auto",
        description="The highest learning rate; auto: the method's own for the width of the model, or the checkpoint's.",
    )
    lr_scheduler_type: names.Scheduler = Field(
        default="cosine", description="Learning-rate schedule, by its Hugging Face name."
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(default={}, description="The schedule's own further options.")
    warmup_steps: float = Field(default=0.03, ge=0, description="Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay; never on one-dimensional parameters.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip the gradient's norm to this; 0: do not clip.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of initial values, the order of samples, and dropout.")
    gradient_checkpointing: bool = Field(default=True, description="Compute activations again in backward.")
    gradient_checkpointing_kwargs: CheckpointingArguments = Field(
        default=CheckpointingArguments(), description="Which form of gradient checkpointing."
    )
    activation_offload: bool = Field(
        default=False, description="Keep what backward will read in the computer's memory, off the GPU."
    )
    on_nonfinite: names.OnNonfinite = Field(
        default="skip", description="What to do with a step whose loss or gradient is not finite."
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="End after so many evaluations in a row without a better checkpoint.metric_for_best_model (unset: the "
        "loss); null: never.",
    )
    max_time: Seconds | None = Field(
        default=None, description="Save and stop after so many seconds, or hh:mm:ss; null: no limit."
    )
    rank_timeout: Annotated[Seconds, Field(ge=10)] | None = Field(
        default=300.0,
        description="All ranks have left so many seconds (or hh:mm:ss) after one was lost or cut off; null: not watched.",
    )
    full_determinism: bool = Field(default=False, description="Bit-exact repetition on CUDA, at a cost in time.")

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("num_train_epochs") is not None:
            if data.get("max_steps") is not None:
                raise UsageError(
                    f"training.max_steps is {data['max_steps']} and training.num_train_epochs is "
                    f"{data['num_train_epochs']}; accepted: one of them"
                )
            data["max_steps"] = None
        elif data.get("max_steps", 0) is None:
            del data["max_steps"]
        if "warmup_ratio" in data:
            data["warmup_steps"] = cls._ratio(data)
        return data

    @staticmethod
    def _ratio(data: dict[str, Any]) -> Any:
        ratio = data.pop("warmup_ratio")
        if "warmup_steps" in data:
            raise UsageError(
                f"training.warmup_steps is {data['warmup_steps']} and training.warmup_ratio is {ratio}; "
                "accepted: one of them"
            )
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise UsageError(f"training.warmup_ratio is {ratio!r}; accepted: a number of at least 0 and below 1")
        return ratio

    @property
    def rate(self) -> float:
        """`learning_rate` of a configuration whose run is planned: a number, which `auto` became."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    @model_validator(mode="after")
    def _values_agree(self) -> TrainingSection:
        if self.global_batch_size is not None and self.global_batch_size % self.per_device_train_batch_size:
            raise UsageError(
                f"training.global_batch_size is {self.global_batch_size}; accepted: a multiple of "
                f"training.per_device_train_batch_size, which is {self.per_device_train_batch_size}"
            )
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise UsageError(
                f"training.warmup_steps is {self.warmup_steps}; accepted: a whole number, or a share below 1"
            )
        check_arguments(self.objective, self.preference)
        return self


class DeepspeedSection(Section):
    """Where the frozen bytes live."""

    preset: names.Preset = Field(
        default="zero3",
        description="none (torch, one process), or how DeepSpeed places the bytes; unused where config is given.",
    )
    config: Text | dict[str, Any] | None = Field(
        default=None, description='A stock DeepSpeed JSON, its path or itself, with its "auto" values.'
    )
    nvme_path: Text | None = Field(default=None, description="Folder on a fast local disk, for zero3-nvme.")

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> DeepspeedSection:
        if self.preset == "none" and self.config is not None:
            raise UsageError(
                "deepspeed.preset is 'none', but deepspeed.config is given, which DeepSpeed reads; accepted: one of them"
            )
        if self.preset == "zero3-nvme" and self.config is None and self.nvme_path is None:
            raise UsageError(
                "deepspeed.nvme_path is null; accepted with deepspeed.preset 'zero3-nvme': a folder on a fast local disk"
            )
        return self


class CheckpointSection(Section):
    """What is kept of a run, and how it continues."""

    save_steps: Count = Field(default=200, description="Steps between checkpoints; one more at the end.")
    save_total_limit: Count | None = Field(default=3, description="How many checkpoints are kept; null: all.")
    resume: Resume = Field(
        default="auto", description="auto: from the newest whole checkpoint; a folder: from that; none: anew."
    )
    metric_for_best_model: Text | None = Field(default=None, description="Evaluation metric that picks the best.")
    greater_is_better: bool | None = Field(default=None, description="Null: not for a loss or perplexity.")
    allow_different: Annotated[tuple[names.Difference, ...], Field(strict=False)] = Field(
        default=(), description="Continue a run although these differ: model, method, data."
    )


class RunSection(Section):
    """Where results go, and what is shown on the way."""

    output_dir: Text = Field(default="runs/run", description="The run's folder; unset: runs/<configuration's name>.")
    local_dir: Text | None = Field(
        default=None,
        description="Folder on a disk of each node, for its tokens and logs; null: one of the user's in TMPDIR.",
    )
    logging_steps: Count = Field(default=10, description="Steps between lines of metrics.")
    eval_steps: Count | None = Field(default=200, description="Steps between evaluations; null: only at the end.")
    report_to: Reporters = Field(
        default=("tensorboard",), description="Trackers that get the metrics beside metrics.jsonl; none: no tracker."
    )
    sample_prompts: NameList = Field(
        default=(), description="Prompts that the model answers at each evaluation, on the screen and in the trackers."
    )
    push_to_hub: Repository | None = Field(
        default=None, description="Name on the Hub (user/name) that the final adapter is pushed to; null: nowhere."
    )
    hub_private_repo: bool | None = Field(
        default=None, description="Whether a new repository there is private; null: as its owner's account has it."
    )
    profile: Count | None = Field(
        default=None, description="Trace so many steps with torch's profiler, into the run's folder; null: none."
    )


class Config(Section):
    """A whole run."""

    model: ModelSection = Field(description="The frozen model.")
    subspace: SubspaceSection = Field(default=SubspaceSection(), description="What is trained.")
    data: DataSection = Field(description="The samples.")
    training: TrainingSection = Field(default=TrainingSection(), description="Optimizer, schedule and batch.")
    deepspeed: DeepspeedSection = Field(default=DeepspeedSection(), description="ZeRO stage and offload.")
    checkpoint: CheckpointSection = Field(default=CheckpointSection(), description="Saving and continuing.")
    run: RunSection = Field(default=RunSection(), description="Output.")
