"""Finds the files of a folder that hold a model's weights, as transformers does, and names other contents."""

import json
import os
import pathlib
import posixpath
import warnings

from gptoss_jax.config.base import listed, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
# Weights of an adapter: those of PEFT, and of MLX.
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
# Weights in formats that are not read.
OTHER_FORMATS = {
    "pytorch_model*.bin": "PyTorch's pickle format",
    "consolidated*.pth": "PyTorch's pickle format",
    "*.ckpt": "PyTorch's pickle format",
    "*.distcp": "PyTorch's distributed checkpoint format",
    "*.gguf": "llama.cpp's GGUF format",
    "flax_model*.msgpack": "Flax's msgpack format",
    "tf_model*.h5": "TensorFlow's format",
}


def find_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """Returns the files that hold the weights of a folder, and the index (tensor name -> file name), if any.

    The order is that of transformers: the file or index that `transformers_weights` of config.json names,
    model.safetensors, model.safetensors.index.json. Without these, every other .safetensors file is read.
    Warns of files with weights that are not read, by name.

    Raises ValueError, naming the file, for one that is missing or an index that is none, and for a folder
    that holds something else than a model's weights in .safetensors files.
    """
    here = {path.name for path in folder.glob("*.safetensors")} - {*ADAPTERS}
    start = _named(folder) or (SINGLE if (folder / SINGLE).is_file() else INDEX)
    homes = None
    if start.endswith(".index.json") and (folder / start).is_file():
        homes = _read_index(folder / start)
        names = sorted(set(homes.values()))
    elif start != INDEX:
        names = [start]
    else:
        names = sorted(here)
    if not names:
        refuse_other_contents(folder)
        raise ValueError(f"{folder}: holds no .safetensors file{_hint(folder)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and homes is not None:
        raise ValueError(f"{folder / start}: names {listed(missing)}, which {folder} does not hold")
    if missing:
        linked = (folder / missing[0]).is_symlink()
        what = "links to a file that is not there" if linked else "is not there"
        raise ValueError(f"{folder}: {listed(missing)} {what}")
    _warn_of_leftovers(folder, names, start)
    return [folder / name for name in names], homes


def _named(folder: pathlib.Path) -> str | None:
    """Returns the file that config.json names as that of the weights, if it does."""
    try:
        name = json.loads((folder / CONFIG).read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    return None if name is None else _inside(folder / CONFIG, name)


def _inside(where: pathlib.Path, name: object) -> str:
    """Returns a file name in its shortest form. Raises ValueError for one that is not inside the folder."""
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{where}: names {name!r} as a file of weights, which must be in the same folder")
    return posixpath.normpath(name)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        homes = json.loads(path.read_bytes())["weight_map"]
        if homes and all(isinstance(k, str) and isinstance(v, str) for k, v in homes.items()):
            return {tensor: _inside(path, name) for tensor, name in homes.items()}
        problem = "weight_map must give a file for each tensor"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: not an index of safetensors files ({problem})")


def _warn_of_leftovers(folder: pathlib.Path, names: list[str], start: str) -> None:
    found = [
        path.name for end in (".safetensors", ".safetensors.index.json") for path in folder.glob(f"*{end}")
    ]
    found += [path.name for path in folder.glob("pytorch_model*.bin")]
    unread = sorted({*found} - {*names, start, *ADAPTERS})
    if unread:
        read = start if (folder / start).is_file() else listed(names)
        warnings.warn(
            f"{folder}: the weights are read from {read}, as transformers does; not read: {listed(unread)}",
            stacklevel=2,
        )
    adapters = [name for name in (ADAPTER_CONFIG, *ADAPTERS) if (folder / name).is_file()]
    if adapters:
        warnings.warn(
            f"{folder}: also holds an adapter, which is not applied: {listed(adapters)}", stacklevel=2
        )


def refuse_other_contents(folder: str | os.PathLike) -> None:
    """Raises ValueError for a folder without .safetensors weights that holds an adapter or other formats."""
    folder = pathlib.Path(folder)
    if {path.name for path in folder.glob("*.safetensors")} - {*ADAPTERS} or (folder / INDEX).is_file():
        return
    if any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTERS)):
        raise ValueError(_adapter(folder))
    for pattern, what in OTHER_FORMATS.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            raise ValueError(
                f"{folder}: holds weights in {what} ({listed(found)}): must be .safetensors files, as "
                f"save_pretrained of transformers writes them{_hint(folder)}"
            )


def _adapter(folder: pathlib.Path) -> str:
    """Returns the message for a folder that holds an adapter only."""
    path = folder / ADAPTER_CONFIG
    values = read_json(path) if path.is_file() else {}
    base = values.get("base_model_name_or_path") or values.get("model")
    kind = values.get("peft_type") or values.get("fine_tune_type")
    return (
        f"{folder}: holds an adapter{f' ({kind})' if kind else ''}, not a whole model; its base model is "
        f"{base or 'not named'}: merge it into that (merge_and_unload of peft) and save the result"
    )


def _hint(folder: pathlib.Path) -> str:
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    return f"; there are some in {listed(inner)}" if inner else ""
