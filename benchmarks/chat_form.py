"""How well a fine-tuned model keeps the chat format: python benchmarks/chat_form.py runs/quickstart-sft.

Answers held-out conversations of a run's data greedily and counts the answers that are one final message with
text and end by themselves. Prints the counts and some answers.
"""

import argparse
import json
import pathlib

import numpy as np

from gptoss_jax import SamplingParams, generate
from gptoss_jax.checkpoints.load import load_model
from gptoss_jax.config import TrainConfig
from gptoss_jax.data.harmony import AnswerReader, Harmony
from gptoss_jax.data.token_cache import build_cache

SHOWN = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run of train.py on chat data")
    parser.add_argument("--rows", type=int, default=100, help="held-out conversations (default: 100)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: 200)")
    options = parser.parse_args()
    config = TrainConfig.load(pathlib.Path(options.run) / "config.json")
    model, tokenizer = load_model(options.run)
    cache, harmony = build_cache(config.data), Harmony(tokenizer)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(cache.held_out))[: options.rows]
    prompts = [
        harmony.prompt_of_last_turn(cache.tokens[start:end].tolist())
        for start, end in ((cache.offsets[i], cache.offsets[i + 1]) for i in chosen)
    ]
    settings = SamplingParams(max_new_tokens=options.max_new_tokens, stop_tokens=(harmony.return_id,))
    answers, counts = [], {"answers": 0, "one final message": 0, "ended": 0, "both": 0}
    for start in range(0, len(prompts), 10):
        answers += generate(model, [prompt for prompt, _ in prompts[start : start + 10]], settings)
    for (_, question), answer in zip(prompts, answers, strict=True):
        reader = AnswerReader(harmony)
        reader.feed(answer.tokens)
        reader.close()
        is_final = [part.channel for part in reader.parts] == ["final"] and bool(reader.parts[0].text.strip())
        is_ended = answer.finish_reason == "stop"
        counts["answers"] += 1
        counts["one final message"] += is_final
        counts["ended"] += is_ended
        counts["both"] += is_final and is_ended
        if counts["answers"] <= SHOWN:
            print(harmony.spelled_text(question), harmony.spelled_text(answer.tokens), sep="\n", end="\n\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
