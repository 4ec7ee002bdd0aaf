"""What a run tells while it goes and when it ends: rows of metrics, lines on the console, the closing
words."""

import contextlib
import math
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_text
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.hardware import flops_per_token, mfu, parameter_counts
from gptoss_jax.inference.detokenizer import detokenize
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel import distributed
from gptoss_jax.training.console import (
    Console,
    MetricsLog,
    format_count,
    format_duration,
    format_flops,
    format_number,
    read_metrics,
)
from gptoss_jax.training.plots import draw_report
from gptoss_jax.training.setup import stop_tokens

SKIPS_BEFORE_STOP = 20  # non-finite steps in a row
LOAD_ROWS = 200  # rows of metrics.jsonl that carry the experts' load: a picture needs no more


def generate_command(run_dir: pathlib.Path, prompt: str) -> str:
    """The command line that continues a text with a run, quoted for a POSIX shell."""
    # A leading dash would make an option of either.
    folder = f"./{run_dir}" if str(run_dir).startswith("-") else str(run_dir)
    separator = "=" if prompt.startswith("-") else " "
    return f"gptoss generate {shlex.quote(folder)} --prompt{separator}{shlex.quote(prompt)}"


class RunLog:
    """What a run tells: rows of metrics, lines on the console, the report."""

    def __init__(
        self,
        config: TrainConfig,
        cache: TokenCache,
        console: Console,
        first_step: int,
        tokens_seen: int,
        best_loss: float = math.inf,
    ):
        """`tokens_seen` and `best_loss` are those of the run's checkpoints so far."""
        self.config, self.cache, self.console, self.tokens_seen = config, cache, console, tokens_seen
        self._best_loss = best_loss
        self.run_dir = pathlib.Path(config.run_dir)
        self.is_main = jax.process_index() == 0
        # A step of 0 has no rows: none may be left of a run that was killed before its first checkpoint.
        self._metrics = MetricsLog(self.run_dir, first_step or -1) if self.is_main else None
        self.rows = read_metrics(self.run_dir / "metrics.jsonl") if self.is_main else []
        self.clock = Clock()
        self._new_tokens = 0
        # Process 0 has written the run folder's files; another machine may see them later.
        found = stop_tokens(self.run_dir, cache.tokenizer) if self.is_main else None
        self._stop_tokens = tuple(distributed.allgather_host(found)[0])
        documents = ~cache.held_out
        self._train_tokens = int(np.diff(cache.offsets)[documents].sum() - documents.sum())
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)

    def greet(self, mesh: jax.sharding.Mesh, first_step: int) -> None:
        """Says what is about to be trained on what, and starts the progress line."""
        config, meta = self.config, self.cache.meta
        total, active = parameter_counts(config.model)
        device = jax.devices()[0]
        axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        lines = (
            ("model", f"{format_count(total)} parameters, {format_count(active)} active per token"),
            ("text", f"{config.data.source}: {format_count(self._train_tokens)} tokens of {meta['tokenizer']}"
             f" to train on, {format_count(meta['held_out_bytes'])}B of text held out"),
            ("step", f"{config.data.batch_size} rows × {config.data.seq_len} tokens"),
            ("on", f"{jax.device_count()} × {device.device_kind}" + (f" ({axes})" if axes else "")),
            ("run", str(self.run_dir)),
        )  # fmt: skip
        for name, value in lines:
            self.console.message(f"  {name:<7}{value}")
        self.console.start(first_step, config.steps)
        self.clock.restart()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step's metrics, and writes its row where one is due."""
        values = jax.device_get(metrics)
        config = self.config
        self.tokens_seen += int(values["tokens"])
        self._new_tokens += int(values["tokens"])
        with self.clock.logging():
            self._check_finite(step, values)
            self.clock.steps += 1
            if step % config.log_every and step != config.steps:
                return
            timing = self.clock.take()
            # Real tokens: padding is cost, not work.
            rate = self._new_tokens / timing.pop("seconds")
            self._new_tokens = 0
            flops = rate * self._flops_per_token
            row = {name: float(values[name]) for name in ("loss", "learning_rate", "grad_norm")}
            row = {"step": step} | row | {
                "tokens_per_second": round(rate, 1),
                "mfu": mfu(flops, jax.devices()[0].device_kind, jax.device_count()),
                "flops_per_second": round(flops),
                "load_balance_loss": float(values["load_balance_loss"]),
                "router_z_loss": float(values["router_z_loss"]),
                "skipped_steps": int(values["skipped"]),
                "tokens_seen": self.tokens_seen,
                "epoch": round(self.tokens_seen / self._train_tokens, 4),
            } | timing  # fmt: skip
            if config.model.expert_capacity_factor is not None:
                row["dropped_share"] = round(float(values["dropped"]), 6)
            every = max(1, config.steps // LOAD_ROWS)
            if step == 1 or step // every > (step - config.log_every) // every:
                row["expert_load"] = np.round(values["expert_load"].astype(float), 4).tolist()
            self._write(row)
            self.console.update(step, row["loss"], rate, row["learning_rate"])

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row:
            found = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            self.console.message(f"step {step} skipped: {found}; nothing was changed")
        if in_a_row >= SKIPS_BEFORE_STOP:
            raise FloatingPointError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {step}; the "
                "run changed nothing in them. Look at the text, or start another --run-dir with a lower "
                "optim.learning_rate"
            )

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._metrics:
            self._metrics.write(row)

    def evaluation(self, step: int, val_loss: float, bits: float, final: bool = False) -> None:
        """Logs an evaluation on `eval.batches` batches of held-out text or, if `final`, on all of it."""
        row = {"step": step, "val_loss": val_loss, "val_bits_per_byte": bits}
        if final:
            sizes = ("gzip_bits_per_byte", "xz_bits_per_byte")
            row |= {"final": True} | {name: self.cache.meta[name] for name in sizes}
        self._write(row)
        if not final:
            is_best = val_loss < self._best_loss and math.isfinite(val_loss)
            self._best_loss = val_loss if is_best else self._best_loss
            self.console.evaluation(step, val_loss, bits, is_best)

    def sample(self, step: int, params: dict) -> None:
        """Writes on from `eval.prompt` and shows it."""
        config, tokenizer = self.config.eval, self.cache.tokenizer
        text = user_text(config.prompt)
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
        room = self.config.model.max_position_embeddings - len(prompt)
        if min(config.sample_tokens, room) < 1:
            return
        sampling_params = SamplingParams(
            max_new_tokens=min(config.sample_tokens, room),
            temperature=config.temperature,
            stop_tokens=self._stop_tokens,
            seed=step,
        )
        (answer,) = generate(bind(self.config.model, params), [prompt], sampling_params)
        self.console.sample(text + detokenize(tokenizer, answer.tokens))

    def finish(self, step: int, first_step: int) -> None:
        """The picture and the closing words."""
        self.console.stop()
        if not self.is_main or not step:
            return
        picture = draw_report(self.run_dir)
        if step < self.config.steps:
            self.console.message(
                f"Stopped at step {step} of {self.config.steps}; everything is saved in {self.run_dir}."
            )
            self.console.message("To go on, start it again with the same line.")
            return
        if step == first_step:
            self.console.message(f"This run is finished: all {step} steps are done.")
        final = next((row for row in reversed(self.rows) if row.get("final")), {})
        self.console.comparison(
            gzip=final.get("gzip_bits_per_byte"),
            xz=final.get("xz_bits_per_byte"),
            model=final.get("val_bits_per_byte"),
        )
        steps = [row for row in self.rows if "loss" in row]
        if not steps:
            return
        # A row stands for all steps since the row before, and a resumed run may have another log_every.
        spans = np.diff([0] + [row["step"] for row in steps]) * [row["step_seconds"] for row in steps]
        seconds = format_duration(spans.sum())

        def share(name):
            return np.dot([row[name] for row in steps], spans) / spans.sum()

        rate = float(np.median([row["tokens_per_second"] for row in steps]))
        speed = format_flops(rate * self._flops_per_token)
        used = steps[-1]["mfu"]
        prompt = user_text(self.config.eval.prompt) or "The "
        self.console.summary(
            [
                ("held-out loss", f"{format_number(final.get('val_loss'), 4)} nats per token"),
                ("tokens seen", f"{format_count(steps[-1]['tokens_seen'])} in {seconds}"),
                ("speed", f"{rate:,.0f} tokens/s, {speed}" + (f", MFU {used:.1%}" if used else "")),
                (
                    "waiting",
                    f"{share('data_wait_share'):.2%} for data, {share('logging_share'):.2%} for logging",
                ),
                ("picture", str(picture)),
            ],
            generate_command(self.run_dir, prompt),
        )

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        self.console.stop()
        if self._metrics:
            self._metrics.close()


class Clock:
    """Where the time of the steps goes: running, waiting for data, logging. Evaluating and saving are left
    out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch of steps now."""
        self._began = time.perf_counter()
        self.steps = 0
        self._spent = {"data": 0.0, "logging": 0.0, "other": 0.0}

    @contextlib.contextmanager
    def _spending(self, kind: str) -> Iterator[None]:
        began, stretch = time.perf_counter(), self._began
        try:
            yield
        finally:
            # Of what began in a stretch that has been closed since, only the rest belongs to the new one.
            since = began if stretch == self._began else self._began
            self._spent[kind] += time.perf_counter() - since

    def waiting_for_data(self):
        """Time in here is spent waiting for a batch."""
        return self._spending("data")

    def logging(self):
        """Time in here is spent on metrics and the console."""
        return self._spending("logging")

    def other_work(self):
        """Time in here is not a step's."""
        return self._spending("other")

    def take(self) -> dict[str, float]:
        """Seconds since the last call, in all and for one step, and the shares spent waiting and logging."""
        spent, steps = self._spent, self.steps
        seconds = max(time.perf_counter() - self._began - spent["other"], 1e-9)
        self.restart()
        return {
            "seconds": seconds,
            "step_seconds": round(seconds / steps, 6),
            "data_wait_share": round(min(spent["data"] / seconds, 1), 6),
            "logging_share": round(min(spent["logging"] / seconds, 1), 6),
        }
