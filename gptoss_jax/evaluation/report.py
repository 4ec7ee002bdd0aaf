"""The command `gptoss eval`: a model and a text, or tasks, to a table and a JSON file."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptoss_jax.checkpoints.load import load_model
from gptoss_jax.checkpoints.readers import is_run, local_folder
from gptoss_jax.config import TrainConfig, require
from gptoss_jax.config.base import write_json
from gptoss_jax.config.paths import output_file
from gptoss_jax.data.sources import open_corpus
from gptoss_jax.evaluation.perplexity import TextScore, TextSettings, evaluate_text

INSTALL_EVAL = "pip install 'gptoss-jax[eval]'"


def run(
    folder: str,
    source: str | None,
    tasks: Sequence[str],
    *,
    context: int | None,
    stride: int | None,
    batch_size: int | None,
    max_tokens: int | None,
    limit: int | None,
    num_fewshot: int | None,
    json_file: str | None,
) -> None:
    """Evaluates, prints, and writes where asked. Raises ValueError for arguments that are not allowed."""
    require(source is None or not tasks, "task", list(tasks), "must be left out where there is a source")
    require(source is not None or bool(tasks), "source", source, "give one, such as text:FILE, or a task")
    of_text, of_tasks = (
        {"stride": stride, "max_tokens": max_tokens}, {"limit": limit, "num_fewshot": num_fewshot},
    )  # fmt: skip
    for name, value in (of_text if tasks else of_tasks).items():
        require(value is None, name, value, f"belongs to a {'source' if tasks else 'task'}")
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        require(value is None or value >= least, name, value, f"must be {least} or more")
    path = None if json_file is None else output_file(json_file, "json")
    if tasks:
        found = _tasks(folder, tasks, context, batch_size, limit, num_fewshot)
    else:
        found = _text(folder, source, TextSettings(context, stride, batch_size, max_tokens))
    if path is not None:
        write_json(path, _plain(found), default=str)


def _text(folder: str, source: str, settings: TextSettings) -> dict[str, Any]:
    corpus, local = open_corpus(source), local_folder(folder)
    if settings.context is None and is_run(local):
        # A model that was never shown longer rows is not to be judged by them.
        seq_len = TrainConfig.load(local / "config.json").data.seq_len
        settings = dataclasses.replace(settings, context=seq_len)
    config, params, tokenizer = load_model(local)
    columns = (
        TextColumn("{task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, loss="compiling")

        def show(done: int, total: int | None, loss: float) -> None:
            progress.update(task, completed=done, total=total, loss=f"loss {loss:.3f}")

        score = evaluate_text(config, params, tokenizer, corpus, settings, show)
    print("\n".join(table(score)))
    values = dataclasses.asdict(score) | {"tokens_per_second": score.tokens_per_second}
    return {"folder": folder, "source": source, **values}


def table(score: TextScore) -> list[str]:
    """The lines of what a person reads."""
    documents = f"{score.documents:,} document{'s' * (score.documents != 1)}"
    records = f"{score.null_records:,} record{'s' * (score.null_records != 1)}"
    seconds = f"{score.seconds:,.1f} s, after {score.compile_seconds:,.1f} s of compiling"
    rows = {
        "loss": f"{score.loss:.4f} nats per token",
        "perplexity": f"{score.perplexity:,.3f}",
        "bits per byte": f"{score.bits_per_byte:.4f}",
        "text": f"{score.tokens:,} tokens, {score.bytes:,} bytes, {documents}",
        "skipped": f"{records} whose field is null" if score.null_records else "",
        "windows": f"{score.context:,} tokens, {score.stride:,} apart",
        "speed": f"{score.tokens_per_second:,.0f} tokens/s: {seconds}",
    }
    return [f"{name:<15}{value}" for name, value in rows.items() if value]


def _tasks(
    folder: str,
    tasks: Sequence[str],
    context: int | None,
    batch_size: int | None,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, Any]:
    try:
        import lm_eval.utils

        from gptoss_jax.evaluation.lm_eval import evaluate_tasks
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "lm_eval":
            raise
        raise ValueError(f"task is {list(tasks)!r}: needs lm_eval: {INSTALL_EVAL}") from None
    # It warns of every default that a task relies on.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    found = evaluate_tasks(folder, tasks, limit, num_fewshot, batch_size, context)
    print(lm_eval.utils.make_table(found))
    if found.get("groups"):
        print(lm_eval.utils.make_table(found, "groups"))
    return {"folder": folder, **found}


def _plain(value: Any) -> Any:
    """A value as strict JSON knows it: null for NaN and the infinities, and numbers that are Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
