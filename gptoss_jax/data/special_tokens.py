"""Special tokens of Hugging Face tokenizers: bos and eos, tokens that are never text, ids that end an answer.

A tokenizer.json does not identify bos and eos. They are chosen by the user, named in the files next to it, or
have well-known names.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import tokenizers

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, read_json
from gptoss_jax.config.paths import path_exists, user_path, user_text

END_OF_TEXT = "<|endoftext|>"
# Ends of a turn and of a tool call in gpt-oss's chat format; END_OF_TEXT ends a document.
RETURN, CALL = "<|return|>", "<|call|>"
END_OF_MESSAGE = "<|end|>"
# All special tokens of that format, Harmony, in the order of gpt-oss's ids.
HARMONY_TOKENS = (RETURN, "<|constrain|>", "<|channel|>", "<|start|>", END_OF_MESSAGE, "<|message|>", CALL)
BOS_NAMES = (
    "<|startoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "[BOS]",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
EOS_NAMES = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|im_end|>",
)  # fmt: skip
# End-of-turn tokens, which may be the eos of a chat model. If it also has one of DOCUMENT_ENDS, that is our
# eos.
TURN_ENDS = (RETURN, "<|im_end|>", "<|eot_id|>", "<|eot|>")
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>")
# Pattern of added tokens that are special even if they are not marked as such.
MARKER = re.compile(r"<[|\uff5c].+[|\uff5c]>")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
ROLE_KEYS = ("bos_token", "eos_token")
ID_KEYS = ("bos_token_id", "eos_token_id")
MODEL_SETTINGS = ("generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class Roles:
    """Names of the tokens that begin and end a document; None if unknown."""

    bos: str | None = None
    eos: str | None = None


@dataclasses.dataclass(frozen=True)
class NamedTokens:
    """Special tokens in the files next to a tokenizer.json."""

    roles: Roles = Roles()
    without_bos: bool = False  # the files declare that there is no bos
    special: frozenset[str] = frozenset()
    # bos_token_id and eos_token_id, of the model
    ids: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


NO_ROLES, NOTHING_NAMED = Roles(), NamedTokens()
SAVED_SPEC = "file:tokenizer.json"


def parse_file_spec(spec: str) -> tuple[pathlib.Path, Roles]:
    """Parses file:PATH#bos=NAME,eos=NAME; one name may be omitted. An existing file with the whole name wins.

    Raises ValueError for anything else after the # of a path.
    """
    rest = spec.removeprefix("file:")
    match = re.fullmatch(r"(.+)#((?:bos|eos)=.*)", rest, re.DOTALL)
    path, named = match.groups() if match else rest.partition("#")[::2]
    if path_exists(rest, "data.tokenizer") or not (match or path_exists(path, "data.tokenizer")):
        return user_path(rest, "data.tokenizer"), NO_ROLES
    return user_path(path, "data.tokenizer"), _parse_roles(named, spec)


def _parse_roles(text: str, spec: str) -> Roles:
    """Parses bos=NAME,eos=NAME of a spec. The names need not be valid paths."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=(?:bos|eos)=)", text)]
    roles = {role: user_text(name) for role, _, name in pairs}
    fits = len(roles) == len(pairs) and roles.keys() <= {"bos", "eos"} and all(roles.values())
    allowed = "must be file:PATH, or file:PATH#bos=NAME,eos=NAME with one of the two or both"
    require(fits, "data.tokenizer", spec, allowed)
    return Roles(**roles)


def saved_spec(roles: Roles) -> str:
    """Returns the spec that is stored next to a tokenizer.json with these roles."""
    return f"{SAVED_SPEC}#bos={roles.bos},eos={roles.eos}\n"


def parse_saved_spec(spec: str) -> Roles:
    """Parses the output of `saved_spec`, without accessing paths. Raises ValueError for anything else."""
    named = spec.removeprefix(SAVED_SPEC).removesuffix("\n")
    return _parse_roles(named.removeprefix("#"), spec) if named else NO_ROLES


def read_named_tokens(folder: pathlib.Path) -> NamedTokens:
    """Reads tokenizer_config.json, then special_tokens_map.json, and the ids in the model's config files.

    Raises ValueError for a corrupt file, and for a bos_token or eos_token that is neither text nor null.
    Other keys, such as num_image_token, may have values of any type.
    """
    found: dict[str, str | None] = {}
    special: list[Any] = []
    for path in (folder / name for name in SETTINGS):
        values = read_json(path) if path.is_file() else {}
        for key, token in values.items():
            if key in ROLE_KEYS and not isinstance(_content(token), str | None):
                raise ValueError(f"{path}: {key} is {token!r}: must be the text of a token, or null")
            if key in ROLE_KEYS:
                found[key] = found.get(key) or _content(token) or None
            if key.endswith("_token") and not key.startswith("add_"):
                special.append(token)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            special += _items(values.get(key))
        added = _items(values.get("added_tokens_decoder"))
        special += [token for token in added if isinstance(token, dict) and token.get("special")]
    names = {name for name in map(_content, special) if isinstance(name, str) and name}
    roles = Roles(found.get("bos_token"), found.get("eos_token"))
    ids = {key: tokens for key in ID_KEYS if (tokens := _token_ids(folder, key))}
    return NamedTokens(roles, "bos_token" in found and roles.bos is None, frozenset(names), ids)


def _items(values: Any) -> list:
    """Returns the values of a list or an object, and an empty list for anything else."""
    return list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else []


def _content(token: Any) -> Any:
    """Returns the text of a token, which may be a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _token_ids(folder: pathlib.Path, key: str) -> tuple[int, ...]:
    """Returns the ids under a key of generation_config.json or, if it is missing, of config.json."""
    # For `original/`, the files are in the parent folder.
    folders = [folder, folder.parent] if folder.name == "original" else [folder]
    for path in (place / name for name in MODEL_SETTINGS for place in folders):
        value = read_json(path).get(key) if path.is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            are_ids = all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
            require(are_ids, f"{path}: {key}", value, "must be a token id, or a list of them")
            return tuple(ids)
    return ()


def read_stop_ids(folder: pathlib.Path, vocab_size: int = 0) -> tuple[int, ...]:
    """Returns the ids that end an answer: eos_token_id in generation_config.json, otherwise in config.json.

    Args:
      folder: the model's folder.
      vocab_size: vocabulary size of the tokenizer. The model's may be larger; ids outside both are omitted.

    Raises ValueError for a corrupt file and for values that are not token ids.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    model = config.get("model")
    sizes = (config.get("vocab_size"), model.get("vocab_size") if isinstance(model, dict) else None)
    limit = max(vocab_size, *(size for size in sizes if isinstance(size, int)), 0)
    return tuple(token for token in _token_ids(folder, "eos_token_id") if 0 <= token < limit)


def find_roles(model: tokenizers.Tokenizer, chosen: Roles, named: NamedTokens) -> Roles:
    """Returns the bos and the eos of a tokenizer.json.

    In order of precedence: chosen by the user, named in the files next to it, well-known names, ids in the
    model's config files. A single token has both roles. Both are None if there is none.
    """
    added = model.get_added_tokens_decoder()
    names = {token.content for token in added.values()}
    marked = {token.content for token in added.values() if token.special}

    def first(candidates: Iterable[str | None]) -> str | None:
        """Returns the first special token, otherwise the first added token, otherwise the first token."""
        known = [name for name in candidates if name and model.token_to_id(name) is not None]
        return next((name for group in (marked, names, known) for name in known if name in group), None)

    named_eos = first([named.roles.eos])
    eos = chosen.eos or (named_eos and document_end(named_eos, names)) or first(EOS_NAMES)
    bos = chosen.bos or first([named.roles.bos]) or (None if named.without_bos else first(BOS_NAMES))
    if bos is None and eos is None:
        found = ([added[i].content for i in named.ids.get(key, ()) if i in added] for key in ID_KEYS)
        bos, eos = (next(iter(names), None) for names in found)
    return Roles(bos or eos, eos or bos)


def document_end(eos: str, names: Collection[str]) -> str:
    """Returns the end-of-document token of a vocabulary with these special tokens and this declared eos."""
    if eos not in TURN_ENDS:
        return eos
    return next((name for name in DOCUMENT_ENDS if name in names), eos)


def special_names(model: tokenizers.Tokenizer, roles: Roles, named: NamedTokens) -> set[str]:
    """Returns the tokens that are never text: declared special, bos and eos, or named like a marker.

    Other added tokens, such as runs of spaces, are text, as are tokens of one character.
    """
    added = model.get_added_tokens_decoder().values()
    found = {token.content for token in added if token.special or MARKER.fullmatch(token.content)}
    found |= {name for name in named.special if model.token_to_id(name) is not None}
    return {name for name in found | {*filter(None, (roles.bos, roles.eos))} if len(name) > 1}


def check_roles(spec: str, origin: str, model: tokenizers.Tokenizer, roles: Roles) -> tuple[str, str]:
    """Returns bos and eos. Raises ValueError if one is missing, is not a token, or is a character of text."""
    added = sorted(model.get_added_tokens_decoder().values(), key=lambda token: not token.special)
    candidates = f"its special tokens: {listed((token.content for token in added), 12) or 'none'}"
    if roles.bos is None or roles.eos is None:
        raise ValueError(
            f"data.tokenizer is {spec!r}: no token of {origin} is known to begin or end a document. Name one "
            "or both with file:PATH#bos=NAME,eos=NAME, or as bos_token and eos_token in "
            f"tokenizer_config.json beside it; {candidates}"
        )
    for name in (roles.bos, roles.eos):
        known = model.token_to_id(name) is not None
        require(known, "data.tokenizer", spec, f"{origin} has no token {name!r}; {candidates}")
        allowed = f"text needs {name!r}, so it cannot begin or end a document; {candidates}"
        require(len(name) > 1, "data.tokenizer", spec, allowed)
    return roles.bos, roles.eos
