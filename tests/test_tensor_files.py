"""safetensors folders: both ways against the library, damaged files, and folders that appear whole or not."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints import safetensors_io
from gptoss_jax.checkpoints.export import atomic_folder
from gptoss_jax.checkpoints.lazy_tensors import release_pages
from gptoss_jax.checkpoints.safetensors_io import NewTensor, map_folder, write_tensors

ROOT = pathlib.Path(__file__).parents[1]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Odd sizes next to one another: each but the first would begin off its own width if they stood in this order.
SHAPES = {
    "a.bytes": (np.uint8, (3,)),
    "b.wide": (np.float64, (1, 3)),
    "c.half": (np.float16, (5, 7)),
    "d.brain": (BFLOAT16, (3, 1, 11)),
    "e.single": (np.float32, (2, 9)),
    "f.bytes": (np.uint8, (7, 3)),
    "g.scalar": (np.float32, ()),
    "h.nothing": (np.float32, (0, 4)),
    "i.nothing": (np.uint8, (4, 0)),
}


def random_tensors(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * int(np.prod(shape))), dtype).reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }


def new(name, array, parts=1):
    """The array as what `write_tensors` takes, its rows in so many chunks."""
    return NewTensor(
        name, array.dtype, array.shape, lambda: np.array_split(array, parts) if parts > 1 else [array]
    )


def write(folder, tensors, shard_bytes=10**9, **kwargs):
    folder.mkdir(exist_ok=True)
    write_tensors(folder, [new(name, array) for name, array in tensors.items()], shard_bytes, **kwargs)
    return folder


def assert_same_tensors(found, expected):
    """Names, types, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_reads_what_the_library_writes(tmp_path):
    expected = random_tensors()
    save_file(expected, tmp_path / "some.safetensors", metadata={"format": "np"})
    tensors = map_folder(tmp_path)
    assert_same_tensors(tensors, expected)
    with pytest.raises(ValueError, match="read-only"):
        tensors["e.single"][0, 0] = 1


def test_the_library_reads_what_is_written(tmp_path):
    expected = random_tensors()
    write(tmp_path, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), expected)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    # Every tensor begins at a multiple of its width, as the format's other readers want.
    tensors = map_folder(tmp_path)
    assert_same_tensors(tensors, expected)
    assert all(array.ctypes.data % array.itemsize == 0 for array in tensors.values() if array.size)


def test_many_tensors(tmp_path):
    shapes = {f"t{i}": (np.float32, (i % 5, 3)) for i in range(300)}
    expected = random_tensors(1, shapes)
    assert_same_tensors(load_file(write(tmp_path, expected) / "model.safetensors"), expected)
    assert_same_tensors(map_folder(tmp_path), expected)


def test_no_metadata_and_other_files_beside(tmp_path):
    one, two = random_tensors(2), random_tensors(3, {"z": (np.float32, (3,))})
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors", metadata={})
    (tmp_path / "notes.txt").write_text("no tensors")
    assert_same_tensors(map_folder(tmp_path), one | two)


def test_tensors_come_in_chunks(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(10, 6)
    heard = []
    # A chunk need not lie in order in memory.
    turned = NewTensor("turned", array.dtype, (6, 10), lambda: iter([array.T[:4], array.T[4:]]))
    write_tensors(tmp_path, [new("whole", array, parts=3), turned], on_write=heard.append)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), {"whole": array, "turned": array.T.copy()})
    assert sorted(heard) == [72, 72, 80, 96, 160] and sum(heard) == 480


@pytest.mark.parametrize(
    ("chunk", "error", "words"),
    [
        (np.zeros(3, np.float32), ValueError, "t came in 12 bytes of 16"),
        (np.zeros(5, np.float32), ValueError, "t came in 20 bytes of 16"),
        (np.zeros(4, np.int32), TypeError, "t is given as int32, not float32"),
    ],
)
def test_chunks_that_do_not_make_the_tensor(tmp_path, chunk, error, words):
    tensor = NewTensor("t", np.dtype(np.float32), (4,), lambda: [chunk])
    with pytest.raises(error, match=words):
        write_tensors(tmp_path, [tensor])


def test_shards_and_their_index(tmp_path):
    # In bytes: 400, 600 | 1 more than fits | alone, as it is larger than a shard | 4, 996.
    sizes = {"a": 100, "b": 150, "c": 1, "d": 300, "e": 1, "f": 249}
    expected = random_tensors(4, {name: (np.float32, (size,)) for name, size in sizes.items()})
    write(tmp_path, expected, shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    homes = {
        name: f"model-0000{i}-of-00004.safetensors"
        for name, i in zip("abcdef", (1, 1, 2, 3, 4, 4), strict=True)
    }
    assert index == {"metadata": {"total_size": 4 * sum(sizes.values())}, "weight_map": homes}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {*homes.values(), "model.safetensors.index.json"}
    )
    for home in set(homes.values()):
        held = {name: expected[name] for name in homes if homes[name] == home}
        assert_same_tensors(load_file(tmp_path / home), held)
        path = tmp_path / home
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + sum(array.nbytes for array in held.values())
        assert header % 8 == 0
    assert_same_tensors(map_folder(tmp_path), expected)


def test_a_large_tensor_comes_first(tmp_path):
    expected = random_tensors(4, {"a": (np.float32, (300,)), "b": (np.float32, (1,))})
    write(tmp_path, expected, shard_bytes=1000)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert_same_tensors(load_file(tmp_path / names[0]), {"a": expected["a"]})


# Folders that hold more than one model's files.


def write_as(folder, tensors, shards):
    """Adds one file, or so many shards and their index, as transformers does: over what is there."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    homes = {}
    for i, names in enumerate(np.array_split(sorted(tensors), shards)):
        home = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / home)
        homes |= dict.fromkeys(map(str, names), home)
    index = {"metadata": {}, "weight_map": homes}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))


SHARDS_OF_3 = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
# Saved in so many files, then in so many -> which of the two transformers loads, and what it leaves.
SAVED_TWICE = {
    "sharded, then whole": (3, 1, 1, f"{', '.join(SHARDS_OF_3)}, {safetensors_io.INDEX}"),
    "whole, then sharded": (1, 3, 0, f"{', '.join(SHARDS_OF_3)}, {safetensors_io.INDEX}"),
    "in 2, then in 3": (2, 3, 1, "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize(("first", "second", "loaded", "unread"), SAVED_TWICE.values(), ids=SAVED_TWICE)
def test_a_folder_saved_twice(tmp_path, first, second, loaded, unread):
    saved = random_tensors(5), random_tensors(6)
    write_as(tmp_path, saved[0], first)
    write_as(tmp_path, saved[1], second)
    with pytest.warns(UserWarning) as caught:
        assert_same_tensors(map_folder(tmp_path), saved[loaded])
    read = safetensors_io.INDEX if first > 1 and second > 1 else "model.safetensors"
    message = f"{tmp_path}: the weights are read from {read}, as transformers does; not read: {unread}"
    assert [str(one.message) for one in caught] == [message]


def test_an_index_whose_shards_are_gone_is_a_leftover_too(tmp_path):
    # transformers removes old shards when it saves one file, but not their index.
    write_as(tmp_path, random_tensors(5), 3)
    for name in SHARDS_OF_3:
        (tmp_path / name).unlink()
    write_as(tmp_path, random_tensors(6), 1)
    with pytest.warns(UserWarning, match="not read: model.safetensors.index.json$"):
        assert_same_tensors(map_folder(tmp_path), random_tensors(6))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "other.safetensors"]
)
def test_other_copies_beside_the_weights_are_named(tmp_path, shards, name):
    write_as(tmp_path, random_tensors(5), shards)
    save_file(random_tensors(6), tmp_path / name)
    with pytest.warns(UserWarning, match=f"not read: {name}$"):
        assert_same_tensors(map_folder(tmp_path), random_tensors(5))


@pytest.mark.filterwarnings("error")
def test_copies_in_subfolders_are_let_be(tmp_path):
    write_as(tmp_path, random_tensors(5), 1)
    for inner in ("original", "metal"):
        write_as(tmp_path / inner, random_tensors(6), 2)
    assert_same_tensors(map_folder(tmp_path), random_tensors(5))


@pytest.mark.filterwarnings("error")
def test_one_variant_is_read_and_two_are_refused(tmp_path):
    save_file(random_tensors(5), tmp_path / "model.fp16.safetensors")
    assert_same_tensors(map_folder(tmp_path), random_tensors(5))
    save_file(random_tensors(5), tmp_path / "model.bf16.safetensors")
    assert_refused(tmp_path, r"model\.fp16\.safetensors: holds \S+, which model\.bf16\.safetensors holds too")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["mine.safetensors", "mine.safetensors.index.json"])
def test_config_json_may_name_the_file(tmp_path, name):
    write_as(tmp_path, random_tensors(5), 1 if name == "mine.safetensors" else 2)
    (tmp_path / (safetensors_io.SINGLE if name == "mine.safetensors" else safetensors_io.INDEX)).rename(
        tmp_path / name
    )
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    assert_same_tensors(map_folder(tmp_path), random_tensors(5))
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../mine.safetensors"}))
    assert_refused(
        tmp_path, "config.json: names '../mine.safetensors' as a file of weights, which must be in"
    )


@pytest.mark.filterwarnings("error")
def test_a_file_that_the_index_names_in_two_ways_is_opened_once(sharded):
    index = json.loads((sharded / safetensors_io.INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = f"./{index['weight_map'][first]}"
    (sharded / safetensors_io.INDEX).write_text(json.dumps(index))
    assert_same_tensors(map_folder(sharded), random_tensors())


@pytest.mark.parametrize(
    "home", ["../secret.safetensors", "/secret.safetensors", "a/../../b.safetensors", ""]
)
def test_an_index_that_leaves_its_folder(sharded, home):
    (sharded / safetensors_io.INDEX).write_text(json.dumps({"weight_map": {"t": home}}))
    assert_refused(
        sharded, re.escape(f"names {home!r} as a file of weights, which must be in the same folder")
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "pytorch_model.bin",
            r"weights in PyTorch's pickle format \(pytorch_model.bin\): must be .safetensors",
        ),
        ("pytorch_model-00001-of-00002.bin", "PyTorch's pickle format"),
        ("gpt-oss-20b-Q4_K_M.gguf", "llama.cpp's GGUF format"),
        ("notes.txt", "holds no .safetensors file$"),
        ("original/model.safetensors", "holds no .safetensors file; there are some in original$"),
    ],
)
def test_folders_of_other_formats(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"0" * 99)
    assert_refused(tmp_path, words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"peft_type": "LORA", "base_model_name_or_path": "openai/gpt-oss-20b"},
            r"an adapter \(LORA\), not a whole model; its base model is openai/gpt-oss-20b: merge it into",
        ),
        ({"fine_tune_type": "lora", "model": "some/base"}, r"adapter \(lora\).* its base model is some/base"),
        ({}, "an adapter, not a whole model; its base model is not named"),
        (None, "an adapter, not a whole model; its base model is not named"),
    ],
)
def test_a_folder_with_only_an_adapter(tmp_path, config, words):
    save_file(random_tensors(5), tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, words)


# Damaged files.


def with_header(path, header, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def assert_refused(folder, *words):
    """Asserts that a folder is refused in one line that has all the words."""
    with pytest.raises(ValueError) as caught:
        map_folder(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert re.search(word, message), message


@pytest.fixture
def one_file(tmp_path):
    return write(tmp_path / "folder", random_tensors()) / "model.safetensors"


def test_truncated_in_the_data(one_file):
    size = one_file.stat().st_size
    os.truncate(one_file, size - 1)
    assert_refused(
        one_file.parent, str(one_file), "truncated", f"{size - 1:,} bytes, {size:,} according to its header"
    )


def test_truncated_in_the_header(one_file):
    os.truncate(one_file, 100)
    assert_refused(one_file.parent, str(one_file), "truncated", "header")


@pytest.mark.parametrize("size", [0, 5])
def test_empty_file(one_file, size):
    os.truncate(one_file, size)
    assert_refused(one_file.parent, str(one_file), "header")


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(0).bytes(5000),
        b'{"model_type": "gpt_oss"}' * 9,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
        (20).to_bytes(8, "little") + b"\xff" * 40,
        (20).to_bytes(8, "little") + b"no JSON, but as long",
    ],
    ids=["random", "JSON", "git-lfs", "no UTF-8", "no JSON"],
)
def test_no_safetensors_file(one_file, content):
    one_file.write_bytes(content)
    assert_refused(one_file.parent, str(one_file), "not a safetensors file")


def test_unknown_type(one_file):
    with_header(one_file, entry("F8_E5M2", (24,)), b"\0" * 24)
    assert_refused(one_file.parent, str(one_file), "t is of type 'F8_E5M2'", "U8, F16, BF16, F32, F64")


@pytest.mark.parametrize("offsets", [(0, 20), (0, 28), (4, 24), (24, 0), (-8, 16)])
def test_offsets_that_disagree_with_the_shape(one_file, offsets):
    with_header(one_file, entry(offsets=offsets))
    assert_refused(one_file.parent, str(one_file), "not a safetensors file.*(shape|offset|-8)")


@pytest.mark.parametrize(
    "header",
    [
        [1, 2],
        None,
        7,
        {"t": []},
        {"t": {"dtype": "F32", "shape": [2, 3]}},
        entry(shape=6),
        entry(shape=["2", "3"]),
        entry(shape=[-2, -3]),
        entry(shape=[2.0, 3.0]),
        entry(shape=[None]),
        entry(dtype=["F32"]),
        entry(dtype={}),
        entry(offsets=[24]),
        entry(offsets=[0, 8, 24]),
        entry(offsets=["0", "24"]),
        entry(offsets=[0.0, 24.0]),
        entry(offsets=None),
        {**entry(), "__metadata__": [], "u": entry()["t"] | {"shape": [2**40, 2**40, 0, -1]}},
    ],
    ids=repr,
)
def test_malformed_headers(one_file, header):
    with_header(one_file, header)
    assert_refused(one_file.parent, str(one_file))


def test_any_broken_byte_of_the_header_is_read_or_refused(tmp_path):
    path = (
        write(tmp_path, random_tensors(9, {"t": (np.float32, (2, 3)), "u": (BFLOAT16, (11,))}))
        / "model.safetensors"
    )
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    refusals = 0
    for place in range(length):
        for byte in b'\x00\xff -.9e"[{,:':
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                map_folder(tmp_path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refusals += 1
    assert refusals > 6 * length


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "folder", random_tensors(), shard_bytes=60)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    assert_refused(sharded, "index.json", "model-00002-of-00005.safetensors", "does not hold")


def test_many_missing_shards_are_not_all_listed(sharded):
    homes = {f"t{i}": f"{i}.safetensors" for i in range(9)}
    (sharded / safetensors_io.INDEX).write_text(json.dumps({"weight_map": homes}))
    assert_refused(sharded, "0.safetensors, 1.safetensors, 2.safetensors, 3.safetensors and 5 more")


def test_index_that_places_a_tensor_where_it_is_not(sharded):
    index = json.loads((sharded / safetensors_io.INDEX).read_text())
    index["weight_map"]["more"] = "model-00001-of-00005.safetensors"
    (sharded / safetensors_io.INDEX).write_text(json.dumps(index))
    assert_refused(sharded, "index.json", "more", "model-00001-of-00005.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "",
        "[]",
        "7",
        '{"metadata": {}}',
        '{"weight_map": {}}',
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        b"\xff\xfe",
    ],
)
def test_no_index(sharded, content):
    (sharded / safetensors_io.INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(sharded, str(sharded / safetensors_io.INDEX), "not an index of safetensors files")


def test_the_same_tensor_twice(tmp_path):
    save_file(random_tensors(0), tmp_path / "one.safetensors")
    save_file({"e.single": np.ones(3)}, tmp_path / "two.safetensors")
    assert_refused(tmp_path, "two.safetensors", "e.single", "one.safetensors")


def test_no_files_at_all(tmp_path):
    assert_refused(tmp_path, str(tmp_path), "holds no .safetensors file")


def resident_kilobytes(path):
    """How much of a mapped file counts as this process's memory."""
    mappings = pathlib.Path("/proc/self/smaps").read_text().split(f" {path}\n")[1:]
    return sum(int(re.search(r"^Rss: +(\d+)", part, re.MULTILINE)[1]) for part in mappings)


def test_released_views_still_read_right(tmp_path):
    expected = random_tensors(7, {"small": (np.uint8, (5,)), "large": (np.float32, (1 << 19, 2))})
    tensors = map_folder(write(tmp_path, expected))
    assert_same_tensors(tensors, expected)
    large = tensors["large"]
    for view in (large, large[1000:300000], large.T, large[7:8], large[:0], tensors["small"]):
        release_pages(view)
        assert_same_tensors(tensors, expected)
    # Something that is no view of a file is let be.
    release_pages(np.ones(5000))


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_released_memory_goes_back(tmp_path):
    path = write(tmp_path, random_tensors(8, {"t": (np.float32, (1 << 20,))})) / "model.safetensors"
    tensors = map_folder(tmp_path)
    assert tensors["t"].view(np.uint8).max() == 255
    assert resident_kilobytes(path) > 4000
    release_pages(tensors["t"])
    assert resident_kilobytes(path) < 100


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty"])
def test_a_whole_folder_appears(tmp_path, made):
    target = tmp_path / "deep" / "model"
    if made:
        target.mkdir(parents=True)
    with atomic_folder(target, 10) as partial:
        (partial / "one").write_text("1")
        assert not target.exists() or listing(target) == []
    assert listing(target) == ["one"] and listing(target.parent) == ["model"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_with_content_is_left_alone(tmp_path, kind):
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
    precious = target / "precious" if kind == "folder" else target
    precious.write_text("content")
    with pytest.raises(ValueError, match=f"{target}: exists already"), atomic_folder(target, 10):
        raise AssertionError("must not be reached")
    assert precious.read_text() == "content" and listing(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_goes_wrong_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "model", 10) as partial:
        (partial / "one").write_text("1")
        raise error
    assert listing(tmp_path) == []
    with atomic_folder(tmp_path / "model", 10):
        pass
    assert listing(tmp_path) == ["model"]


def test_a_failing_chunk_leaves_nothing(tmp_path):
    def chunks():
        yield np.zeros(2, np.float32)
        raise KeyboardInterrupt

    tensor = NewTensor("t", np.dtype(np.float32), (4,), chunks)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model", 10) as partial:
        write_tensors(partial, [tensor])
    assert listing(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    stale = tmp_path / ".model.partial"
    (stale / "deep").mkdir(parents=True)
    (stale / "model.safetensors").write_text("half")
    (tmp_path / ".model.lock").touch()
    with atomic_folder(tmp_path / "model", 10) as partial:
        assert listing(partial) == []
        (partial / "one").write_text("1")
    assert listing(tmp_path) == ["model"] and listing(tmp_path / "model") == ["one"]


def test_two_at_the_same_time(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target, 10) as partial:
        (partial / "one").write_text("1")
        with (
            pytest.raises(ValueError, match=f"{target}: another process is writing it"),
            atomic_folder(target, 10),
        ):
            raise AssertionError("must not be reached")
        # Another target is another matter.
        with atomic_folder(tmp_path / "other", 10):
            pass
        assert listing(partial) == ["one"]
    assert listing(tmp_path) == ["model", "other"] and listing(target) == ["one"]


def test_a_lock_that_its_owner_has_removed_keeps_nobody_out(tmp_path, monkeypatch):
    # The first fails between the moments at which the second opens the lock and takes it.
    real, target = fcntl.flock, tmp_path / "model"
    first = contextlib.ExitStack()
    first.enter_context(atomic_folder(target, 10))

    def flock(file, operation):
        with contextlib.suppress(RuntimeError):
            first.__exit__(RuntimeError, RuntimeError(), None)
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_folder(target, 10))
        except ValueError:
            return
        (partial / "one").write_text("half")
        with pytest.raises(ValueError, match="another process is writing it"):
            stack.enter_context(atomic_folder(target, 10))
        assert listing(partial) == ["one"]


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk")
    with atomic_folder(tmp_path / "model", 10) as partial:
        (partial / "one").write_text("1")
    assert listing(tmp_path / "large disk") == ["one"] and listing(tmp_path / "model") == ["one"]


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3_000_000_000))
    with (
        pytest.raises(OSError, match=r"model: 3\.5 GB are needed, the disk has 3\.0 GB left"),
        atomic_folder(tmp_path / "model", 3_500_000_000),
    ):
        raise AssertionError("must not be reached")
    assert listing(tmp_path) == []
    with atomic_folder(tmp_path / "model", 3_000_000_000):
        pass


# Writes a tensor of which the second half never comes.
HANGING = """
import sys, time
import numpy as np
from gptoss_jax.checkpoints.export import atomic_folder
from gptoss_jax.checkpoints.safetensors_io import NewTensor, write_tensors

def chunks():
    yield np.zeros(1 << 20, np.float32)
    print("half", flush=True)
    time.sleep(600)

first = NewTensor("first", np.dtype(np.float32), (8,), lambda: [np.ones(8, np.float32)])
second = NewTensor("second", np.dtype(np.float32), (2 << 20,), chunks)
with atomic_folder(sys.argv[1], 1) as partial:
    write_tensors(partial, [first, second], shard_bytes=1000)
"""


def test_a_killed_save(tmp_path):
    target = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "half\n"
        # While it lives, nobody else may write there.
        with pytest.raises(ValueError, match="another process is writing it"), atomic_folder(target, 1):
            raise AssertionError("must not be reached")
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    assert not target.exists() and listing(tmp_path / ".model.partial")
    expected = random_tensors()
    with atomic_folder(target, 1) as partial:
        write(partial, expected)
    assert_same_tensors(map_folder(target), expected)
    assert listing(tmp_path) == ["model"] and listing(target) == ["model.safetensors"]
