"""lm_eval (EleutherAI's LM Evaluation Harness) model adapter, registered as "gptoss_jax".

Requires lm_eval: pip install 'gptoss-jax[eval]'.
"""

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
from gptoss_jax.evaluation.logprobs import batch_rows, split_rows, token_logprobs
from gptoss_jax.inference.detokenizer import detokenize
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.prefill import next_power_of_two
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import get_params

# Minimum length of a padded row; longer ones double it.
MIN_LENGTH = 32
# Default number of new tokens, as in lm_eval's own adapters.
DEFAULT_NEW_TOKENS = 256
GENERATION_KWARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")


@register_model("gptoss_jax")
class GptOss(TemplateLM):
    """lm_eval model for any folder that `from_pretrained` can load.

    Texts start with bos, as in training. Inputs that are too long are truncated from the left.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int | None = None,
        max_length: int | None = None,
        adapter: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """
        Args:
          folder: model folder.
          batch_size: rows per forward pass. Default: 16,384 tokens per batch.
          max_length: maximum context length in tokens. Default: the model's max_position_embeddings.
          adapter, mesh: see `from_pretrained`.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            require(value is None or value >= least, name, value, f"must be {least} or more")
        self._model, self._tokenizer = load_model(folder, adapter, mesh)
        self._params = get_params(self._model)
        limit = self._model.config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        allowed = f"must be at most the model's max_position_embeddings, {limit}"
        require(self.max_length <= limit, "max_length", max_length, allowed)
        self._batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Key for lm_eval's cache of tokenized requests."""
        return f"gptoss_jax-{self._tokenizer.digest}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding would produce it.

        A request is (texts, context, continuation); the texts are lm_eval's cache key. Rows are padded to a
        power of two of at least 32, or to `max_length`; each length compiles one program.
        """
        for _, _, continuation in requests:
            allowed = f"must be at most max_length, {self.max_length}"
            require(len(continuation) <= self.max_length, "tokens to score", len(continuation), allowed)
        tokens = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(tokens[i]))
        with tqdm(total=len(order), desc="Scoring", disable=disable_tqdm or None) as progress:
            while order:
                length = max(MIN_LENGTH, next_power_of_two(len(tokens[order[0]]) - 1))
                length = min(length, self.max_length)
                rows = min(self._batch_size or batch_rows(length), next_power_of_two(len(requests)))
                rows = split_rows(rows)
                chosen, order = order[:rows], order[rows:]
                names = ("tokens", "targets", "segment_ids")
                batch = {name: np.zeros((rows, length), np.int32) for name in names}
                for b, i in enumerate(chosen):
                    end = len(tokens[i]) - 1
                    batch["tokens"][b, :end] = tokens[i][:-1]
                    batch["targets"][b, :end] = tokens[i][1:]
                    batch["segment_ids"][b, :end] = 1
                logprobs_BT, is_greedy_BT = map(
                    np.asarray, token_logprobs(self._model.config, self._params, batch)
                )
                for b, i in enumerate(chosen):
                    texts, _, continuation = requests[i]
                    scored = slice(len(tokens[i]) - 1 - len(continuation), len(tokens[i]) - 1)
                    total = float(np.sum(logprobs_BT[b, scored], dtype=np.float64))
                    answers[i] = total, bool(np.all(is_greedy_BT[b, scored]))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                progress.update(len(chosen))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, computed in lm_eval's disjoint windows."""
        texts = [request.args[0] for request in requests]
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
                )
            ]
            for text in texts
        ]
        flat = [(None, *window) for group in windows for window in group]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        totals = []
        for text, group in zip(texts, windows, strict=True):
            totals.append(sum(next(scores)[0] for _ in group))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates text for each (context, generation_kwargs), up to a stop token or an `until` string.

        Stop tokens are the model folder's; ones that decode to text are ignored, as in lm_eval's adapters.
        Greedy unless the task sets `do_sample`; then the seed is the request's index.
        """
        prepared = [self._prepare(seed, *request.args) for seed, request in enumerate(requests)]
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i][0]))
        answers = [""] * len(prepared)
        text_stops = set(self._tokenizer.stop_ids) - set(self._stop_tokens)
        with tqdm(total=len(order), desc="Generating", disable=disable_tqdm or None) as progress:
            while order:
                prompt, longest = prepared[order[0]]
                rows = self._batch_size or batch_rows(len(prompt) + longest.max_new_tokens)
                chosen, order = order[:rows], order[rows:]
                prompts, params = zip(*(prepared[i] for i in chosen), strict=True)
                completions = generate(self._model, prompts, params, tokenizer=self._tokenizer)
                for i, completion in zip(chosen, completions, strict=True):
                    tokens = completion.tokens
                    end = next((k for k, token in enumerate(tokens, 1) if token in text_stops), None)
                    answers[i] = detokenize(self._tokenizer, tokens[:end], prepared[i][1].stop_strings)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                progress.update(len(chosen))
        return answers

    @property
    def _stop_tokens(self) -> tuple[int, ...]:
        """The stop tokens that are not text."""
        special, vocab_size = set(self._tokenizer.special_tokens.values()), self._tokenizer.vocab_size
        ids = self._tokenizer.stop_ids
        return tuple(token for token in ids if token in special or token >= vocab_size)

    def _prepare(self, seed: int, context: str, settings: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """Converts a context and a task's generation_kwargs to a prompt and its sampling parameters."""
        # In a small context, the default must leave room for the prompt.
        kwargs: Mapping[str, Any] = normalize_gen_kwargs(
            settings, min(DEFAULT_NEW_TOKENS, self.max_length // 2)
        )
        for name, value in kwargs.items():
            allowed = f"is not supported; known: {', '.join(GENERATION_KWARGS)}"
            require(name in GENERATION_KWARGS, f"generation_kwargs.{name}", value, allowed)
        new_tokens = kwargs["max_gen_toks"]
        allowed = f"must be from 1 to {self.max_length - 1}, below max_length"
        in_range = 1 <= new_tokens < self.max_length
        require(in_range, "generation_kwargs.max_gen_toks", new_tokens, allowed)
        prompt = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        return prompt, SamplingParams(
            max_new_tokens=new_tokens,
            temperature=kwargs.get("temperature", 0.0),
            top_k=kwargs.get("top_k"),
            top_p=kwargs.get("top_p"),
            min_p=kwargs.get("min_p"),
            seed=seed,
            stop_tokens=self._stop_tokens,
            stop_strings=tuple(filter(None, kwargs["until"])),
        )


def evaluate_tasks(
    folder: str,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    *,
    adapter: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Runs lm_eval tasks and returns the result of its `evaluate`, without samples.

    Args:
      folder, batch_size, max_length, adapter, mesh: see `GptOss`.
      tasks: YAML files, or names of tasks included in lm_eval. Data files named in a YAML file are relative
        to the working directory.
      limit: maximum number of documents per task.
      num_fewshot: number of few-shot examples, unless the task sets it to 0.

    Raises ValueError for a model or task that is unknown or cannot be loaded.
    """
    loaded = _load_tasks(tasks)
    model = GptOss(folder, batch_size, max_length, adapter, mesh)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return evaluate(model, loaded, limit=limit, log_samples=False)


def _load_tasks(tasks: Sequence[str]) -> Mapping[str, Any]:
    is_file = [name.endswith((".yaml", ".yml")) for name in tasks]
    tasks = [str(user_path(t, "task")) if file else t for t, file in zip(tasks, is_file, strict=True)]
    files = {name for name, file in zip(tasks, is_file, strict=True) if file}
    # Indexing lm_eval's own tasks reads thousands of files.
    manager = TaskManager(include_defaults=bool(set(tasks) - files))
    for name in tasks:
        known = os.path.isfile(name) if name in files else name in manager.task_index
        require(known, "task", name, "must be a YAML file, or a task that comes with lm_eval")
    try:
        return manager.load(list(tasks))
    except Exception as error:  # an invalid file makes lm_eval raise errors of all kinds
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"task is {', '.join(tasks)}: lm_eval cannot load it ({reason})") from error
