"""The models of this package as lm_eval sees them (EleutherAI's evaluation harness), under "gptoss_jax".

Importing this needs lm_eval: pip install 'gptoss-jax[eval]'.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptoss_jax.checkpoints.load import load_model
from gptoss_jax.config import require
from gptoss_jax.config.paths import user_path
from gptoss_jax.evaluation.logprobs import batch_rows, token_logprobs
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.generate import generate_with_params

# The shortest row; the others are twice as long as the one before.
SHORTEST = 32
# New tokens where a task does not say how many, as in lm_eval's own adapters.
NEW_TOKENS = 256
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")


@register_model("gptoss_jax")
class GptOss(TemplateLM):
    """A model of any folder that `from_pretrained` reads, with its tokenizer.

    Text begins with bos, as in training. What is too long loses its beginning.
    """

    def __init__(self, folder: str, batch_size: int | None = None, max_length: int | None = None):
        """
        Args:
          folder: where the model is.
          batch_size: rows in one call of the model. Default: as many as have 16,384 tokens.
          max_length: most tokens that the model is given at once. Default: its max_position_embeddings.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            require(value is None or value >= least, name, value, f"must be {least} or more")
        self._config, self._params, self._tokenizer = load_model(folder)
        limit = self._config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        allowed = f"must be at most the model's max_position_embeddings, {limit}"
        require(self.max_length <= limit, "max_length", max_length, allowed)
        self._batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells apart what lm_eval keeps of the tokens of requests."""
        return f"gptoss_jax-{self._tokenizer.digest}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the continuation's log-probability, and whether greedy
        decoding would give it. The texts are only what lm_eval keeps an answer under.

        Rows are padded to a power of two from 32 on, or to `max_length`: as many programs are compiled.
        """
        for _, _, continuation in requests:
            allowed = f"must be at most max_length, {self.max_length}"
            require(len(continuation) <= self.max_length, "tokens to score", len(continuation), allowed)
        tokens = [(before + after)[-(self.max_length + 1) :] for _, before, after in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(tokens[i]))
        with tqdm(total=len(order), desc="Scoring", disable=disable_tqdm or None) as progress:
            while order:
                length = min(_power_of_two(len(tokens[order[0]]) - 1, SHORTEST), self.max_length)
                rows = min(self._batch_size or batch_rows(length), _power_of_two(len(requests)))
                chosen, order = order[:rows], order[rows:]
                batch = {
                    name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "segment_ids")
                }
                for b, i in enumerate(chosen):
                    end = len(tokens[i]) - 1
                    batch["tokens"][b, :end] = tokens[i][:-1]
                    batch["targets"][b, :end] = tokens[i][1:]
                    batch["segment_ids"][b, :end] = 1
                log_probs_BT, greedy_BT = map(np.asarray, token_logprobs(self._config, self._params, batch))
                for b, i in enumerate(chosen):
                    texts, _, continuation = requests[i]
                    scored = slice(len(tokens[i]) - 1 - len(continuation), len(tokens[i]) - 1)
                    total = float(np.sum(log_probs_BT[b, scored], dtype=np.float64))
                    answers[i] = total, bool(np.all(greedy_BT[b, scored]))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                progress.update(len(chosen))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in lm_eval's windows, which overlap only where a text ends."""
        texts = [request.args[0] for request in requests]
        parts = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
                )
            ]
            for text in texts
        ]
        flat = [(None, *window) for windows in parts for window in windows]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        totals = []
        for text, windows in zip(texts, parts, strict=True):
            totals.append(sum(next(scores)[0] for _ in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that each (context, settings) is continued by, up to a stop token of the model's folder or
        one of the `until` strings. A stop token that is text belongs to the answer, as in lm_eval's adapters.

        Greedy unless the task asks for `do_sample`; then each request has a seed of its own, its number.
        """
        asked = [self._generation(*request.args) for request in requests]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        answers = [""] * len(asked)
        stops = self._tokenizer.stop_ids
        special = set(self._tokenizer.special_tokens.values())
        stop_tokens = [token for token in stops if token in special or token >= self._tokenizer.vocab_size]
        text_stops = set(stops) - set(stop_tokens)
        with tqdm(total=len(order), desc="Generating", disable=disable_tqdm or None) as progress:
            while order:
                prompt, settings = asked[order[0]]
                rows = self._batch_size or batch_rows(len(prompt) + settings["max_new_tokens"])
                chosen, order = order[:rows], order[rows:]
                columns = {name: [asked[i][1][name] for i in chosen] for name in settings}
                found = generate_with_params(
                    self._config, self._params, [asked[i][0] for i in chosen], **columns,
                    stop_tokens=stop_tokens, seed=chosen, tokenizer=self._tokenizer,
                )  # fmt: skip
                for i, tokens in zip(chosen, found, strict=True):
                    text = StreamingDetokenizer(self._tokenizer.decode_bytes, asked[i][1]["stop_strings"])
                    end = next((k for k, token in enumerate(tokens, 1) if token in text_stops), None)
                    # The model's table may have more rows than the tokenizer has tokens.
                    known = [token for token in tokens[:end] if token < self._tokenizer.vocab_size]
                    answers[i] = text.feed(known) + text.close()
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                progress.update(len(chosen))
        return answers

    def _generation(self, context: str, asked: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """A prompt's tokens and the settings of `generate` for it."""
        # A default must leave a small context room for the question.
        known = normalize_gen_kwargs(asked, min(NEW_TOKENS, self.max_length // 2))
        for name, value in known.items():
            allowed = f"is not supported; known: {', '.join(GENERATION)}"
            require(name in GENERATION, f"generation_kwargs.{name}", value, allowed)
        most = known["max_gen_toks"]
        allowed = f"must be from 1 to {self.max_length - 1}, below max_length"
        require(1 <= most < self.max_length, "generation_kwargs.max_gen_toks", most, allowed)
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        settings = {name: known.get(name) for name in ("top_k", "top_p", "min_p")}
        settings |= {"max_new_tokens": most, "temperature": known.get("temperature", 0.0)}
        return prompt, settings | {"stop_strings": [string for string in known["until"] if string]}


def evaluate_tasks(
    folder: str,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """What lm_eval's `evaluate` gives for a model and some tasks, without the samples.

    Args:
      folder, batch_size, max_length: of the model, see `GptOss`.
      tasks: YAML files of tasks, or names of tasks that come with lm_eval. Data files that a YAML names are
        looked for from the working directory.
      limit: most documents of each task.
      num_fewshot: examples before each question, where the task does not say 0.

    Raises ValueError for a model or a task that is not known or cannot be loaded.
    """
    found = _load_tasks(tasks)
    model = GptOss(folder, batch_size, max_length)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in found["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return evaluate(model, found, limit=limit, log_samples=False)


def _load_tasks(tasks: Sequence[str]) -> dict[str, Any]:
    is_file = [name.endswith((".yaml", ".yml")) for name in tasks]
    tasks = [str(user_path(t, "task")) if file else t for t, file in zip(tasks, is_file, strict=True)]
    files = {name for name, file in zip(tasks, is_file, strict=True) if file}
    # Thousands of files are read to know the names that come with lm_eval.
    manager = TaskManager(include_defaults=bool(set(tasks) - files))
    for name in tasks:
        known = os.path.isfile(name) if name in files else name in manager.task_index
        require(known, "task", name, "must be a YAML file, or a task that comes with lm_eval")
    try:
        return manager.load(list(tasks))
    except Exception as error:  # a file with a fault makes lm_eval raise errors of all kinds
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"task is {', '.join(tasks)}: lm_eval cannot load it ({reason})") from error


def _power_of_two(count: int, smallest: int = 1) -> int:
    """The first power of two that is at least `count`."""
    return max(smallest, 1 << max(count - 1, 0).bit_length())
