"""A small source of text."""

from gptoss_jax.config import DataConfig


def write_stories(folder, count=60):
    folder.mkdir(exist_ok=True)
    stories = [f"Story {i}: " + f"caf\u00e9 number {i * i}.\n" * (i % 17) for i in range(count)]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    return f"text:{folder}/*.txt"


def stories_config(folder):
    return DataConfig(
        write_stories(folder / "text"),
        "bytes",
        seq_len=48,
        batch_size=8,
        val_fraction=0.1,
        cache_dir=str(folder / "cache"),
    )
