"""Statistics of tokenized conversations: trained tokens, and omitted rows by reason."""

from typing import Any

import numpy as np

from gptoss_jax.config import DataConfig
from gptoss_jax.data.batches import packed_lengths
from gptoss_jax.data.chat_cache import SKIPPED_FILE
from gptoss_jax.data.token_cache import TokenCache

QUANTILES = (0, 0.25, 0.5, 0.75, 0.95, 1)


def statistics(cache: TokenCache, config: DataConfig) -> dict[str, Any]:
    """Returns the JSON-serializable statistics of a cache of conversations.

    `overlong` is the number of examples that need more than `data.seq_len` positions, `left_out` how many of
    these are omitted (a pair of answers counts as two examples), and `left_out_calls` the number of calls
    after the first one of a message without results.
    """
    lengths, meta = np.diff(cache.offsets), cache.meta["chat"]
    packed = packed_lengths(cache, config.seq_len, config.overlong)
    needed = lengths - 1
    if cache.is_pairs:
        # Both answers of a pair must fit in one row.
        needed = np.repeat(needed.reshape(-1, 2).sum(axis=1), 2)
    quantiles = np.quantile(lengths, QUANTILES, method="nearest")
    return {
        "rows": meta["rows"],
        "formats": meta["formats"],
        "skipped": meta["skipped"],
        "examples": len(lengths),
        "held_out_examples": int(cache.held_out.sum()),
        "tokens": int(lengths.sum()),
        "trained_tokens": meta["trained_tokens"],
        "trained_share": round(meta["trained_tokens"] / int(lengths.sum()), 4),
        "lengths": {f"{quantile:g}": int(n) for quantile, n in zip(QUANTILES, quantiles, strict=True)},
        "overlong": int((needed > config.seq_len).sum()),
        "left_out": int((packed == 0).sum()),
        "without_thinking": len(lengths) - meta["with_thinking"],
        "left_out_calls": meta["left_out_calls"],
    }


def summary(cache: TokenCache, config: DataConfig) -> list[str]:
    """Returns a summary of the statistics for the console, as lines."""
    found, meta = statistics(cache, config), cache.meta["chat"]
    formats = ", ".join(f"{count:,} with {name}" for name, count in found["formats"].items())
    share = f"{found['trained_tokens']:,} of them trained on ({found['trained_share']:.1%})"
    unit, size = ("pairs of answers", 2) if cache.is_pairs else ("examples (answered turns)", 1)
    if cache.is_prompts:
        unit, share = "prompts", f"the longest has {found['lengths']['1']:,}"
    lines = [
        f"rows: {sum(found['formats'].values()):,} of {found['rows']:,} used: {formats}",
        f"{unit}: {found['examples'] // size:,}, {found['held_out_examples'] // size:,} of them held out; "
        f"{found['tokens']:,} tokens, {share}",
    ]
    if found["skipped"]:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found["skipped"].items())
        total = sum(found["skipped"].values())
        lines.append(f"skipped rows: {total:,} ({kinds}), all in {cache.folder / SKIPPED_FILE}")
        lines += [f"  {line}" for line in meta["first_skipped"]]
        more = total - len(meta["first_skipped"])
        lines += [f"  and {more:,} more"] if more else []
    if found["overlong"] and not cache.is_prompts:
        left_out, cut = found["left_out"], found["overlong"] - found["left_out"]
        done = f"{left_out:,} left out; --data.overlong cut truncates them instead"
        if config.overlong == "cut":
            done = f"{cut:,} truncated"
            done += f", {left_out:,} left out: no trained token is left" if left_out else ""
        what = "pairs" if cache.is_pairs else "examples"
        if cache.is_pairs:
            done = f"{left_out // size:,} left out"
        lines.append(
            f"{what} longer than data.seq_len ({config.seq_len:,}): {found['overlong'] // size:,}, {done}"
        )
    if found["left_out_calls"]:
        lines.append(
            f"calls left out: {found['left_out_calls']:,}, after the first one of a message without results"
        )
    if found["without_thinking"] == found["examples"] and not cache.is_prompts:
        lines.append(
            "no example has reasoning: the model learns to answer immediately, although its system message "
            f"says `Reasoning: {config.reasoning_effort}` (data.reasoning_effort)"
        )
    return lines
