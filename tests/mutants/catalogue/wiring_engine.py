"""From the configuration to the engine: DeepSpeed's configuration, what is kept of a run, and what is written."""

from __future__ import annotations

from tests.mutants.catalogue.wiring import key_tests
from tests.mutants.mutant import Mutant

_DEEPSPEED = [
    Mutant(
        name="engine-sized-without-the-model",
        file="dist_subspace/training/trainer.py",
        text="engine_config(self.plan, self.model)",
        becomes="engine_config(self.plan, None)",
        promise="Two decoder blocks are live at once, whatever their size.",
        tests=key_tests("deepspeed.preset"),
    ),
    Mutant(
        name="weights-decay-while-the-engine-starts",
        file="dist_subspace/placement/deepspeed/engine.py",
        text='        group["lr"] = 0.0  # some engines make',
        becomes="        pass  # some engines make",
        promise="An engine's own first step changes no weight.",
        tests=key_tests("training.weight_decay"),
    ),
    Mutant(
        name="stock-json-does-not-clip",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='config.setdefault("gradient_clipping", facts.max_grad_norm)',
        becomes='config.setdefault("gradient_clipping", 0.0)',
        promise="training.max_grad_norm counts where a stock JSON says nothing about it.",
        tests=key_tests("deepspeed.config"),
    ),
    Mutant(
        name="stock-decay-compared-with-epsilon",
        file="dist_subspace/training/engine_config.py",
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
        file="dist_subspace/placement/deepspeed/presets.py",
        text='"zero2-offload": 2,',
        becomes='"zero2-offload": 1,',
        promise="A preset is the ZeRO stage in its name.",
        tests=key_tests("deepspeed.preset"),
    ),
    Mutant(
        name="preset-without-offload",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='if preset.endswith(("-offload", "-nvme")):',
        becomes='if preset.endswith("-nvme"):',
        promise="An offload preset holds the optimizer on the CPU.",
        tests=key_tests("deepspeed.preset"),
    ),
    Mutant(
        name="nvme-path-dropped",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='"nvme_path": nvme_path,',
        becomes='"nvme_path": "/local_nvme",',
        promise="deepspeed.nvme_path is where weights are swapped to.",
        tests=key_tests("deepspeed.nvme_path"),
    ),
    Mutant(
        name="stock-thresholds-overruled",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='config["zero_optimization"] = ours | section',
        becomes='config["zero_optimization"] = section | ours',
        promise="Thresholds of a stock JSON reach the engine.",
        tests=key_tests("deepspeed.config"),
    ),
    Mutant(
        name="stock-schedule-ignored",
        file="dist_subspace/training/engine_config.py",
        text="return fill_unset(config, stock_training_keys(config.deepspeed.config))",
        becomes="return config",
        promise="Optimizer and schedule of a stock JSON are the run's, where the YAML leaves them open.",
        tests=key_tests("deepspeed.config"),
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
        file="dist_subspace/training/trainer.py",
        text="if self._due(self.config.checkpoint.save_steps) or",
        becomes="if self._due(self.config.run.eval_steps) or",
        promise="checkpoint.save_steps is the distance of checkpoints.",
        tests=key_tests("checkpoint.save_steps"),
    ),
    Mutant(
        name="total-limit-ignored",
        file="dist_subspace/training/trainer.py",
        text="self.config.checkpoint.save_total_limit, keep)",
        becomes="None, keep)",
        promise="checkpoint.save_total_limit checkpoints stay.",
        tests=key_tests("checkpoint.save_total_limit"),
    ),
    Mutant(
        name="moments-forgotten-on-resume",
        file="dist_subspace/checkpoint/state.py",
        text="    engine.write_state(trainables, tensors, state.optimizer_steps)\n",
        becomes="    engine.write_state(trainables, tensors, 1)\n",
        promise="A resumed run goes on with the optimizer's counters.",
        tests=key_tests("checkpoint.resume"),
    ),
    Mutant(
        name="greater-is-better-ignored",
        file="dist_subspace/training/best.py",
        text=" if greater is None else greater",
        becomes="",
        promise="checkpoint.greater_is_better says which end is the best.",
        tests=key_tests("checkpoint.greater_is_better"),
    ),
    Mutant(
        name="loss-counts-as-greater-is-better",
        file="dist_subspace/training/best.py",
        text='_FALL = ("loss", "perplexity")',
        becomes='_FALL = ("loss",)',
        promise="Unset, a smaller perplexity is better.",
        tests=key_tests("checkpoint.metric_for_best_model"),
    ),
    Mutant(
        name="first-evaluation-stays-the-best",
        file="dist_subspace/training/best.py",
        text='(best is None or (value > best["value"] if up else value < best["value"])):',
        becomes="best is None:",
        promise="The best step is the one with the best metric.",
        tests=key_tests("checkpoint.metric_for_best_model"),
    ),
    Mutant(
        name="any-difference-allows-all",
        file="dist_subspace/checkpoint/state.py",
        text="if stored.get(what) != fingerprint and what not in allowed:",
        becomes="if stored.get(what) != fingerprint and not allowed:",
        promise="checkpoint.allow_different allows what it names alone.",
        tests=key_tests("checkpoint.allow_different"),
    ),
    Mutant(
        name="last-step-not-evaluated",
        file="dist_subspace/training/trainer.py",
        text="(self._due(self.config.run.eval_steps) or self._last())",
        becomes="self._due(self.config.run.eval_steps)",
        promise="A run ends with an evaluation.",
        tests=key_tests("run.eval_steps"),
    ),
    Mutant(
        name="logged-loss-is-of-the-last-step",
        file="dist_subspace/training/observer.py",
        text="loss=sum(step.loss for step in steps) / len(steps),",
        becomes="loss=last.loss,",
        promise="The loss of a line is the mean since the line before.",
        tests=key_tests("run.logging_steps"),
    ),
    Mutant(
        name="trackers-get-nothing",
        file="dist_subspace/training/run.py",
        text="plan.config.run.report_to, plan.run_dir,",
        becomes="(), plan.run_dir,",
        promise="run.report_to names who gets the figures.",
        tests=key_tests("run.report_to"),
    ),
]

MUTANTS = [*_DEEPSPEED, *_RESULTS]
