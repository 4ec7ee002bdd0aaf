"""Rollouts: answers sampled from the current weights, their rewards, and the batches that are made of them.

The engine and the training step are programs of one process with the same weights and kernels, so that the
log-probability with which a token was sampled equals that of the training step except for rounding.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np

from gptoss_jax.config import TrainConfig
from gptoss_jax.data.batches import (
    local_rows,
    make_global_batch,
    usable_prompts,
)
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.parameters import merge_params
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import sequence_shards
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.objectives import Batch
from gptoss_jax.training.rewards import MAX_REWARD, Answer, Reward, RewardError, digest
from gptoss_jax.training.rl import group_advantages
from gptoss_jax.training.rollout_rows import Sample, make_rows, prompt_of

if TYPE_CHECKING:
    from gptoss_jax.training.logging import RunLog

SHOWN_ANSWERS = 3  # printed at each evaluation
SHOWN_ERRORS = 10  # maximum number of bad rewards to print
MAX_BAD_IN_A_ROW = 20  # rollouts without a usable reward
MAX_HELD_OUT = 1024  # prompts in the last evaluation
TRAINING, EVALUATION = 0, 1  # streams of random seeds


@dataclasses.dataclass(frozen=True)
class Shown:
    """An answer to print."""

    question: str
    answer: str
    reward: float | None


class RolloutFeed:
    """Batches of answers to the prompts of a cache; the mesh must be set, except for `__init__`.

    Every process samples all answers, as the engine requires, and process 0 computes the rewards.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: TokenCache,
        mesh: jax.sharding.Mesh,
        report: Callable[[str], None],
        rewards: Sequence[Reward],
    ) -> None:
        """`rewards` are those that `config.grpo` names. Raises ValueError if no prompt fits."""
        self._config, self._cache, self._report = config, cache, report
        self._harmony = Harmony(cache.tokenizer)
        self._rewards = rewards
        # Of the files that were loaded, whatever happens to them later.
        self._digest = digest(config.grpo)
        self._sharding = batch_sharding(mesh)
        # Rows of a batch are a multiple of this.
        self._unit = sequence_shards(mesh.shape) * config.optim.grad_accum_steps
        self._held_out, self._training = (
            usable_prompts(cache, config.longest_prompt, part) for part in (True, False)
        )
        prompts = grain.MapDataset.source(self._training.tolist()).seed(config.seed).shuffle().repeat()
        self._prompts: grain.MapDataset = prompts
        # Kept for further steps on the same answers.
        self._samples: list[Sample] = []
        self._metrics: dict[str, float] = {}
        self._bad_in_a_row, self._has_reward = 0, False
        self._reported: list[str] = []
        self._last_error = ""
        self._shown: list[Shown] = []

    def get_state(self, step: int) -> dict[str, Any]:
        """Returns the position after `step` steps: the answers, if there are more steps on them, and a digest
        of the rewards."""
        is_kept = step % self._config.grpo.iterations > 0
        samples = [dataclasses.asdict(one) for one in self._samples] if is_kept else []
        return {"samples": samples, "metrics": self._metrics if is_kept else {}, "rewards": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned."""
        self._samples = [Sample(**one) for one in state["samples"]]
        self._metrics = state["metrics"]
        if state["rewards"] != self._digest:
            self._report(
                "grpo.rewards, their weights or a file have changed: rewards, and the best checkpoint, "
                "are not comparable with those of earlier steps"
            )

    def next(self, step: int, params: dict, frozen: dict, log: "RunLog") -> tuple[Batch, dict[str, float]]:
        """Returns the batch of the step after `step`, sampled from the current model unless there are further
        steps on the latest answers; and metrics of the answers."""
        # The previous step ends before, and is logged without this rollout.
        jax.block_until_ready(params)
        log.flush()
        with log.timer.measure("rollout"):
            if step % self._config.grpo.iterations == 0 or not self._samples:
                number = step // self._config.grpo.iterations
                self._samples, self._metrics = self._sample(number, merge_params(params, frozen))
            rows = make_rows(self._cache, self._samples, self._config.data.seq_len, self._unit)
            size = len(rows["tokens"])
            local = {name: x[local_rows(self._sharding, size)] for name, x in rows.items()}
            return make_global_batch(local, self._sharding, size), self._metrics

    def _sample(self, number: int, params: dict) -> tuple[list[Sample], dict[str, float]]:
        """Returns the answers of rollout `number` with their advantages, and metrics."""
        config, group = self._config.grpo, self._config.grpo.group_size
        count = self._config.data.batch_size // group
        chosen = np.array([self._prompts[number * count + i] for i in range(count)], np.int64)
        documents_B = np.repeat(chosen, group)
        began = time.perf_counter()
        completions = self._generate(params, documents_B, seed=(TRAINING, number), temperature=1.0)
        seconds = time.perf_counter() - began
        rewards_BF = self._score(documents_B, completions)
        reward_seconds = time.perf_counter() - began - seconds
        total_PG = (rewards_BF @ np.array(config.weights)).reshape(count, group)
        is_used_P = np.isfinite(total_PG).all(axis=1)
        self._check_usable(is_used_P)
        advantages_PG = np.full(total_PG.shape, np.nan)
        advantages_PG[is_used_P] = group_advantages(total_PG[is_used_P], config.scale_rewards)
        samples = [
            Sample(document, *_sampled(one), None if np.isnan(advantage) else float(advantage))
            for document, one, advantage in zip(
                documents_B.tolist(), completions, advantages_PG.reshape(-1), strict=True
            )
        ]
        lengths = np.array([len(one.tokens) for one in samples])
        used_PG = total_PG[is_used_P]
        metrics = {
            "reward": _mean(used_PG),
            "reward_std": _mean(used_PG.std(axis=1, ddof=1)),
            "frac_reward_zero_std": _mean(np.ptp(used_PG, axis=1) == 0),
            **self._each_reward(rewards_BF[np.repeat(is_used_P, group)]),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": np.mean([one.finish_reason == "length" for one in completions]),
            "groups_left_out": np.sum(~is_used_P),
            "rollout_seconds": seconds,
            "reward_seconds": reward_seconds,
            "rollout_tokens_per_second": lengths.sum() / seconds,
        }
        return samples, {name: float(value) for name, value in metrics.items()}

    def _check_usable(self, is_used_P: np.ndarray) -> None:
        """Raises ValueError if no group of answers has usable rewards: in the first rollout, or in many."""
        self._has_reward |= bool(is_used_P.any())
        self._bad_in_a_row = 0 if is_used_P.any() else self._bad_in_a_row + 1
        limit = MAX_BAD_IN_A_ROW if self._has_reward else 1
        if self._bad_in_a_row >= limit:
            where = "a step" if limit == 1 else f"{limit} steps in a row"
            raise ValueError(f"no group of answers in {where} has usable rewards; {self._last_error}")

    def _each_reward(self, rewards_BF: np.ndarray) -> dict[str, float]:
        """Returns the mean of each reward function."""
        return {f"rewards/{one.name}": _mean(x) for one, x in zip(self._rewards, rewards_BF.T, strict=True)}

    def _generate(
        self, params: dict, documents_B: np.ndarray, seed: tuple[int, int], temperature: float
    ) -> list[Completion]:
        """Samples an answer to the prompt of each document."""
        entropy = [self._config.seed % (1 << 32), *seed]
        seeds = np.random.SeedSequence(entropy).generate_state(len(documents_B))
        settings = SamplingParams(
            max_new_tokens=self._config.grpo.max_new_tokens,
            temperature=temperature,
            stop_tokens=self._harmony.stop_tokens,
            logprobs=True,
        )
        each = [dataclasses.replace(settings, seed=int(one)) for one in seeds]
        prompts = [prompt_of(self._cache, document) for document in documents_B.tolist()]
        return generate(bind(self._config.model, params), prompts, each)

    def _score(self, documents_B: np.ndarray, completions: list[Completion]) -> np.ndarray:
        """Returns the rewards of each answer by each function, float64 [B, functions], NaN for those that
        cannot be used, and reports these."""
        found: tuple[list[list[float]], list[str]] = [], []
        if jax.process_index() == 0:
            for document, one in zip(documents_B.tolist(), completions, strict=True):
                found[0].append(self._rewards_of(document, _sampled(one)[0], found[1]))
        values, errors = distributed.allgather_host(found)[0]
        for line in errors:
            self._last_error = line
            # Answers to one prompt often have the same error.
            if line not in self._reported and len(self._reported) < SHOWN_ERRORS:
                self._reported.append(line)
                self._report(line)
                if len(self._reported) == SHOWN_ERRORS:
                    self._report("grpo.rewards: further errors are only counted, in groups_left_out")
        return np.array(values, np.float64)

    def _rewards_of(self, document: int, tokens: list[int], errors: list[str]) -> list[float]:
        """Returns the rewards of an answer; adds a line to `errors` for each that cannot be used."""
        row, values = self._cache.row(document), []
        prompt, answer = self._question(document), Answer.of(self._harmony, tokens)
        place = f"its group is left out ({self._cache.where(document)})"
        for reward in self._rewards:
            try:
                # A function may change its row.
                values.append(reward(prompt, answer, copy.deepcopy(row)))
            except RewardError as error:
                values.append(np.nan)
                errors.append(f"grpo.rewards: {reward.name} {error}; {place}")
        total = sum(value * one.weight for value, one in zip(values, self._rewards, strict=True))
        if abs(total) > MAX_REWARD:
            errors.append(
                f"grpo.rewards: the weighted sum is {total}: must be at most {MAX_REWARD:g}; {place}"
            )
            return [np.nan] * len(values)
        return values

    def _question(self, document: int) -> str:
        """Returns the text of the user's last message in a prompt."""
        prompt = prompt_of(self._cache, document)
        _, asked = self._harmony.prompt_of_last_turn(prompt)
        return self._harmony.spelled_text(asked)

    def measure(self, params: dict, is_full: bool, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Returns the metrics of an evaluation: mean rewards and length of one answer to each of
        `eval.batches` × `data.batch_size` held-out prompts or, if `is_full`, of all, at most MAX_HELD_OUT;
        None if it was stopped.

        All evaluations sample with the same random numbers. Answers whose rewards cannot be used are left
        out, and counted.
        """
        size, documents = self._config.data.batch_size, self._held_out
        count = min(len(documents), MAX_HELD_OUT if is_full else self._config.eval.batches * size)
        documents = documents[np.arange(count) * len(documents) // count]
        rewards, lengths, self._shown = [], [], []
        for start in range(0, len(documents), size):
            if is_stopped():
                return None
            some = documents[start : start + size]
            padded = np.resize(some, size)  # to use the programs of other batches
            seed, temperature = (EVALUATION, start), self._config.eval.temperature
            completions = self._generate(params, padded, seed, temperature)[: len(some)]
            rewards.append(self._score(some, completions))
            lengths += [len(_sampled(one)[0]) for one in completions]
            for document, one, values in zip(some.tolist(), completions, rewards[-1], strict=True):
                self._show_later(document, one, values)
        rewards_BF = np.concatenate(rewards)
        total_B = rewards_BF @ np.array(self._config.grpo.weights)
        is_used_B = np.isfinite(total_B)
        return {
            "reward": _mean(total_B[is_used_B]),
            **self._each_reward(rewards_BF[is_used_B]),
            "completions/mean_length": float(np.mean(lengths)),
            "answers": float(len(is_used_B)),
            "answers_left_out": float(np.sum(~is_used_B)),
        }

    def _show_later(self, document: int, one: Completion, values: np.ndarray) -> None:
        if len(self._shown) < SHOWN_ANSWERS:
            text = self._harmony.spelled_text(_sampled(one)[0])
            total = float(values @ np.array(self._config.grpo.weights))
            reward = total if np.isfinite(total) else None
            self._shown.append(Shown(self._question(document), text, reward))

    def show(self, step: int, params: dict, log: "RunLog") -> None:
        """Prints the first answers of the latest evaluation."""
        if self._config.eval.sample_tokens:
            for one in self._shown:
                reward = "none" if one.reward is None else f"{one.reward:.3g}"
                log.console.sample(one.answer, one.question, label=f"the model's answer, reward {reward}:")


def _mean(values: np.ndarray) -> float:
    """Returns the mean, NaN if there are no values."""
    return float(values.mean()) if values.size else float("nan")


def _sampled(one: Completion) -> tuple[list[int], list[float]]:
    """Returns the sampled tokens, with the stop token if any, and their log-probabilities."""
    assert one.logprobs is not None, "sampled with log-probabilities"
    if one.stop_token is None or one.stop_logprob is None:
        return one.tokens, one.logprobs
    return [*one.tokens, one.stop_token], [*one.logprobs, one.stop_logprob]
