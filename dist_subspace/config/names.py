"""The closed lists of the configuration. Methods and storages are no closed lists: a new one is a file of its own."""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
Task = Literal["causal-lm", "classification"]
Format = Literal[
    "alpaca",
    "chat",
    "completion",
    "text",
    "classification",
    "preference",
    "chat-preference",
    "unpaired-preference",
    "chat-unpaired-preference",
]
Objective = Literal["sft", "dpo", "kto", "orpo"]
# TRL's names. Those of its losses that mix the pairs of a micro-batch (aot, sft) would depend on the number of ranks.
DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
]
KtoLoss = Literal["kto", "apo_zero_unpaired"]
PreferenceLoss = Literal[DpoLoss, KtoLoss]
DPO_LOSSES, KTO_LOSSES = get_args(DpoLoss), get_args(KtoLoss)
Truncation = Literal["turns", "tokens"]
Preset = Literal[
    "none", "zero0", "zero1", "zero2", "zero3", "zero3-hpz", "zero2-offload", "zero3-offload", "zero3-nvme"
]
Constraint = Literal["none", "mpc_o", "mpc_d", "mpc_n"]
ExpertParameters = Literal["own", "shared"]
# accelerate's names, which are those of the trackers' packages.
Reporter = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
OnNonfinite = Literal["skip", "stop"]
Difference = Literal["model", "method", "data"]
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

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
