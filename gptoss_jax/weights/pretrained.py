"""Released weights in and out: Hugging Face folders (bfloat16, float32 or MXFP4), `original/`, run folders.

A source gives pieces, one parameter of one layer each; loading puts them on devices, saving and converting
write them to files. Besides source and result, only the piece under work is held.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.config.checked import read_json
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import Transformer, abstract_params, params_of, with_params
from gptoss_jax.parallel.sharding import parameter_shardings, path_names
from gptoss_jax.weights import pieces, tensor_files
from gptoss_jax.weights.checkpoint import is_run, load_config, load_run
from gptoss_jax.weights.huggingface import HUGGINGFACE, ORIGINAL, check_tensors, parameters_by_layer

Format = Literal["bfloat16", "float32", "mxfp4"]
HUB = "hf:"
MATRICES = ("moe.gate_up", "moe.down")
# What a model folder holds besides weights and config.json, copied as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# exp(this - anything) is 0: how a model without learned sinks is written in a format that has them.
NO_SINK = float(jnp.finfo(jnp.bfloat16).min)
# What a writer is handed at a time, unless the tensor must be turned as a whole.
CHUNK_BYTES = 64 << 20


class Source:
    """Weights, wherever they are: `config` is their model's, with plain experts; `packed` says whether the
    experts are in MXFP4; `origin` is the folder with their tokenizer, if there is one."""

    config: ModelConfig
    packed: bool
    origin: pathlib.Path | None
    release: Callable[[np.ndarray], None] | None = None

    def array(self, key: str, layer: int) -> tuple[str, np.ndarray | pieces.DeviceRows]:
        """The published name and the array, with our axes, of what is held; layer -1 is that of no layer."""
        raise NotImplementedError

    def dtype(self, key: str) -> np.dtype:
        """The type that holds a parameter of every layer; packed experts count as bfloat16."""
        if self.packed and key in MATRICES:
            return pieces.BFLOAT16
        outside = key.split(".")[0] in ("embedding", "head", "final_norm")
        layers = [-1] if outside else range(self.config.num_hidden_layers)
        kinds = {self.array(key, layer)[1].dtype for layer in layers}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def piece(self, key: str, layer: int) -> pieces.Piece:
        """A parameter, by the last two names of its path, whichever way the experts are held and wanted."""
        matrix, _, part = key.rpartition("_")
        if self.packed and key in MATRICES:
            (_, blocks), (name, scales) = (
                self.array(f"{key}_{part}", layer) for part in ("blocks", "scales")
            )
            return pieces.Unpacked(name, blocks, scales, self.release)
        if not self.packed and matrix in MATRICES and part in ("blocks", "scales"):
            return pieces.Packed(self.piece(matrix, layer), part)
        return pieces.Plain(*self.array(key, layer), self.release)


class PublishedFolder(Source):
    """A folder of safetensors files in one of the two published layouts."""

    def __init__(self, folder: pathlib.Path):
        if not (folder / "config.json").is_file() and (folder / "original" / "config.json").is_file():
            folder = folder / "original"
        self.config = ModelConfig.from_hf(folder)
        self._files = tensor_files.TensorFolder(folder)
        names = self._files.tensors.keys()
        self._table = ORIGINAL if "embedding.weight" in names else HUGGINGFACE
        self.packed = any(name.endswith(("_blocks", ".blocks")) for name in names)
        self._held = _with_experts(self.config, self.packed)
        self.origin, self.release = folder, self._files.release
        if self.config.tie_word_embeddings:
            self._drop_tied_head()
        check_tensors(str(folder), self._held, self._table, self._files.tensors)

    def _drop_tied_head(self) -> None:
        """Some programs write the head although it is the embedding."""
        names = (self._table[key].name for key in ("head.weight", "embedding.weight"))
        head, embedding = (self._files.tensors.get(name) for name in names)
        if head is not None and embedding is not None:
            if head.tobytes() != embedding.tobytes():
                raise ValueError(
                    f"{self.origin}: tie_word_embeddings is true, but the head is not the embedding"
                )
            del self._files.tensors[self._table["head.weight"].name]

    def array(self, key: str, layer: int) -> tuple[str, np.ndarray]:
        layout = self._table[key]
        name = layout.name.format(layer)
        return name, layout.to_ours(self._files.tensors[name], self._held)


class ParameterTree(Source):
    """The parameters of a model in memory."""

    def __init__(self, config: ModelConfig, params: dict, origin: pathlib.Path | None):
        self.packed = config.expert_format == "mxfp4"
        self.config, self.origin = _with_experts(config, False), origin
        self._arrays = {}
        for names, layers in parameters_by_layer(config):
            leaf = params
            for name in names:
                leaf = leaf[name]
            for row, layer in enumerate(layers):
                self._arrays[".".join(names[-2:]), layer] = (leaf, None if layer < 0 else row)

    def array(self, key: str, layer: int) -> tuple[str, np.ndarray | pieces.DeviceRows]:
        return HUGGINGFACE[key].name.format(layer), pieces.layer_of(*self._arrays[key, layer])


def _with_experts(config: ModelConfig, packed: bool) -> ModelConfig:
    return dataclasses.replace(config, expert_format="mxfp4" if packed else "plain")


def open_weights(folder: str | os.PathLike) -> Source:
    """The weights of a Hugging Face folder, of `original/`, of a run folder, or of `hf:OWNER/NAME`, which is
    fetched from the Hugging Face hub or taken from its cache.

    Raises ValueError when there is no such folder, it is none of these, or its tensors do not fit its config.
    """
    folder = local_folder(folder)
    if is_run(folder):
        try:
            here = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # jax was told to know of no processor
            here = jax.local_devices()[0]
        config, params, _ = load_run(folder, device=here)
        return ParameterTree(config.model, params, folder)
    return PublishedFolder(folder)


def local_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Where a folder of weights is, after `hf:OWNER/NAME` has been fetched."""
    name = str(folder)
    if name.startswith(HUB):
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        try:
            # The hub's repository holds other copies of the weights besides.
            found = huggingface_hub.snapshot_download(
                name[len(HUB) :], allow_patterns=wanted, ignore_patterns=["original/*", "metal/*"]
            )
        except Exception as error:  # what breaks on the way has the classes of whichever client is in use
            raise ValueError(f"{name}: cannot be fetched from the Hugging Face hub ({error})") from error
        return pathlib.Path(found)
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        hint = f"; {HUB}{name} would be that of the Hugging Face hub" if name.count("/") == 1 else ""
        raise ValueError(f"{folder}: no such folder{hint}")
    return path


def from_pretrained(
    folder: str | os.PathLike,
    dtype: Literal["bfloat16", "float32"] | None = None,
    experts: Format | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, of `original/`, of a run folder of train.py, or of `hf:OWNER/NAME`.

    Args:
      folder: where it is. Its weights are read one by one, each straight to its place.
      dtype: the type of the parameters and of the computation; None keeps the files' and computes in float32
        on CPU and bfloat16 elsewhere.
      experts: how the experts' matrices are held: "mxfp4" keeps the released bytes packed, 4.25 bits each,
        and unpacks a layer's when it is run; None leaves them packed if they are, else they are of `dtype`.
      mesh: where the parameters lie, as the path table says; None is the first device. Use the model under
        `jax.set_mesh(mesh)`.

    Raises ValueError for a folder that is not there or not a model's, for a damaged file, and, all together,
    for tensors that are missing, surplus or misshapen. Warns of tensors that hold something not finite.
    """
    config, params, origin = load_pretrained(folder, dtype, experts, mesh)
    model = with_params(config, params)
    model.origin = None if origin is None else str(origin.resolve())
    return model


def load_pretrained(
    folder: str | os.PathLike,
    dtype: str | None = None,
    experts: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, dict, pathlib.Path | None]:
    """What `from_pretrained` makes a model of: config, parameter tree, and the folder with the tokenizer."""
    _check_choice("dtype", dtype, ("bfloat16", "float32"))
    _check_choice("experts", experts, ("bfloat16", "float32", "mxfp4"))
    local = local_folder(folder)
    if is_run(local) and experts != "mxfp4":
        # Orbax puts each array straight to its place itself.
        config = load_config(local).model
        tree = _typed_tree(config, dtype, experts, lambda key: np.dtype(np.float32))
        _, params, _ = load_run(local, abstract=_placed(tree, mesh))
        warn_of_params(config, params, local)
        return _computing_in(config, dtype), params, local
    source = open_weights(local)
    packed = experts == "mxfp4" or (experts is None and source.packed)
    config = _computing_in(_with_experts(source.config, packed), dtype)
    tree = _typed_tree(config, dtype, experts, source.dtype)
    return config, read_params(source, config, _placed(tree, mesh)), source.origin


def _computing_in(config: ModelConfig, dtype: str | None) -> ModelConfig:
    return config if dtype is None else dataclasses.replace(config, compute_dtype=dtype)


def _typed_tree(
    config: ModelConfig, dtype: str | None, experts: str | None, held: Callable[[str], np.dtype]
) -> dict:
    """The abstract parameters in the types that were asked for, or else those they are held in."""

    def typed(path, leaf):
        key = ".".join(path_names(path)[-2:])
        kind = experts if experts and key in MATRICES else dtype
        packed = leaf.dtype == jnp.uint8
        return leaf if packed else jax.ShapeDtypeStruct(leaf.shape, kind or held(key))

    return jax.tree_util.tree_map_with_path(typed, abstract_params(config))


def _placed(tree: dict, mesh: jax.sharding.Mesh | None) -> dict:
    """The tree with a sharding for each array: as the path table says, or the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: here, tree) if mesh is None else parameter_shardings(tree, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def load_model(folder: str | os.PathLike) -> tuple[ModelConfig, dict, Tokenizer]:
    """What it takes to run the model of any folder that `from_pretrained` reads: config, parameter tree,
    tokenizer.

    Raises ValueError as that does, and when the folder holds no tokenizer.
    """
    local = local_folder(folder)
    tokenizer = find_tokenizer(local)
    if tokenizer is None:
        raise ValueError(f"{folder}: must hold tokenizer.json or tokenizer_name.txt")
    config, params, _ = load_pretrained(local)
    return config, params, tokenizer


def find_tokenizer(origin: pathlib.Path) -> Tokenizer | None:
    """The tokenizer that goes with a model's folder; None where it holds none."""
    path = _companions(origin).get("tokenizer.json")
    if path is None and not (origin / "tokenizer_name.txt").is_file():
        return None
    return load_tokenizer(origin if path is None else path.parent)


def warn_of_params(config: ModelConfig, params: dict, origin: pathlib.Path) -> None:
    """Warns of every tensor of a parameter tree that holds something not finite."""

    def sound(leaf):
        axes = tuple(range(1, leaf.ndim))
        return jnp.all(jnp.isfinite(leaf), axis=axes)

    found = jax.device_get(jax.jit(lambda tree: jax.tree.map(sound, tree))(params))
    layers, unsound = dict(parameters_by_layer(config)), set()
    for path, rows in jax.tree_util.tree_leaves_with_path(found):
        names = path_names(path)
        layout, which = HUGGINGFACE[".".join(names[-2:])], layers[names]
        if which == [-1]:
            rows = rows.all(keepdims=True)
        unsound |= {layout.name.format(layer) for layer, row in zip(which, rows, strict=True) if not row}
    _warn_of(unsound, origin)


def read_params(source: Source, config: ModelConfig, tree: dict) -> dict:
    """The parameter tree of a config; `tree` gives each array's shape, type and sharding."""
    layers = dict(parameters_by_layer(config))
    unsound: set[str] = set()

    def one(path, leaf):
        names = path_names(path)
        found = [source.piece(".".join(names[-2:]), layer) for layer in layers[names]]
        array, not_finite = pieces.load(leaf, found)
        unsound.update(not_finite)
        return array

    params = jax.tree_util.tree_map_with_path(one, tree)
    _warn_of(unsound, source.origin)
    return params


def _warn_of(names: set[str], origin: pathlib.Path | None) -> None:
    if names:
        warnings.warn(
            f"{origin or 'the model'}: holds numbers that are not finite in {', '.join(sorted(names))}",
            stacklevel=3,
        )


def _check_choice(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None:
        require(value in allowed, name, value, f"must be {', '.join(allowed)} or None")


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike,
    experts: Format | None = None,
    tokenizer: str | os.PathLike | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Writes a model as a Hugging Face folder, which transformers and vLLM load.

    Args:
      folder: must not exist yet, or be empty. It appears when it is whole.
      experts: the type of the weights; "mxfp4" packs the experts' matrices and makes all else bfloat16. What
        was loaded packed keeps its bytes. None is mxfp4 where the model's are packed, else float32 where
        anything is, else bfloat16.
      tokenizer: a folder whose tokenizer goes with it; None is where the model was loaded from.
      shard_bytes: the size of a file before another one is begun.

    Raises ValueError for a model that the format cannot express, saying why, and for a folder that holds
    something; OSError when it cannot be written.
    """
    origin = None if model.origin is None else pathlib.Path(model.origin)
    if tokenizer is not None:
        origin = local_folder(tokenizer)
        if not {"tokenizer.json", "tokenizer_name.txt"} & {path.name for path in origin.iterdir()}:
            raise ValueError(
                f"tokenizer is {str(tokenizer)!r}: must hold tokenizer.json or tokenizer_name.txt"
            )
    elif origin is not None and not origin.is_dir():
        raise ValueError(
            f"tokenizer is None: {origin}, where the model came from, is gone; name another folder"
        )
    source = ParameterTree(model.config, params_of(model), origin)
    write_folder(source, folder, experts, shard_bytes)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    experts: Format | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model of any folder as a Hugging Face folder; see `save_pretrained` and `write_folder`.

    Published weights go piece by piece. A run's are restored first, whole and in float32.
    """
    tensor_files.check_target(target)
    local = local_folder(source)
    if is_run(local):
        # What cannot be written is better known before.
        load_config(local).model.to_hf(experts or "float32")
    write_folder(open_weights(local), target, experts, progress=progress)


def write_folder(
    source: Source,
    folder: str | os.PathLike,
    experts: str | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes any source's weights as a Hugging Face folder; see `save_pretrained`.

    `progress` hears of the bytes written and of all of them.
    """
    _check_choice("experts", experts, ("bfloat16", "float32", "mxfp4"))
    if jax.process_count() > 1:
        raise ValueError("a model is written by one process: load its checkpoint in one and save it there")
    if experts is None:
        keys = {".".join(names[-2:]) for names, _ in parameters_by_layer(source.config)}
        wide = any(source.dtype(key) != pieces.BFLOAT16 for key in keys)
        experts = "mxfp4" if source.packed else "float32" if wide else "bfloat16"
    tensor_files.check_target(folder)
    tokenizer = _own_tokenizer(source.origin)
    # What a model does without is written as what has no effect.
    config = dataclasses.replace(source.config, router_bias=True, expert_bias=True, learned_sinks=True)
    values = config.to_hf(experts) | _token_ids(source.origin, tokenizer)
    unsound: set[str] = set()
    tensors = _new_tensors(source, _with_experts(config, experts == "mxfp4"), experts, unsound)
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with tensor_files.whole_folder(folder, total + (64 << 20)) as partial:
        tensor_files.write_tensors(partial, tensors, shard_bytes, wrote)
        for name, path in _companions(source.origin).items():
            shutil.copyfile(path, partial / name)
        if tokenizer is not None:
            tokenizer.export(partial)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _warn_of(unsound, source.origin)


def _new_tensors(
    source: Source, config: ModelConfig, experts: str, unsound: set[str]
) -> list[tensor_files.NewTensor]:
    """Every tensor of the Hugging Face folder of a config, layer by layer."""
    have = {".".join(names[-2:]) for names, _ in parameters_by_layer(source.config)}
    dtype = np.dtype(np.float32) if experts == "float32" else pieces.BFLOAT16
    abstract = {
        path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    found = []
    for names, layers in parameters_by_layer(config):
        key, leaf = ".".join(names[-2:]), abstract[names]
        shape = leaf.shape if layers == [-1] else leaf.shape[1:]
        kind = np.dtype(np.uint8) if leaf.dtype == jnp.uint8 else dtype
        absent = key not in have and kind != np.uint8
        for layer in layers:
            layout = HUGGINGFACE[key]
            name = layout.name.format(layer)
            piece = _absent(key, name, shape) if absent else None

            def chunks(piece=piece, key=key, layer=layer, shape=shape, kind=kind, layout=layout):
                piece = piece or source.piece(key, layer)
                return _chunks(piece, shape, kind, layout, unsound)

            place = {"embedding": -1, "blocks": layer}.get(names[0], config.num_hidden_layers)
            found.append((place, tensor_files.NewTensor(name, kind, layout.file_shape(config), chunks)))
    return [tensor for _, tensor in sorted(found, key=lambda entry: entry[0])]


def _absent(key: str, name: str, shape: tuple[int, ...]) -> pieces.Constant:
    return pieces.Constant(name, shape, NO_SINK if key == "attention.sinks" else 0.0)


def _chunks(piece, shape, kind, layout, unsound) -> Iterator[np.ndarray]:
    row = int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize
    step = max(1, CHUNK_BYTES // row) if layout.keeps_first_axis else shape[0]
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        out = np.empty((part.stop - part.start, *shape[1:]), kind)
        unsound.update(pieces.fill([(out, piece, (part, *(slice(0, size) for size in shape[1:])))]))
        yield layout.to_file(out)


def _companions(origin: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """The files of a published folder that go with its weights; those of `original/` lie one folder up."""
    if origin is None:
        return {}
    folders = [origin.parent, origin] if origin.name == "original" else [origin]
    return {name: folder / name for folder in folders for name in COMPANIONS if (folder / name).is_file()}


def _own_tokenizer(origin: pathlib.Path | None) -> Tokenizer | None:
    """The tokenizer of a folder that keeps it as ours do: less than others want, or only its name."""
    if origin is None or not (is_run(origin) or (origin / "tokenizer_name.txt").is_file()):
        return None
    return load_tokenizer(origin)


def _token_ids(origin: pathlib.Path | None, tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is not None:
        return dict(zip(TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_id), strict=True))
    if origin is None:
        return {}
    # The released config.json names the turn's end alone; only where it says nothing is the other file asked.
    for path in (origin / "config.json", _companions(origin).get("generation_config.json")):
        values = read_json(path) if path is not None and path.is_file() else {}
        found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
        if found:
            return found
    return {}
