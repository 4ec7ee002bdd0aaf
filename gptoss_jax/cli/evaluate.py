"""`gptoss eval`."""

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

from gptoss_jax.cli.arguments import Folder, JsonFile, OptionalInt, OptionalText, Texts
from gptoss_jax.config import require
from gptoss_jax.status import status

if TYPE_CHECKING:
    import jax

    from gptoss_jax.config import DataConfig
    from gptoss_jax.evaluation.conversations import ChatScore
    from gptoss_jax.evaluation.perplexity import TextScore

INSTALL_EVAL = "pip install 'gptoss-jax[eval]'"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure the loss on text or conversations, or run lm_eval tasks.

    With --source, reports loss and perplexity; of text also bits per byte, of conversations per token that
    training would train on. With --task, runs tasks of EleutherAI's lm_eval, which needs the extra "eval".

    Examples:
      gptoss eval runs/quickstart --source stdlib --max-tokens 100000
      gptoss eval runs/sft-qlora-20b --source 'chat:test/*.jsonl'
      gptoss eval hf:openai/gpt-oss-20b --source 'text:books/*.txt' --json result.json
      gptoss eval hf:openai/gpt-oss-20b --task hellaswag --limit 100
    """

    # Model: a run folder, a Hugging Face folder, or hf:OWNER/NAME to download one from the Hugging Face Hub.
    folder: Folder
    # LoRA adapter to apply: a PEFT folder, or a run that trained adapters.
    adapter: OptionalText = None
    # Mesh of devices to split the model over, such as tensor=2. (default: one device)
    mesh: OptionalText = None
    # Text to score: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, or hf:NAME. Conversations:
    # chat:GLOB, or stdlib-chat.
    source: OptionalText = None
    # lm_eval task to run: a name, or your own YAML file.
    task: Texts = ()
    # Context length in tokens. (default: data.seq_len of a run, otherwise 2048; of conversations, the longest
    # answered turn; for tasks, the model's limit)
    context: OptionalInt = None
    # Tokens between the starts of two sliding windows. (default: half the context)
    stride: OptionalInt = None
    # Windows per forward pass. (default: as many as make 16,384 tokens)
    batch_size: OptionalInt = None
    # Score only the first tokens of the text, up to this number. (default: all)
    max_tokens: OptionalInt = None
    # Maximum number of examples per task. (default: all)
    limit: OptionalInt = None
    # Number of few-shot examples, for tasks that do not fix it to 0. (default: the task's)
    num_fewshot: OptionalInt = None
    # Also write the results to this JSON file.
    json_file: JsonFile = None

    def run(self) -> None:
        from gptoss_jax.config.base import write_json
        from gptoss_jax.config.paths import output_file

        self._check()
        path = None if self.json_file is None else output_file(self.json_file, "json")
        with status("starting"):
            from gptoss_jax.parallel.mesh import use_mesh
        with use_mesh(self.mesh) as mesh:
            result = self._run_tasks(mesh) if self.task else self._run_source(mesh)
        if path is not None:
            write_json(path, _to_json(result), default=str)

    def _check(self) -> None:
        source, task = self.source, list(self.task)
        require(source is None or not task, "task", task, "must be left out if there is a source")
        require(
            source is not None or bool(task), "source", source, "give --source, such as text:FILE, or --task"
        )
        other = "source" if task else "task"
        for name in ("stride", "max_tokens") if task else ("limit", "num_fewshot"):
            require(getattr(self, name) is None, name, getattr(self, name), f"applies only to a {other}")
        for name, least in (("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"must be {least} or more")

    def _run_source(self, mesh: "jax.sharding.Mesh | None") -> dict[str, Any]:
        from gptoss_jax.config.train import is_preferences, is_prompts
        from gptoss_jax.data.chat_rows import is_chat_source

        assert self.source is not None
        kinds = {"dpo": ("pairs", is_preferences), "grpo": ("prompts", is_prompts)}
        for objective, (what, is_kind) in kinds.items():
            allowed = f"a run with objective {objective} reports its held-out {what} itself"
            is_other = not is_kind(self.source)
            require(is_other, "--source", self.source, f"must be text or conversations; {allowed}")
        return self._run_chat(mesh, self.source) if is_chat_source(self.source) else self._run_text(mesh)

    def _run_chat(self, mesh: "jax.sharding.Mesh | None", source: str) -> dict[str, Any]:
        for name in ("stride", "max_tokens"):
            require(getattr(self, name) is None, name, getattr(self, name), "applies only to text")
        with status(f"loading {self.folder}"):
            from gptoss_jax.checkpoints.load import load_model
            from gptoss_jax.checkpoints.readers import local_folder
            from gptoss_jax.checkpoints.run_params import is_run
            from gptoss_jax.config import DataConfig, TrainConfig
            from gptoss_jax.data.chat_rows import open_chat
            from gptoss_jax.evaluation.conversations import evaluate_conversations

            corpus, folder = open_chat(source), local_folder(self.folder)
            data = TrainConfig.load(folder / "config.json").data if is_run(folder) else DataConfig()
            model, tokenizer = load_model(folder, self.adapter, mesh)
        with status("scoring") as shown:
            score = evaluate_conversations(
                model,
                tokenizer,
                corpus,
                data,
                context=self.context,
                batch_size=self.batch_size,
                on_progress=lambda done, total: shown.update(f"{done:,} of {total:,} batches"),
            )
        print("\n".join(_chat_table(score, data)))
        return {"folder": self.folder, "source": source, **dataclasses.asdict(score)}

    def _run_text(self, mesh: "jax.sharding.Mesh | None") -> dict[str, Any]:
        with status(f"loading {self.folder}"):
            from gptoss_jax.checkpoints.load import load_model
            from gptoss_jax.checkpoints.readers import local_folder
            from gptoss_jax.checkpoints.run_params import is_run
            from gptoss_jax.config import TrainConfig
            from gptoss_jax.data.sources import open_corpus
            from gptoss_jax.evaluation.perplexity import TextSettings, evaluate_text
        assert self.source is not None
        settings = TextSettings(self.context, self.stride, self.batch_size, self.max_tokens)
        corpus, folder = open_corpus(self.source), local_folder(self.folder)
        if self.context is None and is_run(folder):
            # The model has not been trained on longer rows.
            seq_len = TrainConfig.load(folder / "config.json").data.seq_len
            settings = dataclasses.replace(settings, context=seq_len)
        with status(f"loading {self.folder}"):
            model, tokenizer = load_model(folder, self.adapter, mesh)
        with status("scoring") as shown:
            shown.update("compiling")

            def show(done: int, total: int | None, loss: float) -> None:
                of_all = "" if total is None else f" of {total:,} ({done / max(total, 1):.0%})"
                shown.update(f"loss {loss:.3f} · {done:,}{of_all} tokens")

            score = evaluate_text(model, tokenizer, corpus, settings, show)
        print("\n".join(_table(score)))
        values = dataclasses.asdict(score) | {"tokens_per_second": score.tokens_per_second}
        return {"folder": self.folder, "source": self.source, **values}

    def _run_tasks(self, mesh: "jax.sharding.Mesh | None") -> dict[str, Any]:
        try:
            with status("starting lm_eval"):
                import lm_eval.utils

                from gptoss_jax.evaluation.lm_eval import evaluate_tasks
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "lm_eval":
                raise
            raise ValueError(f"task is {' '.join(self.task)!r}: needs lm_eval; {INSTALL_EVAL}") from None
        # It warns of every default that a task relies on.
        logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
        result = evaluate_tasks(
            self.folder,
            self.task,
            self.limit,
            self.num_fewshot,
            self.batch_size,
            self.context,
            adapter=self.adapter,
            mesh=mesh,
        )
        print(lm_eval.utils.make_table(result))
        if result.get("groups"):
            print(lm_eval.utils.make_table(result, "groups"))
        return {"folder": self.folder, **result}


def _chat_table(score: "ChatScore", data: "DataConfig") -> list[str]:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in score.skipped.items())
    turns = f"{score.examples:,} answered turn{'s' * (score.examples != 1)}"
    rows = {
        "loss": f"{score.loss:.4f} nats per trained token",
        "perplexity": f"{score.perplexity:,.3f}",
        "conversations": f"{score.rows:,}, with {score.trained_tokens:,} trained tokens in {turns}",
        "trained": f"data.train_on {data.train_on}, reasoning effort {data.reasoning_effort} if not set",
        "skipped": f"{sum(score.skipped.values()):,} ({reasons}); gptoss inspect-data lists them"
        if score.skipped
        else "",
        "left out": f"{score.left_out:,} answered turns longer than {score.context:,} tokens (--context)"
        if score.left_out
        else "",
        "time": f"{score.seconds:,.1f} s, with compiling",
    }
    return [f"{name:<15}{value}" for name, value in rows.items() if value]


def _table(score: "TextScore") -> list[str]:
    documents = f"{score.documents:,} document{'s' * (score.documents != 1)}"
    records = f"{score.null_records:,} record{'s' * (score.null_records != 1)}"
    seconds = f"{score.seconds:,.1f} s, plus {score.compile_seconds:,.1f} s to compile"
    rows = {
        "loss": f"{score.loss:.4f} nats per token",
        "perplexity": f"{score.perplexity:,.3f}",
        "bits per byte": f"{score.bits_per_byte:.4f}",
        "text": f"{score.tokens:,} tokens, {score.bytes:,} bytes, {documents}",
        "skipped": f"{records} whose field is null" if score.null_records else "",
        "windows": f"{score.context:,} tokens, stride {score.stride:,}",
        "speed": f"{score.tokens_per_second:,.0f} tokens/s ({seconds})",
    }
    return [f"{name:<15}{value}" for name, value in rows.items() if value]


def _to_json(value: Any) -> Any:
    """Converts NumPy values to Python's, and NaN and infinities, which JSON does not have, to null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
