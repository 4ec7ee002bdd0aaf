"""Reward functions: numbers for the answers that a model samples.

A function of the user's takes the prompt, the answer and the row of the dataset:

    def reward(prompt: str, answer: Answer, row: dict) -> float

`grpo.rewards` names it as FILE.py:FUNCTION, or only FILE.py if it is called `reward`.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import numbers
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, Self

from gptoss_jax.config import GrpoConfig, require
from gptoss_jax.config.base import listed, one_line, type_name
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.harmony import AnswerReader, Harmony
from gptoss_jax.data.prompt_rows import ANSWERS, expected_answer

Function = Callable[[str, "Answer", dict[str, Any]], Any]
BUILT_IN = "exact, format, regex:PATTERN"
MAX_REWARD = 1e30  # whose square is finite in the statistics of a group


class Answer(str):
    """The final answer to a prompt, which is empty if the model wrote none.

    Attributes:
      thinking: the model's reasoning.
      text: everything that it wrote, with the names of special tokens.
      num_tokens: the number of tokens of `text`.
      is_complete: True if the model ended the answer; False if it reached the maximum length.
      is_well_formed: True if it is complete and consists of reasoning, if any, and one final answer.
    """

    thinking: str
    text: str
    num_tokens: int
    is_complete: bool
    is_well_formed: bool

    @classmethod
    def of(cls, harmony: Harmony, tokens: Sequence[int]) -> Self:
        """Returns the answer that sampled tokens, with the stop token if any, spell."""
        reader = AnswerReader(harmony)
        is_complete = bool(tokens) and tokens[-1] in harmony.stop_tokens
        reader.feed(tokens[:-1] if is_complete else tokens)
        reader.close()
        answer = cls("".join(part.text for part in reader.parts if part.channel == "final"))
        answer.thinking = "".join(part.text for part in reader.parts if part.channel == "analysis")
        answer.text, answer.num_tokens = harmony.spelled_text(tokens), len(tokens)
        answer.is_complete = is_complete
        channels = [part.channel for part in reader.parts]
        is_last = bool(tokens) and tokens[-1] == harmony.return_id
        kinds = (["final"], ["analysis", "final"])
        answer.is_well_formed = is_last and bool(answer.strip()) and channels in kinds
        return answer


class RewardError(ValueError):
    """A reward that cannot be used: the function raised, or did not return a finite number."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function, its name in metrics and messages, and its weight."""

    name: str
    function: Function
    weight: float = 1.0

    def __call__(self, prompt: str, answer: Answer, row: dict[str, Any]) -> float:
        """Returns the reward, without its weight. Raises RewardError, in one line, if it cannot be used."""
        try:
            value = self.function(prompt, answer, row)
            value = value.item() if getattr(value, "ndim", None) == 0 else value
            number = float(value) if isinstance(value, numbers.Real) else None
            shown = _shown(value)
        except (Exception, SystemExit) as error:
            frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
            place = f" at {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            raise RewardError(f"raised {type(error).__name__}{place}: {_cut(one_line(error))}") from None
        if number is None:
            raise RewardError(f"returned {shown}, {type_name(value)}: must be a number")
        if not abs(number) <= MAX_REWARD:
            raise RewardError(f"returned {number}: must be finite, and at most {MAX_REWARD:g}")
        return number


def _shown(value: Any) -> str:
    return _cut(repr(value), 60)


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def load_rewards(config: GrpoConfig) -> list[Reward]:
    """Returns the reward functions that a config names.

    Raises ValueError for an unknown name, a pattern that is not valid, and a file that cannot be run or does
    not have the function.
    """
    found: list[Reward] = []
    modules: dict[pathlib.Path, types.ModuleType] = {}
    for spec, weight in zip(config.rewards, config.weights, strict=True):
        name, function = _find(spec, modules)
        # Functions of two files may have the same name.
        same = sum(re.fullmatch(rf"{re.escape(name)}(_\d+)?", one.name) is not None for one in found)
        found.append(Reward(f"{name}_{same + 1}" if same else name, function, weight))
    return found


def _file_of(spec: str) -> tuple[pathlib.Path | None, str]:
    """Returns the file that an item of `grpo.rewards` names and the function in it; None for a built-in
    one."""
    name, _, function = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "reward")
    is_file = name.endswith(".py") and not spec.startswith("regex:")
    return (user_path(name, "grpo.rewards"), function) if is_file else (None, spec)


def _find(spec: str, modules: dict[pathlib.Path, types.ModuleType]) -> tuple[str, Function]:
    """Returns the name and the function of an item of `grpo.rewards`; adds a file that it runs to
    `modules`."""
    if spec in ("exact", "format"):
        return spec, _exact if spec == "exact" else _format
    kind, _, rest = spec.partition(":")
    if kind == "regex":
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ValueError(f"grpo.rewards is {spec!r}: not a regular expression: {error}") from None
        require(rest != "", "grpo.rewards", spec, "must be regex:PATTERN")
        return kind, lambda prompt, answer, row: float(pattern.search(answer) is not None)
    path, function = _file_of(spec)
    require(path is not None, "grpo.rewards", spec, f"must be {BUILT_IN} or FILE.py:FUNCTION")
    assert path is not None, spec
    require(path.is_file(), "grpo.rewards", spec, "no such file")
    try:
        found = vars(modules.get(path) or modules.setdefault(path, _import(path)))
    except (Exception, SystemExit) as error:
        reason = f"{path.name}: {type(error).__name__}: {_cut(one_line(error))}"
        raise ValueError(f"grpo.rewards is {spec!r}: {reason}") from None
    functions = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
    allowed = f"{path.name} has no function {function}; it has {listed(functions) or 'none'}"
    require(callable(found.get(function)), "grpo.rewards", spec, allowed)
    try:
        inspect.signature(found[function]).bind("", "", {})
    except TypeError as error:
        takes = f"{function} must take (prompt, answer, row): {one_line(error)}"
        raise ValueError(f"grpo.rewards is {spec!r}: {takes}") from None
    except ValueError:  # no signature, as of some functions in C
        pass
    return function if function != "reward" else path.stem, found[function]


def _import(path: pathlib.Path) -> types.ModuleType:
    """Runs a file as a module, which may import others beside it; files in other folders do not see these."""
    folder, before = path.absolute().parent, {*sys.modules}
    name = f"gptoss_rewards_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for other in {*sys.modules} - before - {name}:
            # Not packages of an environment below the folder, of which there must not be two copies.
            top = other.partition(".")[0]
            if (folder / f"{top}.py").exists() or (folder / top / "__init__.py").exists():
                del sys.modules[other]
    return module


def digest(config: GrpoConfig) -> str:
    """Identifies the reward functions: by their names, weights, and the contents of their files."""
    found = hashlib.sha256(repr(config.weights).encode())
    for spec in config.rewards:
        path, function = _file_of(spec)
        found.update(path.read_bytes() if path is not None else b"")
        found.update(f"\n{function}\n".encode())
    return found.hexdigest()


def _exact(prompt: str, answer: Answer, row: dict[str, Any]) -> float:
    """1 for a complete answer that equals the row's, apart from spaces around it."""
    expected = expected_answer(row)
    if expected is None:
        fields = ", ".join(ANSWERS)
        raise ValueError(f"the row has no answer: must have text or a number in {fields}, or messages")
    return float(answer.is_complete and answer.strip() == expected)


def _format(prompt: str, answer: Answer, row: dict[str, Any]) -> float:
    """1 for a well-formed answer."""
    return float(answer.is_well_formed)
