"""From the configuration to the engine: what each key must reach."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINING, PLACEMENT = "dist_subspace/training", "dist_subspace/placement"
TRAINER, ENGINE, PLAN, MODEL, RUN = (f"{TRAINING}/{name}.py" for name in ("trainer", "engine", "plan", "model", "run"))
OPTIMIZERS, SCHEDULE, ENGINE_CONFIG = (f"{TRAINING}/{name}.py" for name in ("optimizers", "schedule", "engine_config"))
PRESETS, STOCK = f"{PLACEMENT}/presets.py", f"{PLACEMENT}/stock.py"


def _key(name: str) -> list[str]:
    """The generated test of one key."""
    test = "test_a_key_changes_the_run_as_the_reference_says"
    return [f"tests/keys/test_{name.partition('.')[0]}.py::{test}[{name}]"]


def _optimizer(name: str) -> list[str]:
    return [f"tests/training/test_optimizers.py::test_a_name_gives_the_steps_of_transformers_own_optimizer[{name}]"]


TWO_RANKS = ["tests/keys/test_ranks.py::test_two_ranks_under_zero_3_go_the_way_of_a_plain_loop"]

_OPTIMIZER = [
    Mutant(
        name="weight-decay-not-passed",
        file=TRAINER,
        text="parameter_groups(self.model, training.learning_rate, training.weight_decay)",
        becomes="parameter_groups(self.model, training.learning_rate, 0.0)",
        promise="training.weight_decay decays the trained matrices.",
        tests=_key("training.weight_decay"),
    ),
    Mutant(
        name="weight-decay-on-vectors",
        file="dist_subspace/subspace/groups.py",
        text="decay = weight_decay if len(attachment.shapes[name]) > 1 else 0.0",
        becomes="decay = weight_decay",
        promise="One-dimensional parameters are never decayed.",
        tests=_key("training.weight_decay"),
    ),
    Mutant(
        name="adam-betas-dropped",
        file=OPTIMIZERS,
        text="lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.epsilon, **options)",
        becomes="lr=s.learning_rate, eps=s.epsilon, **options)",
        promise="AdamW has the configuration's betas.",
        tests=_key("training.adam_beta1"),
    ),
    Mutant(
        name="adam-beta2-is-the-default",
        file=TRAINER,
        text="training.adam_beta1, training.adam_beta2, training.adam_epsilon",
        becomes="training.adam_beta1, 0.999, training.adam_epsilon",
        promise="training.adam_beta2 reaches the optimizer.",
        tests=_key("training.adam_beta2"),
    ),
    Mutant(
        name="adam-epsilon-dropped",
        file=OPTIMIZERS,
        text="betas=(s.beta1, s.beta2), eps=s.epsilon, **options)",
        becomes="betas=(s.beta1, s.beta2), **options)",
        promise="training.adam_epsilon reaches AdamW.",
        tests=_key("training.adam_epsilon"),
    ),
    Mutant(
        name="bitsandbytes-epsilon-dropped",
        file=OPTIMIZERS,
        text='{"eps": s.epsilon} if "Adam" in name else {}',
        becomes="{}",
        promise="training.adam_epsilon reaches bitsandbytes' optimizers.",
        tests=_optimizer("adamw_8bit"),
    ),
    Mutant(
        name="fused-adamw-is-the-plain-one",
        file=OPTIMIZERS,
        text='"adamw_torch_fused": lambda groups, s: _adamw(groups, s, fused=True)',
        becomes='"adamw_torch_fused": lambda groups, s: _adamw(groups, s)',
        promise="adamw_torch_fused is torch's fused AdamW.",
        tests=_optimizer("adamw_torch_fused"),
    ),
    Mutant(
        name="rmsprop-is-sgd",
        file=OPTIMIZERS,
        text='"rmsprop": _of_torch("RMSprop")',
        becomes='"rmsprop": _of_torch("SGD")',
        promise="Each name of training.optim is the optimizer of that name.",
        tests=_key("training.optim"),
    ),
    Mutant(
        name="lion-in-8-bits-has-32",
        file=OPTIMIZERS,
        text='"lion_8bit": _of_bitsandbytes("Lion8bit")',
        becomes='"lion_8bit": _of_bitsandbytes("Lion32bit")',
        promise="lion_8bit keeps its state in 8 bits.",
        tests=_optimizer("lion_8bit"),
    ),
    Mutant(
        name="clipping-ignored-by-presets",
        file=ENGINE_CONFIG,
        text="            max_grad_norm=training.max_grad_norm,\n            trainable_numel",
        becomes="            max_grad_norm=0.0,\n            trainable_numel",
        promise="training.max_grad_norm clips the gradient of the global batch.",
        tests=_key("training.max_grad_norm"),
    ),
    Mutant(
        name="logged-norm-is-the-clipped-one",
        file=ENGINE,
        text="            self._norm = self._plain_norm()",
        becomes="            self._norm = min(self._plain_norm(), self.engine.gradient_clipping() or float('inf'))",
        promise="grad_norm in metrics.jsonl is the norm before clipping.",
        tests=_key("training.max_grad_norm"),
    ),
]

_SCHEDULE = [
    Mutant(
        name="rate-never-written",
        file=TRAINER,
        text='            group["lr"] = rate\n        rate = self.schedule.rates[0]',
        becomes="            pass\n        rate = self.schedule.rates[0]",
        promise="The schedule's rate is the optimizer's.",
        tests=_key("training.max_steps"),
    ),
    Mutant(
        name="schedule-a-step-ahead",
        file=SCHEDULE,
        text="        return self.at(self._step)",
        becomes="        return self.at(self._step + 1)",
        promise="The first step has the schedule's first rate.",
        tests=_key("training.max_steps"),
    ),
    Mutant(
        name="schedule-five-steps-too-long",
        file=SCHEDULE,
        text="num_training_steps=total_steps,",
        becomes="num_training_steps=total_steps + 5,",
        promise="The schedule is as long as the run.",
        tests=_key("training.max_steps"),
    ),
    Mutant(
        name="warmup-dropped",
        file=SCHEDULE,
        text="num_warmup_steps=warmup_count(warmup_steps, total_steps)",
        becomes="num_warmup_steps=0",
        promise="training.warmup_steps is the length of the warm-up.",
        tests=_key("training.warmup_steps"),
    ),
    Mutant(
        name="warmup-rounded-down",
        file=SCHEDULE,
        text="return -int(-warmup_steps * total_steps // 1) if",
        becomes="return int(warmup_steps * total_steps) if",
        promise="A share of all steps is rounded up, as transformers does.",
        tests=_key("training.warmup_steps"),
    ),
    Mutant(
        name="schedule-options-dropped",
        file=SCHEDULE,
        text="        training.lr_scheduler_kwargs,\n",
        becomes="        {},\n",
        promise="training.lr_scheduler_kwargs reach the schedule.",
        tests=_key("training.lr_scheduler_kwargs"),
    ),
    Mutant(
        name="options-without-a-use-accepted",
        file=SCHEDULE,
        text="if options and name in _WITHOUT_OPTIONS:",
        becomes="if False:",
        promise="Options that a schedule has no use for are refused.",
        tests=[
            "tests/training/test_schedule.py::test_options_that_a_schedule_does_not_take_or_lacks_are_named"
            "[constant-options4-has no options]"
        ],
    ),
    Mutant(
        name="schedule-type-dropped",
        file=SCHEDULE,
        text="        training.lr_scheduler_type,\n",
        becomes='        "cosine",\n',
        promise="training.lr_scheduler_type is the schedule.",
        tests=_key("training.lr_scheduler_type"),
    ),
    Mutant(
        name="plateau-never-told",
        file=TRAINER,
        text='self.schedule.evaluated(values["eval_loss"])',
        becomes="pass",
        promise="A plateau schedule is told the loss of each evaluation.",
        tests=_key("training.lr_scheduler_kwargs"),
    ),
    Mutant(
        name="epochs-ignored",
        file=PLAN,
        text="return batches.total_steps(config.training.num_train_epochs)",
        becomes="return batches.total_steps(1)",
        promise="training.num_train_epochs is how many epochs are trained.",
        tests=_key("training.num_train_epochs"),
    ),
    Mutant(
        name="epochs-rounded-down",
        file=f"{TRAINING}/data/batches.py",
        text="math.ceil(rows / self.global_batch_size - 1e-9)",
        becomes="int(rows / self.global_batch_size)",
        promise="The last samples of the epochs have a step too.",
        tests=_key("training.num_train_epochs"),
    ),
    Mutant(
        name="schedule-begins-anew-on-resume",
        file=TRAINER,
        text="self.schedule.restore(state.schedule, state.step)",
        becomes="self.schedule.restore(state.schedule, 0)",
        promise="A resumed run goes on in its schedule.",
        tests=_key("checkpoint.resume"),
    ),
]

_STEP = [
    Mutant(
        name="dropout-alike-in-every-micro-batch",
        file=ENGINE,
        text="seed_micro_batch(self.seed, micro.number)",
        becomes="seed_micro_batch(self.seed, 0)",
        promise="Each micro-batch drops something else.",
        tests=_key("training.seed"),
    ),
    Mutant(
        name="head-without-the-seed",
        file=MODEL,
        text="seed=config.training.seed,",
        becomes="seed=0,",
        promise="training.seed chooses a new head's initial values.",
        tests=_key("training.seed"),
    ),
    Mutant(
        name="skipped-step-is-not-counted",
        file=ENGINE,
        text="                self.engine.micro_steps += 1  # what engine.step would have counted\n",
        becomes="",
        promise="The steps after a skipped one are whole.",
        tests=_key("training.on_nonfinite"),
    ),
    Mutant(
        name="checkpointing-ignored",
        file=MODEL,
        text="    elif training.gradient_checkpointing:\n",
        becomes="    elif False:\n",
        promise="training.gradient_checkpointing computes the layers again in backward.",
        tests=_key("training.gradient_checkpointing"),
    ),
    Mutant(
        name="checkpointing-always",
        file=MODEL,
        text="    elif training.gradient_checkpointing:\n",
        becomes="    else:\n",
        promise="Without training.gradient_checkpointing nothing is computed twice.",
        tests=_key("training.gradient_checkpointing"),
    ),
    Mutant(
        name="reentrant-ignored",
        file=MODEL,
        text="enable(training.gradient_checkpointing_kwargs.model_dump())",
        becomes="enable()",
        promise="use_reentrant chooses the form of checkpointing.",
        tests=_key("training.gradient_checkpointing_kwargs.use_reentrant"),
    ),
    Mutant(
        name="determinism-ignored",
        file=TRAINER,
        text="if plan.config.training.full_determinism:",
        becomes="if False:",
        promise="training.full_determinism sets torch's deterministic algorithms.",
        tests=_key("training.full_determinism"),
    ),
    Mutant(
        name="order-without-the-seed",
        file=PLAN,
        text="        seed=config.training.seed,\n",
        becomes="        seed=0,\n",
        promise="training.seed chooses the order of samples.",
        tests=_key("training.seed"),
    ),
    Mutant(
        name="start-without-the-seed",
        file=PLAN,
        text='{"seed": config.training.seed}',
        becomes='{"seed": 0}',
        promise="training.seed chooses the method's initial values.",
        tests=_key("training.seed"),
    ),
    Mutant(
        name="dropout-without-the-seed",
        file=TRAINER,
        text="self.config.training.seed, world().size)",
        becomes="0, world().size)",
        promise="training.seed chooses what dropout drops.",
        tests=_key("training.seed"),
    ),
    Mutant(
        name="stop-at-nonfinite-ignored",
        file=TRAINER,
        text='self.config.training.on_nonfinite == "stop"',
        becomes='self.config.training.on_nonfinite == "raise"',
        promise="on_nonfinite stop ends the run at the step that is not finite.",
        tests=_key("training.on_nonfinite"),
    ),
    Mutant(
        name="max-time-ignored",
        file=TRAINER,
        text="Pause(STOP, plan.config.training.max_time, plan.device)",
        becomes="Pause(STOP, None, plan.device)",
        promise="training.max_time ends the run with what it has.",
        tests=_key("training.max_time"),
    ),
    Mutant(
        name="accumulation-divides-again",
        file=ENGINE,
        text="self.engine.backward(loss * factor, scale_wrt_gas=False)",
        becomes="self.engine.backward(loss * factor)",
        promise="Micro-batches add up to one large batch.",
        tests=_key("training.global_batch_size"),
    ),
    Mutant(
        name="ranks-not-multiplied-back",
        file=ENGINE,
        text="weight = self.world_size / max(1, targets) if counts else 0.0",
        becomes="weight = 1.0 / max(1, targets) if counts else 0.0",
        promise="The gradient on two ranks is that of one.",
        tests=TWO_RANKS,
    ),
    Mutant(
        name="eval-batch-size-ignored",
        file=TRAINER,
        text="training.per_device_eval_batch_size or training.per_device_train_batch_size",
        becomes="training.per_device_train_batch_size",
        promise="training.per_device_eval_batch_size is the size of a call in evaluation.",
        tests=_key("training.per_device_eval_batch_size"),
    ),
]

_DEEPSPEED = [
    Mutant(
        name="engine-sized-without-the-model",
        file=TRAINER,
        text="engine_config(self.plan, self.model)",
        becomes="engine_config(self.plan, None)",
        promise="Two decoder blocks are live at once, whatever their size.",
        tests=_key("deepspeed.preset"),
    ),
    Mutant(
        name="weights-decay-while-the-engine-starts",
        file=ENGINE,
        text='        group["lr"] = 0.0  # some engines make',
        becomes="        pass  # some engines make",
        promise="An engine's own first step changes no weight.",
        tests=_key("deepspeed.preset"),
    ),
    Mutant(
        name="stock-json-does-not-clip",
        file=STOCK,
        text='config.setdefault("gradient_clipping", facts.max_grad_norm)',
        becomes='config.setdefault("gradient_clipping", 0.0)',
        promise="training.max_grad_norm counts where a stock JSON says nothing about it.",
        tests=_key("deepspeed.config"),
    ),
    Mutant(
        name="stock-decay-compared-with-epsilon",
        file=ENGINE_CONFIG,
        text="weight_decay=training.weight_decay,",
        becomes="weight_decay=training.adam_epsilon,",
        promise="A stock JSON's weight decay is compared with the YAML's.",
        tests=[
            "tests/training/test_engine_config.py::test_a_value_that_is_not_the_yamls_is_refused_with_both_names"
            "[optimizer.params.weight_decay]",
            "tests/training/test_engine_config.py::test_a_json_that_says_all_that_the_yaml_says_is_taken",
        ],
    ),
    Mutant(
        name="offload-preset-at-stage-1",
        file=PRESETS,
        text='"zero2-offload": 2,',
        becomes='"zero2-offload": 1,',
        promise="A preset is the ZeRO stage in its name.",
        tests=_key("deepspeed.preset"),
    ),
    Mutant(
        name="preset-without-offload",
        file=PRESETS,
        text='if preset.endswith(("-offload", "-nvme")):',
        becomes='if preset.endswith("-nvme"):',
        promise="An offload preset holds the optimizer on the CPU.",
        tests=_key("deepspeed.preset"),
    ),
    Mutant(
        name="nvme-path-dropped",
        file=PRESETS,
        text='"nvme_path": nvme_path,',
        becomes='"nvme_path": "/local_nvme",',
        promise="deepspeed.nvme_path is where weights are swapped to.",
        tests=_key("deepspeed.nvme_path"),
    ),
    Mutant(
        name="stock-thresholds-overruled",
        file=STOCK,
        text='config["zero_optimization"] = ours | section',
        becomes='config["zero_optimization"] = section | ours',
        promise="Thresholds of a stock JSON reach the engine.",
        tests=_key("deepspeed.config"),
    ),
    Mutant(
        name="stock-schedule-ignored",
        file=ENGINE_CONFIG,
        text="return fill_unset(config, stock_training_keys(read_deepspeed(config.deepspeed.config)))",
        becomes="return config",
        promise="Optimizer and schedule of a stock JSON are the run's, where the YAML leaves them open.",
        tests=_key("deepspeed.config"),
    ),
    Mutant(
        name="filling-closes-every-key",
        file="dist_subspace/config/load.py",
        text='config.model_dump(mode="json", exclude_unset=True)',
        becomes='config.model_dump(mode="json")',
        promise="A stock JSON leaves the keys open that it does not fill.",
        tests=["tests/config/test_load.py::test_only_keys_left_open_are_filled"],
    ),
]

_RESULTS = [
    Mutant(
        name="save-steps-are-those-of-evaluation",
        file=TRAINER,
        text="if self._due(self.config.checkpoint.save_steps) or",
        becomes="if self._due(self.config.run.eval_steps) or",
        promise="checkpoint.save_steps is the distance of checkpoints.",
        tests=_key("checkpoint.save_steps"),
    ),
    Mutant(
        name="total-limit-ignored",
        file=TRAINER,
        text="self.config.checkpoint.save_total_limit, keep)",
        becomes="None, keep)",
        promise="checkpoint.save_total_limit checkpoints stay.",
        tests=_key("checkpoint.save_total_limit"),
    ),
    Mutant(
        name="moments-forgotten-on-resume",
        file="dist_subspace/checkpoint/state.py",
        text="    write_state(engine, named_trainables(model), tensors, state.optimizer_steps)\n",
        becomes="    write_state(engine, named_trainables(model), tensors, 1)\n",
        promise="A resumed run goes on with the optimizer's counters.",
        tests=_key("checkpoint.resume"),
    ),
    Mutant(
        name="greater-is-better-ignored",
        file=TRAINER,
        text=" if greater is None else greater",
        becomes="",
        promise="checkpoint.greater_is_better says which end is the best.",
        tests=_key("checkpoint.greater_is_better"),
    ),
    Mutant(
        name="loss-counts-as-greater-is-better",
        file=TRAINER,
        text='up = not name.endswith(("loss", "perplexity"))',
        becomes='up = not name.endswith("loss")',
        promise="Unset, a smaller perplexity is better.",
        tests=_key("checkpoint.metric_for_best_model"),
    ),
    Mutant(
        name="first-evaluation-stays-the-best",
        file=TRAINER,
        text='if best is None or (values[name] > best["value"]) == up:',
        becomes="if best is None:",
        promise="The best step is the one with the best metric.",
        tests=_key("checkpoint.metric_for_best_model"),
    ),
    Mutant(
        name="any-difference-allows-all",
        file="dist_subspace/checkpoint/state.py",
        text="if stored.get(what) != fingerprint and what not in allowed:",
        becomes="if stored.get(what) != fingerprint and not allowed:",
        promise="checkpoint.allow_different allows what it names alone.",
        tests=_key("checkpoint.allow_different"),
    ),
    Mutant(
        name="last-step-not-evaluated",
        file=TRAINER,
        text="(self._due(self.config.run.eval_steps) or self._last())",
        becomes="self._due(self.config.run.eval_steps)",
        promise="A run ends with an evaluation.",
        tests=_key("run.eval_steps"),
    ),
    Mutant(
        name="logged-loss-is-of-the-last-step",
        file=f"{TRAINING}/observer.py",
        text='"loss": sum(self._losses) / len(self._losses),',
        becomes='"loss": self._losses[-1],',
        promise="The loss of a line is the mean since the line before.",
        tests=_key("run.logging_steps"),
    ),
    Mutant(
        name="trackers-get-nothing",
        file=RUN,
        text="plan.config.run.report_to, plan.run_dir,",
        becomes="(), plan.run_dir,",
        promise="run.report_to names who gets the figures.",
        tests=_key("run.report_to"),
    ),
]

MUTANTS = [*_OPTIMIZER, *_SCHEDULE, *_STEP, *_DEEPSPEED, *_RESULTS]
