"""Fine-tuning speed against PEFT: python benchmarks/finetune.py.

The model of train_vs_transformers.py with 32 experts, float32 on CPU, batch 4 x 512, with adapters of rank 8
on q, k, v, out and of rank 2 on each expert's gate_up and down; AdamW with clipping over the adapters alone.

Steps: LoRA and QLoRA, whose experts are packed in MXFP4, against PEFT around transformers, with the faster of
its `eager` and `grouped_mm` experts, which a pilot of one step chooses. PEFT adds the products of the
adapters to the experts' weights in each step. Each side runs in a separate process on all cores, takes two
steps of warmup and waits while the others are measured; a round is one step of each. Shows tokens/s as
medians (min-max) and the ratio of the medians, LoRA's over the side's.

Rows: LoRA on packed rows of conversations, against the same examples in padded rows, one in each: padded to
the length of packed rows, or to the longest of the batch, in multiples of 64. A padded batch has as many
examples as a packed one has on average. A round is one step of each, on its next batch; shows trained tokens
(those with a weight in the loss) per second. It is skipped if there is no file of rows.

Writes results/finetune.json. Needs pip install -e '.[parity]' peft.
"""

import os
import pathlib

from train_vs_transformers import model_sizes, seconds_of
from workers import Worker

ALPACA = pathlib.Path(__file__).parents[2] / "shared/data/sft/instructions/instruction-data.json"
LORA, QLORA = "LoRA", "QLoRA"
IMPLEMENTATIONS = ("grouped_mm", "eager")
PACKED, PADDED, LONGEST = "packed", "padded", "padded to the longest"
RANK, EXPERT_RANK, ALPHA = 8, 2, 16.0
MULTIPLE = 64  # of the lengths of rows that are padded to the longest


# Runs in the workers. The torch side does not import jax.


def lora_model(expert_format: str, experts: int, top_k: int, layers: int):
    """Returns the `ModelConfig` of the small model with adapters."""
    from common import small_model

    from gptoss_jax.config import LoraConfig

    lora = LoraConfig(rank=RANK, expert_rank=EXPERT_RANK, alpha=ALPHA)
    return small_model(**model_sizes(experts, top_k, layers), expert_format=expert_format, lora=lora)


def ours(expert_format: str, rows: int, length: int, **sizes: int) -> dict:
    from common import Training

    from gptoss_jax.model.lora import adapter_counts

    model = lora_model(expert_format, **sizes)
    training = Training(model, rows, length)
    for _ in range(2):
        training.step()
    return {
        "step": lambda: seconds_of(training.step),
        "adapters": lambda: sum(adapter_counts(model).values()),
        "compile": lambda: training.compile_seconds,
    }


def peft(implementation: str, warmup: int, rows: int, length: int, **sizes: int) -> dict:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = GptOssConfig(
        **model_sizes(**sizes),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        experts_implementation=implementation,
    )
    of_experts = {f"mlp.experts.{name}": EXPERT_RANK for name in ("gate_up_proj", "down_proj")}
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[*of_experts],
        rank_pattern=of_experts,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(GptOssForCausalLM(config).float(), lora).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.as_tensor(np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1)))

    def step():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    for _ in range(warmup):
        step()
    return {
        "step": lambda: seconds_of(step),
        "adapters": lambda: sum(parameter.numel() for parameter in adapters),
    }


def padded_batch(cache, documents, length: int | None) -> dict:
    """Returns the arrays of a batch with one example per row; None pads to the longest of them."""
    import numpy as np

    from gptoss_jax.data.batches import BATCH_FIELDS

    pairs = [int(cache.offsets[i + 1] - cache.offsets[i]) - 1 for i in documents]
    length = length or -(-max(pairs) // MULTIPLE) * MULTIPLE
    batch = {name: np.zeros((len(pairs), length), dtype) for name, dtype in BATCH_FIELDS.items()}
    for row, (document, count) in enumerate(zip(documents, pairs, strict=True)):
        start = cache.offsets[document]
        batch["tokens"][row, :count] = cache.tokens[start : start + count]
        batch["targets"][row, :count] = cache.tokens[start + 1 : start + 1 + count]
        batch["loss_weights"][row, :count] = cache.weights[start + 1 : start + 1 + count]
        batch["segment_ids"][row, :count] = 1
        batch["positions"][row, :count] = np.arange(count)
    return batch


def batches_of(data: str, folder: str, rows: int, length: int, rounds: int) -> dict[str, list[dict]]:
    """Returns `rounds` batches of the training rows of a file for each kind of row."""
    import numpy as np

    from gptoss_jax.config import DataConfig
    from gptoss_jax.data.batches import PackedRows, packed_lengths
    from gptoss_jax.data.token_cache import build_cache

    config = DataConfig(source=f"chat:{data}", seq_len=length, cache_dir=folder)
    cache, rng = build_cache(config), np.random.default_rng(0)
    packed = PackedRows(cache, held_out=False, seq_len=length)
    documents = np.flatnonzero(~cache.held_out & (packed_lengths(cache, length, "skip") > 0))
    examples = round(rows * len(documents) / len(packed))

    def drawn(count: int, size: int):
        """`rounds` draws of `size` numbers below `count`, in shuffled epochs."""
        epochs = [rng.permutation(count) for _ in range(-(-rounds * size // count))]
        return np.concatenate(epochs)[: rounds * size].reshape(rounds, size)

    some_rows = ([packed[int(i)] for i in some] for some in drawn(len(packed), rows))
    of_batches = [documents[some] for some in drawn(len(documents), examples)]
    return {
        PACKED: [{name: np.stack([row[name] for row in some]) for name in some[0]} for some in some_rows],
        PADDED: [padded_batch(cache, some, length) for some in of_batches],
        LONGEST: [padded_batch(cache, some, None) for some in of_batches],
    }


def of_rows(data: str, folder: str, rows: int, length: int, rounds: int, **sizes: int) -> dict:
    """Each command takes a step on the next batch of a kind of row; `batches` describes them."""
    import numpy as np
    from common import Training

    batches = batches_of(data, folder, rows, length, rounds)
    training = Training(lora_model("plain", **sizes), rows, length)
    for batch in (batch for some in batches.values() for batch in some):
        training.compile(batch)
    for some in batches.values():
        training.step(some[0])

    def description(some):
        return [
            {
                "shape": list(batch["tokens"].shape),
                "tokens": int(np.sum(batch["segment_ids"] > 0)),
                "trained": int(np.sum(batch["loss_weights"] > 0)),
            }
            for batch in some
        ]

    def step(following):
        batch = next(following)
        return seconds_of(lambda: training.step(batch))

    steps = {name: iter(some) for name, some in batches.items()}
    commands = {name: lambda following=following: step(following) for name, following in steps.items()}
    return commands | {"batches": lambda: {name: description(some) for name, some in batches.items()}}


# Runs in the parent.


def alternated(workers: dict[str, tuple[Worker, str]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of a command of each worker, by name, one for each round."""
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, (worker, command) in workers.items():
            seconds[name].append(worker.ask(command))
    return seconds


def measure_steps(settings: dict, rounds: int, peers: list[str]) -> tuple[dict, list[tuple]]:
    """Returns the result of the steps, and the rows of its table."""
    from common import show, spread

    def start(name, warmup):
        return Worker("finetune", "peft", settings | {"implementation": name, "warmup": warmup})

    pilot = {}
    for name in peers if len(peers) > 1 else ():
        worker = start(name, warmup=1)
        pilot[name] = worker.ask("step")
        worker.close()
    workers = {
        LORA: Worker("finetune", "ours", settings | {"expert_format": "plain"}),
        QLORA: Worker("finetune", "ours", settings | {"expert_format": "mxfp4"}),
    }
    if peers:
        peer = min(peers, key=pilot.get) if pilot else peers[0]
        workers[f"PEFT, {peer}"] = start(peer, warmup=2)
        counts = {name: worker.ask("adapters") for name, worker in workers.items()}
        assert len({*counts.values()}) == 1, f"not the same number of parameters to train: {counts}"
    seconds = alternated({name: (worker, "step") for name, worker in workers.items()}, rounds)
    compiling = {name: workers[name].ask("compile") for name in (LORA, QLORA)}
    for worker in workers.values():
        worker.close()
    tokens = settings["rows"] * settings["length"]
    speeds = {name: spread([tokens / one for one in some]) for name, some in seconds.items()}
    ratios = {name: speeds[LORA]["median"] / speed["median"] for name, speed in speeds.items()}
    table = [
        (
            name,
            show(speed, 0),
            f"{ratios[name]:.2f}",
            f"{compiling[name]:.1f} s" if name in compiling else None,
        )
        for name, speed in speeds.items()
    ]
    result = {"pilot": pilot, "seconds": seconds, "compile_seconds": compiling}
    return result | {"tokens_per_second": speeds, "ratios": ratios}, table


def measure_rows(settings: dict, rounds: int, data: str) -> tuple[dict, list[tuple]]:
    """Returns the result of the kinds of rows, and the rows of its table."""
    import tempfile

    from common import percent, show, spread

    with tempfile.TemporaryDirectory() as folder:
        more = {"data": data, "folder": folder, "rounds": rounds}
        worker = Worker("finetune", "of_rows", settings | more)
    kinds = (PACKED, PADDED, LONGEST)
    seconds = alternated({name: (worker, name) for name in kinds}, rounds)
    batches = worker.ask("batches")
    worker.close()
    result, table = {"file": pathlib.Path(data).name, "batches": batches, "seconds": seconds}, []
    result |= {"trained_tokens_per_second": {}, "filled": {}, "ratios": {}}
    for name in kinds:
        rates = [batch["trained"] / one for batch, one in zip(batches[name], seconds[name], strict=True)]
        speed = result["trained_tokens_per_second"][name] = spread(rates)
        positions = sum(batch["shape"][0] * batch["shape"][1] for batch in batches[name])
        result["filled"][name] = sum(batch["tokens"] for batch in batches[name]) / positions
        result["ratios"][name] = result["trained_tokens_per_second"][PACKED]["median"] / speed["median"]
        table.append((name, show(speed, 0), f"{result['ratios'][name]:.2f}", percent(result["filled"][name])))
    return result, table


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=7)
    names, allowed = " ".join(IMPLEMENTATIONS), "experts of the peer; with both, a pilot chooses"
    parser.add_argument("--peers", nargs="*", default=IMPLEMENTATIONS, help=f"{allowed} (default: {names})")
    parser.add_argument("--data", default=str(ALPACA), help="chat rows to pack (default: %(default)s)")
    parser.add_argument("--only", choices=("steps", "rows"), help="measure only these; writes no file")
    return parser


def main() -> None:
    # The parent only describes the hardware; the workers measure.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import print_table, versions, write_json

    options = make_parser().parse_args()
    quick = options.quick
    settings = {"experts": 32, "top_k": 4, "layers": 6, "rows": 4, "length": 512}
    if quick:
        settings = {"experts": 8, "top_k": 4, "layers": 2, "rows": 2, "length": 256}
    rounds = min(options.rounds, 2) if quick else options.rounds
    record = {"versions": versions("torch", "transformers", "peft"), "rounds": rounds, "settings": settings}
    title = f"{settings['experts']} experts top-{settings['top_k']}, {rounds} rounds"
    if options.only != "rows":
        record["steps"], table = measure_steps(settings, rounds, options.peers)
        columns = ("step", "tokens/s", "LoRA / this", "compile time")
        print_table(f"{title}, {settings['rows']} x {settings['length']} tokens", columns, table)
    if options.only != "steps" and not pathlib.Path(options.data).is_file():
        print(f"rows: skipped, because there is no {options.data}")
    elif options.only != "steps":
        record["rows"], table = measure_rows(settings, rounds, options.data)
        columns = ("rows", "trained tokens/s", "packed / this", "filled")
        print_table(f"{title}, rows of {pathlib.Path(options.data).name}", columns, table)
    if not quick and options.only is None:
        print(write_json("finetune", record))


if __name__ == "__main__":
    main()
