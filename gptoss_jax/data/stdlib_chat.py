"""Questions and answers about Python's standard library, generated from its docstrings and signatures."""

import ast
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

# Maximum number of characters of an answer from a docstring, and of a signature.
MAX_SUMMARY, MAX_SIGNATURE = 240, 120
MIN_SUMMARY = 16
ABOUT = (
    "What does `{name}` do?",
    "Explain `{name}` in Python.",
    "What is `{name}` for?",
    "Describe `{name}` briefly.",
)
MODULES = ("What is the Python module `{name}` for?", "What does the module `{name}` contain?")
SIGNATURES = (
    "What is the signature of `{name}`?",
    "How is `{name}` called?",
    "Which arguments does `{name}` take?",
)


def question_rows(root: pathlib.Path, paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields {"question", "answer"} for the docstring (first sentence) and signature of each public name.

    Args:
      root: the folder of the library.
      paths: its files, relative to the folder. Private modules and files that do not parse are skipped.
    """
    seen = set()
    for path in paths:
        parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
        if any(part.startswith("_") for part in parts):
            continue
        try:
            tree = ast.parse((root / path).read_bytes())
        except (SyntaxError, ValueError):
            continue
        for row in _rows_of(tree, ".".join(parts)):
            if row["question"] not in seen:
                seen.add(row["question"])
                yield row


def preference_rows(root: pathlib.Path, paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields {"prompt", "chosen", "rejected"}: a question, its answer, and the answer to another question of
    the same kind (about a purpose, or about a signature)."""
    kinds: dict[bool, list[dict[str, str]]] = {}
    for row in question_rows(root, paths):
        kinds.setdefault(row["answer"].startswith("`"), []).append(row)
    for rows in kinds.values():
        for index, row in enumerate(rows):
            # Any other row, selected by the question.
            step = 1 + zlib.crc32(row["question"].encode()) % max(len(rows) - 1, 1)
            other = rows[(index + step) % len(rows)]
            yield {"prompt": row["question"], "chosen": row["answer"], "rejected": other["answer"]}


def prompt_rows(root: pathlib.Path, paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields {"prompt"}: a question about a purpose, to be answered in five words."""
    for row in question_rows(root, paths):
        if not row["answer"].startswith("`"):
            yield {"prompt": f"In five words: {row['question']}"}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _rows_of(node: Documented, name: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a module, class or function, and of its members."""
    about = _summary(ast.get_docstring(node) or "")
    if about:
        yield _row(MODULES if isinstance(node, ast.Module) else ABOUT, name, about)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        signature = f"{keyword} {node.name}({ast.unparse(node.args)})"
        if about and len(signature) <= MAX_SIGNATURE:
            yield _row(SIGNATURES, name, f"`{signature}`")
        return
    for child in node.body:
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(child, kinds) and not child.name.startswith("_"):
            yield from _rows_of(child, f"{name}.{child.name}")


def _summary(docstring: str) -> str | None:
    """Returns the first sentence of a docstring; None if there is none of a usable length."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]
    is_prose = " " in sentence and not re.search(r"->|>>>|::|^[\w.]+\(", sentence)
    if not is_prose or not MIN_SUMMARY <= len(sentence) <= MAX_SUMMARY:
        return None
    sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence[-1] in ".!?" else sentence.rstrip(":;,") + "."


def _row(questions: tuple[str, ...], name: str, answer: str) -> dict[str, str]:
    """Returns a row with one of the phrasings of a question, selected by the name."""
    form = questions[zlib.crc32(name.encode()) % len(questions)]
    return {"question": form.format(name=name), "answer": answer}
