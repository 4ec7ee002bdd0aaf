"""The command `gptoss`, also `python -m gptoss_jax`."""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TextIO

import tyro

from gptoss_jax import startup
from gptoss_jax.config import require
from gptoss_jax.config.kernels import kernel_variable
from gptoss_jax.config.paths import set_matplotlib_folder
from gptoss_jax.config.preset import with_settings

# Nothing above a command's body may import jax, which takes longer than `--help` should.

Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
OptionalFile = Annotated[str | None, tyro.conf.arg(metavar="FILE")]

# Commands that compute with a model: for them memory in huge pages is worth a start anew.
RUNS_MODELS = ("generate", "chat", "eval")

app = tyro.extras.SubcommandApp()


@app.command
def generate(
    run: Run,
    *,
    prompt: str,
    max_new_tokens: OptionalInt = None,
    temperature: float = 0.8,
    top_k: OptionalInt = None,
    top_p: OptionalFloat = None,
    min_p: OptionalFloat = None,
    stop_strings: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = (),
    seed: int = 0,
) -> None:
    """Continue a text with a model, printing it as it is written.

    Args:
        run: Folder of a run of train.py, or of a Hugging Face model; hf:OWNER/NAME is one of its hub.
        prompt: The text to continue; "" lets the model begin by itself.
        max_new_tokens: Stop after this many tokens, if the text has not ended before. Default: 200, or as
            many as the model's context has room for.
        temperature: How freely to choose: 0 takes the likeliest token, 1 follows the model's probabilities.
        top_k: Choose among this many of the likeliest tokens only.
        top_p: Choose among the likeliest tokens whose probabilities add up to this.
        min_p: Choose among tokens at least this many times as likely as the likeliest.
        stop_strings: End before this text, if the model writes it; may be given several times.
        seed: Another seed gives another text; the same one the same.
    """
    import jax

    from gptoss_jax.checkpoints.load import load_model
    from gptoss_jax.config.paths import user_text
    from gptoss_jax.inference.chat import speed
    from gptoss_jax.inference.detokenizer import StreamingDetokenizer
    from gptoss_jax.inference.generate import stream_with_params

    config, params, tokenizer = load_model(run)
    prompt, stop_strings = user_text(prompt), tuple(map(user_text, stop_strings))
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if max_new_tokens is None:
        # A prompt that leaves no room at all is an error of its own.
        max_new_tokens = max(min(200, config.max_position_embeddings - len(tokens)), 1)
    chunks = stream_with_params(
        config, jax.device_put(params), [tokens], max_new_tokens,
        temperature, top_k, top_p, min_p, stop_tokens=tokenizer.stop_ids, stop_strings=stop_strings,
        seed=seed, tokenizer=tokenizer,
    )  # fmt: skip
    write = _writer(sys.stdout)
    write(prompt, dim=True)
    text = StreamingDetokenizer(tokenizer.decode_bytes, stop_strings)
    counts, times = [], []
    try:
        for (tokens,) in chunks:
            counts.append(len(tokens))
            times.append(time.monotonic())
            # The model's table may have more rows than the tokenizer has tokens.
            write(text.feed([token for token in tokens if token < tokenizer.vocab_size]))
    except KeyboardInterrupt:
        write("\n")
        raise
    write(text.close())
    write("\n")
    _writer(sys.stderr)(speed(counts, times) + "\n", dim=True)


@app.command
def chat(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    reasoning: Literal["low", "medium", "high"] = "medium",
    instructions: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    analysis: Literal["show", "hide"] = "show",
    plain: tyro.conf.FlagCreatePairsOff[bool] = False,
    max_new_tokens: OptionalInt = None,
    temperature: OptionalFloat = None,
    top_k: OptionalInt = None,
    top_p: OptionalFloat = None,
    min_p: OptionalFloat = None,
    seed: int = 0,
) -> None:
    """Talk with a chat model in Harmony, gpt-oss's format; a base model continues each line. /help has more.

    Args:
        folder: Folder of a Hugging Face model, or of a run of train.py; hf:OWNER/NAME is one of its hub.
            A chat model is one whose tokenizer has Harmony's special tokens.
        reasoning: How much a chat model thinks before it answers.
        instructions: What a chat model shall keep to, such as "Answer in French.".
        analysis: Whether a chat model's thinking is shown, dimmed.
        plain: Take the model for a base model, although its tokenizer has Harmony's special tokens.
        max_new_tokens: Stop an answer after so many tokens. Default: 4096 of a chat model, 200 of a base one.
        temperature: 0 takes the likeliest token, 1 follows the model's probabilities.
            Default: 1 for a chat model, 0.8 for a base one.
        top_k: Choose among this many of the likeliest tokens only.
        top_p: Choose among the likeliest tokens whose probabilities add up to this.
        min_p: Choose among tokens at least this many times as likely as the likeliest.
        seed: Another seed gives other answers; the same one the same.
    """
    import datetime

    import jax

    from gptoss_jax.checkpoints.load import load_model
    from gptoss_jax.config.paths import user_text
    from gptoss_jax.data.harmony import is_harmony
    from gptoss_jax.inference.chat import HELP, Completion, HarmonyConversation, run, typed_lines

    config, params, tokenizer = load_model(folder)
    errors = _writer(sys.stderr)

    def note(text: str) -> None:
        errors(text + "\n", dim=True)

    if is_harmony(tokenizer) and not plain:
        today = datetime.date.today().isoformat()
        instructions = None if instructions is None else user_text(instructions)
        conversation = HarmonyConversation(tokenizer, reasoning, instructions, today)
    else:
        require(instructions is None, "instructions", instructions, "must be left out for plain completion")
        conversation = Completion(tokenizer)
        note("plain completion: every line is a text of its own, to continue from")
    # Bytes that are not text must not end the chat. The ASCII of LC_ALL=C is read as UTF-8.
    is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
    sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")
    if sys.stdin.isatty():
        note(HELP)
    lines = typed_lines(sys.stdin, "> " if sys.stdout.isatty() else "")
    run(
        config, jax.device_put(params), conversation, lines, _writer(sys.stdout), note,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        seed=seed, show_analysis=analysis == "show",
    )  # fmt: skip


@app.command(name="eval")
def evaluate(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    source: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None,
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TASK")] = (),
    context: OptionalInt = None,
    stride: OptionalInt = None,
    batch_size: OptionalInt = None,
    max_tokens: OptionalInt = None,
    limit: OptionalInt = None,
    num_fewshot: OptionalInt = None,
    json: OptionalFile = None,
) -> None:
    """Say how well a model predicts a text, or how it does at tasks of lm_eval.

    Args:
        folder: Folder of a run of train.py, or of a Hugging Face model; hf:OWNER/NAME is one of its hub.
        source: The text, named as train.py's data.source: text:GLOB, jsonl:GLOB#field, stdlib, ….
        task: A task's YAML file, or the name of one that comes with lm_eval; may be given several times.
        context: Tokens seen at once. Default: a run's data.seq_len, else 2048; for a task all that fit.
        stride: Tokens from one window of a text to the next, which scores what is new. Default: half of them.
        batch_size: Rows in one call of the model. Default: as many as have 16384 tokens.
        max_tokens: Score so many tokens of the text at most.
        limit: Ask so many questions of each task at most.
        num_fewshot: Examples in front of a question, unless the task says 0. Default: the task's own number.
        json: Write the result to this file too.
    """
    from gptoss_jax.evaluation import report

    report.run(
        folder, source, task, context=context, stride=stride, batch_size=batch_size, max_tokens=max_tokens,
        limit=limit, num_fewshot=num_fewshot, json_file=json,
    )  # fmt: skip


@app.command
def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    experts: Literal["bfloat16", "float32", "mxfp4"] | None = None,
) -> None:
    """Write a model as a Hugging Face folder, which transformers and vLLM load.

    Args:
        source: Run folder, Hugging Face folder of any type, original/ folder, or hf:OWNER/NAME from its hub.
        target: Folder to write. It must not exist yet, and appears when it is whole.
        experts: Type of the weights; mxfp4 means packed experts in bfloat16 company. Default: the source's.
    """
    import resource

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from gptoss_jax.checkpoints import export

    began = time.monotonic()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        size = 0

        def show(done: int, total: int) -> None:
            nonlocal size
            size = total
            progress.update(task, completed=done, total=total)

        export.convert(source, target, experts, show)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.monotonic() - began
    print(f"{target}: {size / 1e9:,.2f} GB written in {seconds:,.0f} s, peak memory {peak / 1e9:,.2f} GB")


@app.command
def report(run: Run) -> None:
    """Draw the curves of a run as a picture, RUN/report.png, and print its path.

    Args:
        run: Folder of the run, as train.py wrote it.
    """
    from gptoss_jax.training.plots import draw_report

    print(draw_report(run))


@app.command
def check(json: OptionalFile = None) -> None:
    """Compare every kernel of this machine with plain XLA on small inputs: correctness and time.

    Exits with 1 if one is wrong. GPTOSS_JAX_KERNELS=plain runs everything without kernels, plain:NAME,NAME
    without the named ones.

    Args:
        json: Write the results to this file too.
    """
    from gptoss_jax.cli import check

    if not check.run(json):
        raise SystemExit(1)


@app.command
def plan(
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    *,
    topology: Annotated[str | None, tyro.conf.arg(metavar="SLICE")] = None,
    chip: Annotated[str | None, tyro.conf.arg(metavar="CHIP")] = None,
    devices: OptionalInt = None,
    mesh: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="AXES")] = (),
    json: OptionalFile = None,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FLAG=VALUE")] = (),
) -> None:
    """Say what a training step costs on devices that need not be here: memory, FLOPs, communication.

    Args:
        config: A preset such as configs/gpt_oss_20b.py.
        topology: TPU slice such as v5p:4x4x4; the real step is then compiled for it too, which takes minutes.
        chip: v5e, v5p, v6e, tpu7x, a100, h100, h200 or b200, with --devices: an estimate from shapes alone.
        devices: Number of devices as JAX counts them; a tpu7x chip is two.
        mesh: Such as fsdp=16,expert=4; may be given several times. Default: all meshes there are, the best
            first.
        json: Write everything to this file too.
        set: A field of the config; --model.remat block, as for train.py, is the same as --set
            model.remat=block.
    """
    from gptoss_jax.config.preset import flags_of, read_preset

    settings = read_preset(config, flags_of(set), prog="gptoss plan CONFIG")
    if not mesh and any(one.startswith("mesh.") for one in set):
        mesh = (",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(settings.mesh).items()),)
    from gptoss_jax.planning import report

    if not report.run(settings, topology, chip, devices, mesh, json):
        raise SystemExit(1)


def _writer(file: TextIO) -> Callable[..., None]:
    """Writes text at once. At a terminal it can be dim, and whatever a model wrote cannot move the cursor."""
    from gptoss_jax.training.console import printable

    terminal = file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    encoding = getattr(file, "encoding", None) or "utf-8"

    def write(text: str, dim: bool = False) -> None:
        text = text.encode(encoding, "replace").decode(encoding)
        if terminal:
            text = printable(text)
            text = f"\x1b[2m{text}\x1b[0m" if dim and text else text
        file.write(text)
        file.flush()

    return write


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (the process's by default) and returns its exit code, that of `startup.run`.

    Raises SystemExit where tyro does: after `--help` and for arguments that it cannot parse.
    """
    description = "Models of the gpt-oss family in JAX."
    if args is None and sys.argv[1:2] in ([name] for name in RUNS_MODELS) and "--help" not in sys.argv:
        startup.keep_memory()
    startup.hide_tpu_compiler()
    set_matplotlib_folder()
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["plan"]:
        args = with_settings(args)

    def command() -> None:
        kernel_variable()  # a bad value is known before anything is printed
        app.cli(prog="gptoss", description=description, args=args, sort_subcommands=False)

    return startup.run(command, "gptoss")
