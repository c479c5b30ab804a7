"""The training loop: load, attach, step, evaluate, save. What is decided from local state is agreed on by all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import enable_full_determinism

from dist_subspace.advancing import advance, discard
from dist_subspace.checkpoint.state import check_factors, method_state, restore, save_checkpoint
from dist_subspace.checkpoint.store import purge
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import agreed, max_over_ranks, on_main, sum_over_ranks, world
from dist_subspace.placement.engines import engine_title, start_engine
from dist_subspace.placement.protocol import Engine
from dist_subspace.run_folder.folder import checkpoint_name
from dist_subspace.run_folder.records import Evaluation
from dist_subspace.run_folder.trainer_state import TrainerState
from dist_subspace.stopping import STOP
from dist_subspace.subspace import attached, named_trainables, parameter_groups
from dist_subspace.training.activation_offload import activation_offload
from dist_subspace.training.announce import announced
from dist_subspace.training.best import is_out_of_patience, note_evaluation, stopped_early_text
from dist_subspace.training.data import LEAK_LIMIT, GlobalBatch, MicroBatch, eval_batches, eval_filler, packing_leak
from dist_subspace.training.engine import Stepper
from dist_subspace.training.engine_config import engine_config
from dist_subspace.training.evaluate import evaluate
from dist_subspace.training.loss import whole_logits_because
from dist_subspace.training.model import make_model
from dist_subspace.training.observer import FinishedStep, Observer
from dist_subspace.training.optimizers import make_optimizer
from dist_subspace.training.pause import Pause
from dist_subspace.training.plan import Plan
from dist_subspace.training.preferences.choice import is_about_preferences, make_objective, without_dropout
from dist_subspace.training.preferences.evaluate import evaluate_preferences
from dist_subspace.training.preferences.rewards import RewardSums
from dist_subspace.training.profile import part
from dist_subspace.training.progress import Progress, best_in_run
from dist_subspace.training.router_loss import about_routers
from dist_subspace.training.samples import SamplePrompts
from dist_subspace.training.schedule import schedule_of
from dist_subspace.training.sections import adam_settings, padding


class NotFinite(ArithmeticError):
    """A step is not finite, and the configuration says that the run shall end then. Raised on every rank."""


class Trainer:
    """One run. Every method that is not said to be local is collective."""

    def __init__(self, plan: Plan, observer: Observer) -> None:
        self.plan, self.config, self.observer = plan, plan.config, observer
        self.progress = Progress()
        self._savable = False
        self.losses: list[float] = []  # of each step that this process has made
        self.pause = Pause(STOP, plan.config.training.max_time, plan.device)
        self.unevaluated = plan.data.eval is not None  # the evaluation that is due at this step has not been made
        self.saved: tuple[int, dict[str, Any] | None, bool] | None = None  # step, best, unevaluated of the checkpoint
        if plan.config.training.full_determinism:
            enable_full_determinism(plan.config.training.seed)
        self.model = make_model(plan, observer)
        without_dropout(plan.config, self.model)
        with announced(
            f"starting {engine_title(self.config.deepspeed.preset, self.config.deepspeed.config)}", observer.notice
        ):
            self.engine = self._make_engine()
        keep = activation_offload(self.config.training.activation_offload, plan.device, observer.notice)
        self.objective = make_objective(self.config, plan.device, self.engine.module)
        seed = self.config.training.seed
        self.stepper = Stepper(self.engine, plan.device, seed, world().size, keep, self.objective)
        self.schedule = schedule_of(self.config.training, plan.total_steps, self.engine.rates)
        with announced("checking that packed samples are kept apart", observer.notice):
            self._refuse_leaky_packing()
        self._say_how_the_loss_is_made()
        self.prompts = SamplePrompts(plan.config, plan.tokenizer) if plan.config.run.sample_prompts else None
        with announced("taking up the checkpoint", observer.notice):
            self._resume()

    def run(self) -> bool:
        """Train to the end; False if the run was interrupted: the last whole step is saved."""
        self.observer.start(self.progress.step)
        stopped = self.unevaluated and not self.evaluate()
        self._save()  # where a run that was interrupted owed that evaluation
        while not stopped and not self._over():
            stopped = self.one_step()
            if not stopped and self.unevaluated:
                stopped = not self.evaluate()
            if self._due(self.config.checkpoint.save_steps) or self._over() or self._is_best():
                self._save()
        if stopped and (self.unevaluated or not self._over()):
            self._save()
            return False
        if not self._last():
            self.observer.log()
            self.observer.notice(stopped_early_text(self.progress))
        return True

    def last_loss(self) -> float | None:
        """The trained model's loss on micro-batches of the last batch; None where an earlier state becomes the adapter."""
        if self.progress.best is not None or self.progress.step == 0:
            return None
        return self.stepper.measure(self.plan.batches.batch(self.progress.step - 1))

    def _make_engine(self) -> Engine:
        training = self.config.training
        with agreed("making the optimizer"):  # DeepSpeed makes process groups, in which nobody notices who is gone
            groups = parameter_groups(self.model, training.rate, training.weight_decay)
            optimizer = make_optimizer(training.optim, groups, adam_settings(training))
            config = engine_config(self.plan, self.model)
        return start_engine(self.model, optimizer, config, training.max_grad_norm)

    def _refuse_leaky_packing(self) -> None:
        """Packing is exact only where the model restarts attention and positions at each sample: measured, not assumed."""
        table = self.plan.data.train
        if not self.plan.batches.packing or len(table) < 2:
            return
        first, second = (torch.as_tensor(table.sample(i)[0], dtype=torch.long).to(self.plan.device) for i in (0, 1))
        leak = max_over_ranks(packing_leak(self.engine.module, first, second))
        if leak > LEAK_LIMIT:
            raise UsageError(
                f"data.packing is true, but {type(self.model).__name__} does not keep packed samples apart "
                f"(their loss changes by {100 * leak:.1f} %); set data.packing=false"
            )

    def _say_how_the_loss_is_made(self) -> None:
        reason = whole_logits_because(self.engine, self.plan.batches.batch(0).filler, self.plan.device)
        if reason is not None:
            self.observer.notice(f"the loss is made of whole logits, tokens x vocabulary: {reason}")
        routers = about_routers(self.model)
        if routers is not None:
            self.observer.notice(routers)

    def _resume(self) -> None:
        if self.plan.checkpoint is None:
            return
        folder, state = self.plan.checkpoint
        on_main(check_factors, folder, self.model, self.plan.run_dir.factors)
        self.stepper.prime(self.plan.batches.batch(state.step), self._leave_if_told)
        restore(self.engine, self.model, folder, state)
        discard(self.model)
        self.schedule.restore(state.schedule, state.step)
        best = on_main(best_in_run, self.plan.run_dir, folder, state.best)
        if best is None and state.best is not None:
            name = checkpoint_name(state.best["step"])
            self.observer.notice(f"the best so far, {name}, is not in {self.plan.run_dir}: chosen anew from here on")
        counts = (state.step, state.samples, state.tokens, state.skipped, state.overflowed)
        self.progress = Progress(*counts, state.elapsed_seconds, best, state.stale if best == state.best else 0)
        self.unevaluated = state.unevaluated and self.plan.data.eval is not None
        self.saved = (state.step, best, state.unevaluated)

    def _leave_if_told(self) -> None:
        if self.pause():
            STOP.heed()

    def one_step(self) -> bool:
        """One optimizer step over one global batch; returns whether all ranks shall stop now. One that is interrupted between
        its micro-batches counts as not begun."""
        self._save_before_decomposing()
        with part("data"):
            batch = self.plan.batches.batch(self.progress.step)
        self.engine.rates = self.schedule.rates
        rate = self.schedule.rates[0]
        began = time.monotonic()
        with self.observer.during("micro-batch", len(batch.rounds)):
            own_loss = self.stepper.accumulate(batch, self._moved_on)
        if own_loss is None:
            discard(self.model)
            return True
        own = [own_loss, float(self.pause.told()), *self.objective.take().numbers()]
        total, stop, *rewards = sum_over_ranks(own, self.plan.device)
        loss = total / max(1, batch.terms)
        with part("optimizer"):
            applied = self.engine.step(math.isfinite(loss))
        self.schedule.advance()
        self.losses.append(loss)
        self.progress.step += 1
        self.progress.samples += batch.samples
        self.progress.tokens += batch.tokens
        self.unevaluated = self.plan.data.eval is not None and (self._due(self.config.run.eval_steps) or self._last())
        if applied:
            self._prove_savable()
            self._advance_method()
        else:
            discard(self.model)
            self._not_applied(loss)
        finished = self._finished(batch, loss, rate, time.monotonic() - began, RewardSums.of(rewards))
        self.observer.step(finished, self._logs())
        return stop > 0 and self.pause.agree()

    def _moved_on(self) -> bool:
        """Between two rounds: whether all ranks shall stop now."""
        self.observer.moved()
        return self.pause()

    def _save_before_decomposing(self) -> None:
        """A decomposition in the middle of training may take long, and is interrupted where the step is not whole yet."""
        schedule = attached(self.model).schedule
        if schedule is not None and schedule.decomposes(self.progress.step + 1, self.plan.total_steps):
            self._save()

    def _advance_method(self) -> None:
        """The method's schedule goes on. A decomposition on the way takes its time, so it is said."""
        step, total, schedule = self.progress.step, self.plan.total_steps, attached(self.model).schedule
        if schedule is None or not schedule.decomposes(step, total):
            advance(self.model, step, total)
            return
        kind = self.plan.resolved.info.statistic
        self.observer.notice(f"step {step}: {kind} of {len(schedule.parts):,} frozen matrices")
        with STOP.leavable():  # the step before is saved
            advance(self.model, step, total)

    def _prove_savable(self) -> None:
        """After the first step, and not after hours: the optimizer's state is where a checkpoint will look for it."""
        if self._savable:
            return
        try:
            self.engine.read_state(named_trainables(self.model))
        except (KeyError, AttributeError, RuntimeError) as error:
            raise RuntimeError(
                f"no checkpoint of this run could be written: the state of training.optim {self.config.training.optim!r} in "
                f"this engine cannot be read ({type(error).__name__}: {error})"
            ) from error
        self._savable = True

    def _not_applied(self, loss: float) -> None:
        if math.isfinite(loss) and self.engine.has_loss_scale:
            self.progress.overflowed += 1
            self.observer.notice(f"step {self.progress.step} skipped: DeepSpeed lowers the fp16 loss scale")
            return
        self.progress.skipped += 1
        what = f"loss {loss}" if not math.isfinite(loss) else "a gradient that is not finite"
        if self.config.training.on_nonfinite == "stop":
            raise NotFinite(
                f"step {self.progress.step} has {what}, and training.on_nonfinite is stop; what was saved before is untouched"
            )
        self.observer.warning(f"step {self.progress.step} skipped: {what} ({self.progress.skipped} so far)")

    def _finished(
        self, batch: GlobalBatch, loss: float, rate: float, seconds: float, rewards: RewardSums
    ) -> FinishedStep:
        penalties = attached(self.model).penalties
        return FinishedStep(
            step=self.progress.step,
            epoch=batch.epoch,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            elapsed_seconds=self.progress.elapsed,
            loss=loss,
            penalty=None if penalties is None else penalties.total(),
            learning_rate=rate,
            grad_norm=self.engine.grad_norm,
            own_tokens=batch.tokens,
            own_seconds=seconds,
            rewards=rewards,
        )

    def _logs(self) -> bool:
        return self._due(self.config.run.logging_steps) or self._last() or self.progress.step == 1

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.step % int(every or 1) == 0

    def _last(self) -> bool:
        return self.progress.step >= self.plan.total_steps

    def _over(self) -> bool:
        """Whether no step is to be made any more; an evaluation that is due comes first."""
        return self._last() or (not self.unevaluated and is_out_of_patience(self.progress, self.config))

    def evaluate(self) -> bool:
        """Measure the held-out loss; False if all ranks shall stop instead."""
        table = self.plan.data.eval
        assert table is not None  # the callers have asked
        training = self.config.training
        size = training.per_device_eval_batch_size or training.per_device_train_batch_size
        rounds = eval_batches(
            table,
            rank=world().rank,
            world_size=world().size,
            micro_batch_size=size,
            pad_id=self.plan.pad_id,
            pad_to_multiple=padding(self.config),
            objective=training.objective,
            max_length=self.config.data.max_length,
        )
        filler = eval_filler(table, self.plan.pad_id, training.objective)
        what, count = f"evaluating at step {self.progress.step}", math.ceil(math.ceil(len(table) / size) / world().size)
        with (
            announced(what, self.observer.notice, self.observer.patience, over=False, every=math.inf),  # it counts on
            self.observer.during("evaluation", count),
            self.observer.aside("evaluation"),
        ):
            values = self._measured(rounds, filler)
        if values is None:
            return False
        self.unevaluated = False
        self.schedule.evaluated(values["eval_loss"])
        note_evaluation(self.progress, self.config, values)
        self.observer.evaluation(
            Evaluation(self.progress.step, values), "" if self.progress.step else " (before training)"
        )
        if self.prompts is not None:
            with self.observer.aside("samples"):
                self.observer.samples(self.prompts.answered(self.engine.module, self.progress.step))
        return True

    def _measured(self, rounds: Iterator[MicroBatch | None], filler: MicroBatch) -> dict[str, float] | None:
        if is_about_preferences(self.config):
            return evaluate_preferences(
                self.engine, self.objective, list(rounds), filler, self.plan.device, self._moved_on
            )
        return evaluate(self.engine, rounds, filler, self.plan.device, self.plan.classes, self._moved_on)

    def _is_best(self) -> bool:
        return self.progress.best is not None and self.progress.best["step"] == self.progress.step

    def _base_name(self) -> str:
        """What adapters call their base: a hub name as it was given, and not where this machine keeps its copy."""
        path = self.config.model.path
        return str(self.plan.model_folder) if Path(path).expanduser().is_dir() else str(path)

    def _save(self) -> None:
        """Write the checkpoint of the last whole step, unless it is written, as it is now."""
        progress = self.progress
        now = (progress.step, progress.best, self.unevaluated)
        if progress.step == 0 or self.saved == now:
            return
        with self.observer.aside("checkpoint"):
            folder = self._write()
        self.saved = now
        self.observer.saved(folder)

    def _write(self) -> Path:
        """The checkpoint of the last whole step; older ones make room for it."""
        progress = self.progress
        state = TrainerState(
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            elapsed_seconds=progress.elapsed,
            optimizer_steps=self.engine.step_count(),
            schedule=self.schedule.state(),
            fingerprints=self.plan.fingerprints,
            best=progress.best,
            skipped=progress.skipped,
            overflowed=progress.overflowed,
            training=self.config.training.model_dump(mode="json"),
            begun=self.plan.beginning.config.as_dict() if self.plan.beginning else {},
            stale=progress.stale,
            method=method_state(self.model),
            loss_scaler=self.engine.scaler_state(),
            unevaluated=self.unevaluated,
        )
        folder = save_checkpoint(
            self.plan.run_dir, self.model, self.engine, state, self._base_name(), self.observer.sync
        )
        keep = [self.plan.run_dir.checkpoint(progress.best["step"])] if progress.best else []
        on_main(purge, self.plan.run_dir, self.config.checkpoint.save_total_limit, keep)
        return folder
