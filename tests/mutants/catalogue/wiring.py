"""From the configuration to the engine: optimizer, schedule and the step."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINING = "dist_subspace/training"
TRAINER, ENGINE, PLAN, MODEL, RUN = (f"{TRAINING}/{name}.py" for name in ("trainer", "engine", "plan", "model", "run"))
OPTIMIZERS, SCHEDULE, ENGINE_CONFIG = (f"{TRAINING}/{name}.py" for name in ("optimizers", "schedule", "engine_config"))


def key_tests(name: str) -> list[str]:
    """The generated test of one key."""
    test = "test_a_key_changes_the_run_as_the_reference_says"
    return [f"tests/keys/test_{name.partition('.')[0]}.py::{test}[{name}]"]


def _optimizer(name: str) -> list[str]:
    return [f"tests/training/test_optimizers.py::test_a_name_gives_the_steps_of_transformers_own_optimizer[{name}]"]


TWO_RANKS = ["tests/keys/test_ranks.py::test_two_ranks_under_zero_3_go_the_way_of_a_plain_loop"]

_OPTIMIZER = [
    Mutant(
        name="weight-decay-not-passed",
        file="dist_subspace/training/trainer.py",
        text="parameter_groups(self.model, training.rate, training.weight_decay)",
        becomes="parameter_groups(self.model, training.rate, 0.0)",
        promise="training.weight_decay decays the trained matrices.",
        tests=key_tests("training.weight_decay"),
    ),
    Mutant(
        name="weight-decay-on-vectors",
        file="dist_subspace/subspace/groups.py",
        text="decay = weight_decay if len(attachment.shapes[name]) - of_experts > 1 else 0.0",
        becomes="decay = weight_decay",
        promise="One-dimensional parameters are never decayed.",
        tests=key_tests("training.weight_decay"),
    ),
    Mutant(
        name="adam-betas-dropped",
        file="dist_subspace/training/optimizers.py",
        text="lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.epsilon, **options)",
        becomes="lr=s.learning_rate, eps=s.epsilon, **options)",
        promise="AdamW has the configuration's betas.",
        tests=key_tests("training.adam_beta1"),
    ),
    Mutant(
        name="adam-beta2-is-the-default",
        file="dist_subspace/training/sections.py",
        text="section.adam_beta1, section.adam_beta2, section.adam_epsilon",
        becomes="section.adam_beta1, 0.999, section.adam_epsilon",
        promise="training.adam_beta2 reaches the optimizer.",
        tests=key_tests("training.adam_beta2"),
    ),
    Mutant(
        name="adam-epsilon-dropped",
        file="dist_subspace/training/optimizers.py",
        text="betas=(s.beta1, s.beta2), eps=s.epsilon, **options)",
        becomes="betas=(s.beta1, s.beta2), **options)",
        promise="training.adam_epsilon reaches AdamW.",
        tests=key_tests("training.adam_epsilon"),
    ),
    Mutant(
        name="bitsandbytes-epsilon-dropped",
        file="dist_subspace/training/optimizers.py",
        text='{"eps": s.epsilon} if "Adam" in name else {}',
        becomes="{}",
        promise="training.adam_epsilon reaches bitsandbytes' optimizers.",
        tests=_optimizer("adamw_8bit"),
    ),
    Mutant(
        name="fused-adamw-is-the-plain-one",
        file="dist_subspace/training/optimizers.py",
        text='"adamw_torch_fused": lambda groups, s: _adamw(groups, s, fused=True)',
        becomes='"adamw_torch_fused": lambda groups, s: _adamw(groups, s)',
        promise="adamw_torch_fused is torch's fused AdamW.",
        tests=_optimizer("adamw_torch_fused"),
    ),
    Mutant(
        name="rmsprop-is-sgd",
        file="dist_subspace/training/optimizers.py",
        text='"rmsprop": _of_torch("RMSprop")',
        becomes='"rmsprop": _of_torch("SGD")',
        promise="Each name of training.optim is the optimizer of that name.",
        tests=key_tests("training.optim"),
    ),
    Mutant(
        name="lion-in-8-bits-has-32",
        file="dist_subspace/training/optimizers.py",
        text='"lion_8bit": _of_bitsandbytes("Lion8bit")',
        becomes='"lion_8bit": _of_bitsandbytes("Lion32bit")',
        promise="lion_8bit keeps its state in 8 bits.",
        tests=_optimizer("lion_8bit"),
    ),
    Mutant(
        name="clipping-ignored-by-presets",
        file="dist_subspace/placement/engines.py",
        text="            max_grad_norm=facts.max_grad_norm,\n            trainable_numel",
        becomes="            max_grad_norm=0.0,\n            trainable_numel",
        promise="training.max_grad_norm clips the gradient of the global batch.",
        tests=key_tests("training.max_grad_norm"),
    ),
    Mutant(
        name="logged-norm-is-the-clipped-one",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="            self._norm = total_norm(gradients)",
        becomes="            self._norm = min(total_norm(gradients), self.deepspeed.gradient_clipping() or float('inf'))",
        promise="grad_norm in metrics.jsonl is the norm before clipping.",
        tests=key_tests("training.max_grad_norm"),
    ),
]

_SCHEDULE = [
    Mutant(
        name="rate-never-written",
        file="dist_subspace/training/trainer.py",
        text="        self.engine.rates = self.schedule.rates\n",
        becomes="",
        promise="The schedule's rate is the optimizer's.",
        tests=key_tests("training.max_steps"),
    ),
    Mutant(
        name="schedule-a-step-ahead",
        file="dist_subspace/training/schedule.py",
        text="        return self.at(self._step)",
        becomes="        return self.at(self._step + 1)",
        promise="The first step has the schedule's first rate.",
        tests=key_tests("training.max_steps"),
    ),
    Mutant(
        name="schedule-five-steps-too-long",
        file="dist_subspace/training/schedule.py",
        text="num_training_steps=total_steps,",
        becomes="num_training_steps=total_steps + 5,",
        promise="The schedule is as long as the run.",
        tests=key_tests("training.max_steps"),
    ),
    Mutant(
        name="warmup-dropped",
        file="dist_subspace/training/schedule.py",
        text="num_warmup_steps=warmup_count(warmup_steps, total_steps)",
        becomes="num_warmup_steps=0",
        promise="training.warmup_steps is the length of the warm-up.",
        tests=key_tests("training.warmup_steps"),
    ),
    Mutant(
        name="warmup-rounded-down",
        file="dist_subspace/training/schedule.py",
        text="return -int(-warmup_steps * total_steps // 1) if",
        becomes="return int(warmup_steps * total_steps) if",
        promise="A share of all steps is rounded up, as transformers does.",
        tests=key_tests("training.warmup_steps"),
    ),
    Mutant(
        name="schedule-options-dropped",
        file="dist_subspace/training/schedule.py",
        text="        training.lr_scheduler_kwargs,\n",
        becomes="        {},\n",
        promise="training.lr_scheduler_kwargs reach the schedule.",
        tests=key_tests("training.lr_scheduler_kwargs"),
    ),
    Mutant(
        name="options-without-a-use-accepted",
        file="dist_subspace/training/schedule.py",
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
        file="dist_subspace/training/schedule.py",
        text="        training.lr_scheduler_type,\n",
        becomes='        "cosine",\n',
        promise="training.lr_scheduler_type is the schedule.",
        tests=key_tests("training.lr_scheduler_type"),
    ),
    Mutant(
        name="plateau-never-told",
        file="dist_subspace/training/trainer.py",
        text='self.schedule.evaluated(values["eval_loss"])',
        becomes="pass",
        promise="A plateau schedule is told the loss of each evaluation.",
        tests=key_tests("training.lr_scheduler_kwargs"),
    ),
    Mutant(
        name="epochs-ignored",
        file="dist_subspace/training/plan.py",
        text="return batches.total_steps(config.training.num_train_epochs)",
        becomes="return batches.total_steps(1)",
        promise="training.num_train_epochs is how many epochs are trained.",
        tests=key_tests("training.num_train_epochs"),
    ),
    Mutant(
        name="epochs-rounded-down",
        file="dist_subspace/training/data/batches.py",
        text="math.ceil(rows / self.global_batch_size - 1e-9)",
        becomes="int(rows / self.global_batch_size)",
        promise="The last samples of the epochs have a step too.",
        tests=key_tests("training.num_train_epochs"),
    ),
    Mutant(
        name="schedule-begins-anew-on-resume",
        file="dist_subspace/training/trainer.py",
        text="self.schedule.restore(state.schedule, state.step)",
        becomes="self.schedule.restore(state.schedule, 0)",
        promise="A resumed run goes on in its schedule.",
        tests=key_tests("checkpoint.resume"),
    ),
]

_STEP = [
    Mutant(
        name="dropout-alike-in-every-micro-batch",
        file="dist_subspace/training/engine.py",
        text="seed_micro_batch(self.seed, micro.number)",
        becomes="seed_micro_batch(self.seed, 0)",
        promise="Each micro-batch drops something else.",
        tests=key_tests("training.seed"),
    ),
    Mutant(
        name="head-without-the-seed",
        file="dist_subspace/training/model.py",
        text="seed=config.training.seed,",
        becomes="seed=0,",
        promise="training.seed chooses a new head's initial values.",
        tests=key_tests("training.seed"),
    ),
    Mutant(
        name="skipped-step-is-not-counted",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="                self.deepspeed.micro_steps += 1  # what engine.step would have counted\n",
        becomes="",
        promise="The steps after a skipped one are whole.",
        tests=key_tests("training.on_nonfinite"),
    ),
    Mutant(
        name="checkpointing-ignored",
        file="dist_subspace/training/model.py",
        text="    elif training.gradient_checkpointing:\n",
        becomes="    elif False:\n",
        promise="training.gradient_checkpointing computes the layers again in backward.",
        tests=key_tests("training.gradient_checkpointing"),
    ),
    Mutant(
        name="checkpointing-always",
        file="dist_subspace/training/model.py",
        text="    elif training.gradient_checkpointing:\n",
        becomes="    else:\n",
        promise="Without training.gradient_checkpointing nothing is computed twice.",
        tests=key_tests("training.gradient_checkpointing"),
    ),
    Mutant(
        name="reentrant-ignored",
        file="dist_subspace/training/model.py",
        text="enable(training.gradient_checkpointing_kwargs.model_dump())",
        becomes="enable()",
        promise="use_reentrant chooses the form of checkpointing.",
        tests=key_tests("training.gradient_checkpointing_kwargs.use_reentrant"),
    ),
    Mutant(
        name="determinism-ignored",
        file="dist_subspace/training/trainer.py",
        text="if plan.config.training.full_determinism:",
        becomes="if False:",
        promise="training.full_determinism sets torch's deterministic algorithms.",
        tests=key_tests("training.full_determinism"),
    ),
    Mutant(
        name="order-without-the-seed",
        file="dist_subspace/training/sections.py",
        text="per_device_train_batch_size,\n        seed=config.training.seed,\n",
        becomes="per_device_train_batch_size,\n        seed=0,\n",
        promise="training.seed chooses the order of samples.",
        tests=key_tests("training.seed"),
    ),
    Mutant(
        name="start-without-the-seed",
        file="dist_subspace/training/sections.py",
        text="        alpha_pattern=section.alpha_pattern,\n        seed=config.training.seed,\n",
        becomes="        alpha_pattern=section.alpha_pattern,\n        seed=0,\n",
        promise="training.seed chooses the method's initial values.",
        tests=key_tests("training.seed"),
    ),
    Mutant(
        name="dropout-without-the-seed",
        file="dist_subspace/training/trainer.py",
        text="        seed = self.config.training.seed",
        becomes="        seed = 0",
        promise="training.seed chooses what dropout drops.",
        tests=key_tests("training.seed"),
    ),
    Mutant(
        name="stop-at-nonfinite-ignored",
        file="dist_subspace/training/trainer.py",
        text='self.config.training.on_nonfinite == "stop"',
        becomes='self.config.training.on_nonfinite == "raise"',
        promise="on_nonfinite stop ends the run at the step that is not finite.",
        tests=key_tests("training.on_nonfinite"),
    ),
    Mutant(
        name="max-time-ignored",
        file="dist_subspace/training/trainer.py",
        text="Pause(STOP, plan.config.training.max_time, plan.device)",
        becomes="Pause(STOP, None, plan.device)",
        promise="training.max_time ends the run with what it has.",
        tests=key_tests("training.max_time"),
    ),
    Mutant(
        name="accumulation-divides-again",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="loss if missing == 1.0 else loss * missing, scale_wrt_gas=False)",
        becomes="loss if missing == 1.0 else loss * missing)",
        promise="Micro-batches add up to one large batch.",
        tests=key_tests("training.global_batch_size"),
    ),
    Mutant(
        name="ranks-not-multiplied-back",
        file="dist_subspace/training/engine.py",
        text="weight = self.world_size / max(1, terms) if counts else 0.0",
        becomes="weight = 1.0 / max(1, terms) if counts else 0.0",
        promise="The gradient on two ranks is that of one.",
        tests=TWO_RANKS,
    ),
    Mutant(
        name="eval-batch-size-ignored",
        file="dist_subspace/training/trainer.py",
        text="training.per_device_eval_batch_size or training.per_device_train_batch_size",
        becomes="training.per_device_train_batch_size",
        promise="training.per_device_eval_batch_size is the size of a call in evaluation.",
        tests=key_tests("training.per_device_eval_batch_size"),
    ),
]

MUTANTS = [*_OPTIMIZER, *_SCHEDULE, *_STEP]
