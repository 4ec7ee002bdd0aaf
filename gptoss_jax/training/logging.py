"""Logging of a run: metrics, console output and the report."""

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_text
from gptoss_jax.data.batches import packed_lengths, trained_pairs, usable_prompts
from gptoss_jax.data.epochs import describe_epochs, rollout_epochs
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.hardware import flops_per_token, mfu, parameter_counts
from gptoss_jax.inference.detokenizer import detokenize
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel import distributed
from gptoss_jax.terminal import format_count, format_duration, format_number, format_si
from gptoss_jax.training.console import COMPILING, Console
from gptoss_jax.training.descriptions import describe_adapters, describe_step, next_command
from gptoss_jax.training.losses import bits_per_byte
from gptoss_jax.training.metrics import MetricsLog, StepTimer, read_metrics
from gptoss_jax.training.plots import draw_report
from gptoss_jax.training.rl import DIFFERENCE, MEAN_DIFFERENCE
from gptoss_jax.training.setup import stop_tokens

MAX_SKIPPED_IN_A_ROW = 20
EXPERT_LOAD_ROWS = 200  # number of metrics.jsonl rows with expert load, enough for the plot
ACCURACY = "rewards/accuracies"  # metric of training on preferences
# Metrics of a step that are logged in a different form.
NOT_LOGGED_AS_IS = {"tokens", "skipped", "skipped_in_a_row", "expert_load", "dropped"}


class RunLog:
    """Rows of metrics.jsonl, console output and the report of one run."""

    def __init__(
        self,
        config: TrainConfig,
        cache: TokenCache,
        console: Console,
        first_step: int,
        tokens_seen: int,
        best_loss: float = math.inf,
    ):
        """`tokens_seen` and `best_loss` come from the checkpoint that the run resumes from."""
        self.config, self.cache, self.console, self.tokens_seen = config, cache, console, tokens_seen
        self._best_loss = best_loss
        self.run_dir = pathlib.Path(config.run_dir)
        self.is_main = jax.process_index() == 0
        # A run killed before its first checkpoint may have left rows: a new run drops all, including step 0.
        self._metrics = MetricsLog(self.run_dir, first_step or -1) if self.is_main else None
        self.rows = read_metrics(self.run_dir / "metrics.jsonl") if self.is_main else []
        self.timer = StepTimer()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._new_tokens = 0
        # Only in process 0, which wrote the run folder; other machines may see its files later.
        found = stop_tokens(self.run_dir, cache.tokenizer) if self.is_main else None
        self._stop_tokens = tuple(distributed.allgather_host(found)[0])
        lengths = packed_lengths(cache, config.data.seq_len, config.data.overlong)
        self._train_tokens = int(lengths[~cache.held_out].sum())
        self._trained_tokens = int(trained_pairs(cache, lengths)[~cache.held_out].sum())
        self._is_rl = config.objective == "grpo"
        self._num_prompts = len(usable_prompts(cache, config.longest_prompt, False)) if self._is_rl else 0
        self._value = "reward" if self._is_rl else "loss"  # of a step, to be shown
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)

    def log_header(self, mesh: jax.sharding.Mesh, first_step: int, params: dict) -> None:
        """Prints model, text and devices, and starts the progress line."""
        config, meta = self.config, self.cache.meta
        total, active = parameter_counts(config.model)
        axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        trained, held_out = " to train on", f"{format_si(meta['held_out_bytes'], 'B')} of text"
        if self.cache.weights is not None:
            trained = f", {format_count(self._trained_tokens)} of them trained on"
            is_pairs = self.cache.is_pairs
            count = meta["held_out_documents"] // (2 if is_pairs else 1)
            noun = "pair" if is_pairs else "prompt" if self._is_rl else "example"
            held_out = f"{count:,} {noun}{'s' * (count != 1)}"
        if self._is_rl:
            trained = " of prompts"
        devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        lines = {
            "model": f"{format_count(total)} parameters, {format_count(active)} active per token",
            "lora": describe_adapters(config.model, params),
            "text": f"{config.data.source}: {format_count(self._train_tokens)} tokens of {meta['tokenizer']}"
            f"{trained}, {held_out} held out",
            "step": describe_step(config),
            "epochs": "\n  ".join(describe_epochs(config, self.cache)),
            "on": devices + (f" ({axes})" if axes else ""),
            "run": str(self.run_dir),
        }
        for name, value in lines.items():
            if value:
                self.console.message(f"  {name:<7}{value}")
        activity = "sampling answers, and compiling" if self._is_rl else COMPILING
        self.console.start(first_step, config.steps, activity)
        self.timer.restart()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Logs the previous step while this one runs on the device.

        Waits for the metrics of every step, regardless of `log_every`, which limits the steps in flight to
        two.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the latest step and logs it."""
        if self._pending is not None:
            step, metrics = self._pending
            self._pending = None
            self._log_step(step, jax.device_get(metrics))

    def _log_step(self, step: int, values: dict[str, Any]) -> None:
        config = self.config
        self.tokens_seen += int(values["tokens"])
        self._new_tokens += int(values["tokens"])
        with self.timer.measure("logging"):
            self._check_finite(step, values)
            self.timer.steps += 1
            if step % config.log_every and step != config.steps:
                return
            timing = self.timer.take()
            # Excludes padding, which is cost rather than work.
            tokens_per_second = self._new_tokens / timing.pop("seconds")
            self._new_tokens = 0
            training = tokens_per_second / max(1 - timing.get("rollout_share", 0.0), 1e-9)
            flops = training * self._flops_per_token
            row: dict[str, Any] = {"step": step}
            if self._is_rl:
                timing["train_tokens_per_second"] = round(training, 1)
                if (step - 1) % config.grpo.iterations:
                    # Of answers that were sampled before an earlier step: more than rounding.
                    values = {k: v for k, v in values.items() if k not in (MEAN_DIFFERENCE, DIFFERENCE)}
            row |= {k: float(v) for k, v in values.items() if k not in NOT_LOGGED_AS_IS} | {
                "tokens_per_second": round(tokens_per_second, 1),
                "mfu": mfu(flops, jax.devices()[0].device_kind, jax.device_count()),
                "flops_per_second": round(flops),
                "skipped_steps": int(values["skipped"]),
                "tokens_seen": self.tokens_seen,
                "epoch": round(self._epochs(step), 4),
            } | timing  # fmt: skip
            if config.model.expert_capacity_factor is not None:
                row["dropped_share"] = round(float(values["dropped"]), 6)
            every = max(1, config.steps // EXPERT_LOAD_ROWS)
            if step == 1 or step // every > (step - config.log_every) // every:
                row["expert_load"] = np.round(values["expert_load"].astype(float), 4).tolist()
            self._write(row)
            self.console.update(step, row[self._value], tokens_per_second, row["learning_rate"], self._value)

    def _epochs(self, step: int) -> float:
        """Returns how often the run has seen the training data."""
        if self._is_rl:
            return rollout_epochs(self.config, self._num_prompts, step)
        return self.tokens_seen / self._train_tokens

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row:
            found = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            self.console.message(f"step {step} skipped: {found}; parameters were left unchanged")
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {step}; "
                "parameters were left unchanged. Check the training data, or start another --run-dir with "
                "a lower optim.learning_rate"
            )

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._metrics:
            self._metrics.write(row)

    def evaluation(self, step: int, means: dict[str, float], is_final: bool = False) -> float:
        """Logs the mean metrics of an evaluation on `eval.batches` batches of held-out text or, if
        `is_final`, on all of it. Returns the loss."""
        if self._is_rl:
            return self._reward_evaluation(step, means, is_final)
        meta, val_loss = self.cache.meta, means["loss"]
        # Only the bytes of whole documents are known, so the loss per token is extrapolated to all held-out
        # text.
        targets = meta["held_out_tokens"] - meta["held_out_documents"]
        if "chat" in meta:
            targets = meta["chat"]["held_out_trained_tokens"]
        bits = bits_per_byte(val_loss * targets, meta["held_out_bytes"])
        row = {"step": step} | {f"val_{name}": mean for name, mean in means.items()}
        if not self.cache.is_pairs:  # whose loss is not one of text
            row["val_bits_per_byte"] = bits
        if is_final:
            row["final"] = True
        if is_final and "chat" not in meta:  # compressing answers without their prompts is meaningless
            row |= {k: meta[k] for k in ("gzip_bits_per_byte", "xz_bits_per_byte")}
        self._write(row)
        if not is_final:
            details = "" if "chat" in meta else f"{format_number(bits, 4)} bits per byte"
            if ACCURACY in means:
                details = f"{means[ACCURACY]:.1%} of the chosen answers preferred"
            self.console.evaluation(step, val_loss, details, self._is_best(val_loss))
        return val_loss

    def _is_best(self, loss: float) -> bool:
        """Returns True if a loss is the least so far, and remembers it."""
        is_best = loss < self._best_loss and math.isfinite(loss)
        self._best_loss = loss if is_best else self._best_loss
        return is_best

    def _reward_evaluation(self, step: int, means: dict[str, float], is_final: bool) -> float:
        """`evaluation` of a run whose rewards count: the best checkpoint has the highest one."""
        row = {"step": step} | {f"val_{name}": mean for name, mean in means.items()}
        self._write(row | ({"final": True} if is_final else {}))
        loss = -means["reward"]
        if not is_final:
            details = (
                f"{means['answers']:,.0f} prompts, {means['completions/mean_length']:,.0f} tokens per answer"
            )
            if left_out := round(means["answers_left_out"]):
                details += f", {left_out:,} of them left out"
            self.console.evaluation(step, means["reward"], details, self._is_best(loss), label="reward")
        return loss

    def sample(self, step: int, params: dict) -> None:
        """Continues `eval.prompt` or, when training on conversations, answers a held-out one; prints the
        text."""
        config, tokenizer = self.config.eval, self.cache.tokenizer
        text, question, stop_tokens = user_text(config.prompt), "", self._stop_tokens
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
        harmony = Harmony(tokenizer) if self.cache.weights is not None else None
        if harmony is not None:
            held_out, stop_tokens = np.flatnonzero(self.cache.held_out), (*harmony.stop_tokens, *stop_tokens)
            document = held_out[step // config.every % len(held_out)]
            start, end = self.cache.offsets[document : document + 2]
            prompt, asked = harmony.prompt_of_last_turn(self.cache.tokens[start:end].tolist())
            text, question = "", harmony.spelled_text(asked)
        max_new_tokens = min(config.sample_tokens, self.config.model.max_position_embeddings - len(prompt))
        if max_new_tokens < 1:
            return
        sampling_params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=config.temperature,
            stop_tokens=stop_tokens,
            seed=step,
        )
        with self.console.status("sampling"):
            (answer,) = generate(bind(self.config.model, params), [prompt], sampling_params)
        spell = functools.partial(detokenize, tokenizer) if harmony is None else harmony.spelled_text
        self.console.sample(text + spell(answer.tokens), question)

    def finish(self, step: int, first_step: int, is_done: bool) -> None:
        """Writes report.png and prints the summary, or how to resume a run that is not done."""
        self.console.stop()
        if not self.is_main or not step:
            return
        with self.console.status("drawing report.png"):
            picture = draw_report(self.run_dir)
        if not is_done:
            self.console.message(
                f"Stopped at step {step} of {self.config.steps}, which is saved in {self.run_dir}. "
                "To resume, run the same command again."
            )
            return
        if step == first_step:
            self.console.message(f"This run is finished: all {step} steps are done.")
        final: dict[str, Any] = next((row for row in reversed(self.rows) if row.get("final")), {})
        if self.cache.weights is None:
            self.console.comparison(
                {
                    "gzip -9": final.get("gzip_bits_per_byte"),
                    "xz -9": final.get("xz_bits_per_byte"),
                    "this model": final.get("val_bits_per_byte"),
                }
            )
        steps = [row for row in self.rows if "loss" in row]
        if not steps:
            return
        # A row covers all steps since the previous row, and a resumed run may have a different log_every.
        seconds = np.diff([0] + [row["step"] for row in steps]) * [row["step_seconds"] for row in steps]

        def share(name: str) -> float:
            return np.average([row.get(name, 0) for row in steps], weights=seconds)

        rate, used = float(np.median([row["tokens_per_second"] for row in steps])), steps[-1]["mfu"]
        speed = f"{rate:,.0f} tokens/s, {format_si(rate * self._flops_per_token, 'FLOP/s')}"
        if self._is_rl:
            halves = (f"{half}_tokens_per_second" for half in ("rollout", "train"))
            sampled, trained = (np.median([row[name] for row in steps]) for name in halves)
            speed = f"{sampled:,.0f} tokens/s sampled, {trained:,.0f} trained"
        waiting = (
            f"{share('rollout_share' if self._is_rl else 'data_wait_share'):.2%} of the time for "
            f"{'rollouts' if self._is_rl else 'data'}, {share('logging_share'):.2%} for logging"
        )
        tokens = f"{format_count(steps[-1]['tokens_seen'])} in {format_duration(seconds.sum())}"
        loss_unit = "nats per token"
        if self._is_rl:
            length = f"{final.get('val_completions/mean_length', 0):,.0f} tokens each"
            loss_unit = f"per answer to {final.get('val_answers', 0):,.0f} prompts, {length}"
        if self.cache.is_pairs:
            loss_unit = f"per pair, {final.get(f'val_{ACCURACY}', 0):.1%} of the chosen answers preferred"
        self.console.summary(
            {
                f"held-out {self._value}": f"{format_number(final.get(f'val_{self._value}'), 4)} {loss_unit}",
                "tokens seen": tokens,
                "speed": speed + (f", MFU {used:.1%}" if used else ""),
                "sampling" if self._is_rl else "waiting": waiting,
                "report": str(picture),
            },
            next_command(
                self.run_dir,
                (user_text(self.config.eval.prompt) or "The ") if self.cache.weights is None else None,
            ),
        )

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        self.console.stop()
        if self._metrics:
            self._metrics.close()
