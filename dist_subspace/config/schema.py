"""Every key of the configuration: its type, its default, its range, and one line on what it does.

Where Hugging Face's `TrainingArguments` has a name for a thing, the key has that name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Storage = Literal["fp32", "bf16", "fp16", "nf4", "fp4", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]
Task = Literal["causal-lm", "classification"]
Format = Literal["alpaca", "chat", "completion", "text", "classification"]
Preset = Literal["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-nvme"]
Constraint = Literal["none", "mpc_o", "mpc_d", "mpc_n"]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "none"]


class Section(BaseModel):
    """A part of the configuration: frozen, and without room for a key that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class ModelSection(Section):
    path: str = Field(description="A transformers model folder with safetensors, or a hub name.")
    task: Task = Field("causal-lm", description="Which head the model has.")
    storage: Storage = Field("nf4", description="How the large linear weights are held.")
    double_quant: bool = Field(True, description="Quantise the statistics of the 4-bit storages too.")
    dtype: Dtype | None = Field(
        None,
        description="Type of everything else and of the computation; unset: float32 for storage fp32, float16 for fp16, else bfloat16.",
    )
    attn_implementation: str | None = Field(
        None, description="Attention of transformers (sdpa, eager, flash_attention_2)."
    )
    tokenizer: str | None = Field(None, description="Folder, hub name or sentencepiece file; unset: the model's own.")
    trust_remote_code: bool = Field(False, description="Let the model's folder bring Python code that is run.")


class SubspaceSection(Section):
    method: str = Field("lora", description="The subspace method (`dist-subspace methods` lists them).")
    rank: PositiveInt | None = Field(None, description="Rank of methods that have one; unset: the method's own.")
    alpha: float | None = Field(
        None, gt=0, description="Scale alpha / rank of methods that have one; unset: the method's own."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's branch.")
    target_modules: str | list[str] | None = Field(
        None, description="all-linear, a list of name endings, or a regular expression; unset: the method's own."
    )
    exclude_modules: list[str] = Field([], description="Name endings that are no targets.")
    modules_to_save: list[str] = Field([], description="Modules trained in full and saved with the adapter.")
    constraint: Constraint | None = Field(None, description="Matrix pattern constraint; unset: the method's own.")
    constraint_weight: float = Field(0.1, ge=0, description="Weight of the constraint's penalty.")
    options: dict[str, Any] = Field({}, description="The method's own options.")


class DataSource(Section):
    path: str = Field(description="A file or a Hub data set.")
    weight: float = Field(
        1.0, gt=0, description="How often its samples come in one epoch; a fraction is a seeded part."
    )


class DataSection(Section):
    train: str | list[DataSource] = Field(
        description="A .json .jsonl .csv .parquet .txt file, a Hub data set, or a list of {path, weight}."
    )
    eval: str | float | None = Field(None, description="A file, or the fraction of the training data that is held out.")
    format: Format = Field("alpaca", description="How a record becomes a sample.")
    max_length: int = Field(2048, ge=2, description="Most tokens of a sample, and of a packed row.")
    packing: bool = Field(True, description="Several samples in a row, kept apart in attention and positions.")
    streaming: bool = Field(False, description="Not offered yet: tokens are memory-mapped.")
    template: str | None = Field(
        None, description="Replaces alpaca's prompt: text with {instruction}, {input} or any column."
    )
    text_field: str | None = Field(None, description="Column in the place of `text`.")
    prompt_field: str | None = Field(None, description="Column in the place of `prompt`.")
    completion_field: str | None = Field(None, description="Column in the place of `completion`.")
    instruction_field: str | None = Field(None, description="Column in the place of `instruction`.")
    input_field: str | None = Field(None, description="Column in the place of `input`.")
    output_field: str | None = Field(None, description="Column in the place of `output`.")
    messages_field: str | None = Field(None, description="Column in the place of `messages`.")
    label_field: str | None = Field(None, description="Column in the place of `label`.")
    split: str = Field("train", description="Split of a Hub data set that is trained on.")
    eval_split: str = Field("validation", description="Split of a Hub data set that is evaluated on.")
    cache_dir: str | None = Field(None, description="Where tokenised data is kept; unset: in the run's directory.")


class TrainingSection(Section):
    max_steps: PositiveInt | None = Field(
        None, description="Optimizer steps; unset: 1000, or what num_train_epochs makes."
    )
    num_train_epochs: float | None = Field(None, gt=0, description="Epochs, in the place of max_steps.")
    global_batch_size: PositiveInt = Field(64, description="Samples (rows, with packing) a step, over all ranks.")
    per_device_train_batch_size: PositiveInt = Field(1, description="Samples of a micro-batch.")
    per_device_eval_batch_size: PositiveInt | None = Field(
        None, description="The same in evaluation; unset: as in training."
    )
    optim: Optimizer = Field("adamw_torch", description="Optimizer, by Hugging Face's name.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the mean gradient.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's decay of the squared gradient.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    learning_rate: float = Field(2e-4, gt=0, description="The highest learning rate.")
    lr_scheduler_type: Scheduler = Field("cosine", description="Learning-rate schedule, by Hugging Face's name.")
    lr_scheduler_kwargs: dict[str, Any] = Field({}, description="The schedule's own options.")
    warmup_steps: float = Field(0.03, ge=0, description="Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay; never on one-dimensional parameters.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 does not clip.")
    seed: int = Field(0, ge=0, description="Of initial values, order of samples, and dropout.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in backward.")
    gradient_checkpointing_kwargs: dict[str, Any] = Field(
        {"use_reentrant": False}, description="Options of torch's checkpoint."
    )
    on_nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="What to do with a step whose loss or gradient is not finite."
    )
    max_time: float | str | None = Field(None, description="Stop and save after so many seconds, or hh:mm:ss.")
    full_determinism: bool = Field(False, description="Bit-exact repetition on CUDA, at a cost.")


class DeepspeedSection(Section):
    preset: Preset = Field("zero3", description="How optimizer, gradients and weights are split over the ranks.")
    config: str | dict[str, Any] | None = Field(
        None, description="A stock DeepSpeed JSON, with its auto values, instead."
    )
    nvme_path: str | None = Field(None, description="Folder of zero3-nvme.")


class CheckpointSection(Section):
    save_steps: PositiveInt = Field(200, description="Save a checkpoint after every so many steps, and at the end.")
    save_total_limit: PositiveInt | None = Field(3, description="Keep so many checkpoints; null keeps all.")
    resume: str | None = Field(
        "auto", description="auto: from the newest whole checkpoint; a folder: from that; none: anew."
    )
    metric_for_best_model: str | None = Field(
        None, description="Keep the checkpoint that is best by this, and end with it."
    )
    greater_is_better: bool | None = Field(None, description="Unset: not for a loss or perplexity.")
    allow_different: list[Literal["model", "method", "data"]] = Field(
        [], description="Continue a run although these differ."
    )


class RunSection(Section):
    output_dir: str = Field("", description="The run's directory; unset: runs/<name of the configuration>.")
    logging_steps: PositiveInt = Field(10, description="Log after every so many steps.")
    eval_steps: PositiveInt | None = Field(
        200, description="Evaluate after every so many steps; null: only at the end."
    )
    report_to: list[Tracker] = Field(["tensorboard"], description="Trackers that get the metrics.")


class Config(Section):
    """A run."""

    model: ModelSection = Field(description="What is fine-tuned.")
    subspace: SubspaceSection = Field(SubspaceSection(), description="What is trained.")
    data: DataSection = Field(description="On what.")
    training: TrainingSection = Field(TrainingSection(), description="How.")
    deepspeed: DeepspeedSection = Field(DeepspeedSection(), description="On which split over the ranks.")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="What is saved.")
    run: RunSection = Field(RunSection(), description="Where, and what is shown.")
