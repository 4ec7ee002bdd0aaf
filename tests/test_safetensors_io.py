"""safetensors folders: reading and writing against the library, which files are read, and damaged files."""

import json
import os
import pathlib
import re

import numpy as np
import pytest
import safetensors
from helpers.weights import BFLOAT16, assert_same_tensors, new, random_tensors, write
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints import safetensors_io
from gptoss_jax.checkpoints.lazy_tensors import release_pages
from gptoss_jax.checkpoints.safetensors_io import NewTensor, map_folder, write_tensors


def test_reads_what_the_library_writes(tmp_path):
    expected = random_tensors()
    save_file(expected, tmp_path / "some.safetensors", metadata={"format": "np"})
    tensors = map_folder(tmp_path)
    assert_same_tensors(tensors, expected)
    with pytest.raises(ValueError, match="read-only"):
        tensors["e.single"][0, 0] = 1


def test_library_reads_what_is_written(tmp_path):
    expected = random_tensors()
    write(tmp_path, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), expected)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    # Every tensor is aligned to its own width, as other readers require.
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
    # A chunk need not be contiguous.
    transposed = NewTensor("transposed", array.dtype, (6, 10), lambda: iter([array.T[:4], array.T[4:]]))
    write_tensors(tmp_path, [new("whole", array, parts=3), transposed], on_write=heard.append)
    assert_same_tensors(
        load_file(tmp_path / "model.safetensors"), {"whole": array, "transposed": array.T.copy()}
    )
    assert sorted(heard) == [72, 72, 80, 96, 160] and sum(heard) == 480


@pytest.mark.parametrize(
    ("chunk", "error", "words"),
    [
        (np.zeros(3, np.float32), ValueError, "t has 12 bytes, not 16"),
        (np.zeros(5, np.float32), ValueError, "t has 20 bytes, not 16"),
        (np.zeros(4, np.int32), TypeError, "t is given as int32, not float32"),
    ],
)
def test_chunks_must_add_up_to_the_tensor(tmp_path, chunk, error, words):
    tensor = NewTensor("t", np.dtype(np.float32), (4,), lambda: [chunk])
    with pytest.raises(error, match=words):
        write_tensors(tmp_path, [tensor])


def test_shards_and_their_index(tmp_path):
    # In bytes: 400, 600 | 4 do not fit | larger than a shard | 4, 996.
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


def test_large_tensor_first(tmp_path):
    expected = random_tensors(4, {"a": (np.float32, (300,)), "b": (np.float32, (1,))})
    write(tmp_path, expected, shard_bytes=1000)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert_same_tensors(load_file(tmp_path / names[0]), {"a": expected["a"]})


def write_as(folder, tensors, shards):
    """Writes one file, or shards and their index, over existing files, as transformers does."""
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


# Files of the first and second save -> which transformers loads, and which it ignores.
SAVED_TWICE = {
    "sharded, then whole": (3, 1, 1, f"{', '.join(SHARDS_OF_3)}, {safetensors_io.INDEX}"),
    "whole, then sharded": (1, 3, 0, f"{', '.join(SHARDS_OF_3)}, {safetensors_io.INDEX}"),
    "in 2, then in 3": (2, 3, 1, "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize(("first", "second", "loaded", "unread"), SAVED_TWICE.values(), ids=SAVED_TWICE)
def test_folder_saved_twice(tmp_path, first, second, loaded, unread):
    saved = random_tensors(5), random_tensors(6)
    write_as(tmp_path, saved[0], first)
    write_as(tmp_path, saved[1], second)
    with pytest.warns(UserWarning) as caught:
        assert_same_tensors(map_folder(tmp_path), saved[loaded])
    read = safetensors_io.INDEX if first > 1 and second > 1 else "model.safetensors"
    message = f"{tmp_path}: the weights are read from {read}, as transformers does; not read: {unread}"
    assert [str(one.message) for one in caught] == [message]


def test_index_without_its_shards_is_reported(tmp_path):
    # When transformers saves one file, it removes old shards but not their index.
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
def test_other_copies_of_the_weights_are_reported(tmp_path, shards, name):
    write_as(tmp_path, random_tensors(5), shards)
    save_file(random_tensors(6), tmp_path / name)
    with pytest.warns(UserWarning, match=f"not read: {name}$"):
        assert_same_tensors(map_folder(tmp_path), random_tensors(5))


@pytest.mark.filterwarnings("error")
def test_subfolders_are_ignored(tmp_path):
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
def test_file_with_two_spellings_in_the_index_is_opened_once(sharded):
    index = json.loads((sharded / safetensors_io.INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = f"./{index['weight_map'][first]}"
    (sharded / safetensors_io.INDEX).write_text(json.dumps(index))
    assert_same_tensors(map_folder(sharded), random_tensors())


@pytest.mark.parametrize(
    "home", ["../secret.safetensors", "/secret.safetensors", "a/../../b.safetensors", ""]
)
def test_index_must_stay_in_its_folder(sharded, home):
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
        ("notes.txt", "contains no .safetensors file$"),
        ("original/model.safetensors", "contains no .safetensors file; there are some in original$"),
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
            r"an adapter \(LORA\), not a whole model; its base model is openai/gpt-oss-20b: load that with",
        ),
        ({"fine_tune_type": "lora", "model": "some/base"}, r"adapter \(lora\).* its base model is some/base"),
        ({}, "an adapter, not a whole model; its base model is not named"),
        (None, "an adapter, not a whole model; its base model is not named"),
    ],
)
def test_folder_with_only_an_adapter(tmp_path, config, words):
    save_file(random_tensors(5), tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, words)


def with_header(path, header, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def assert_refused(folder, *words):
    """Asserts that a folder is rejected with a one-line error that has all the words."""
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


def test_unsupported_dtype(one_file):
    with_header(one_file, entry("F8_E5M2", (24,)), b"\0" * 24)
    assert_refused(one_file.parent, str(one_file), "t has dtype 'F8_E5M2'", "U8, F16, BF16, F32, F64")


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


def test_any_broken_header_byte_is_read_or_refused(tmp_path):
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


def test_index_must_agree_with_its_files(sharded):
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
def test_invalid_index(sharded, content):
    (sharded / safetensors_io.INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(sharded, str(sharded / safetensors_io.INDEX), "not an index of safetensors files")


def test_duplicate_tensor(tmp_path):
    save_file(random_tensors(0), tmp_path / "one.safetensors")
    save_file({"e.single": np.ones(3)}, tmp_path / "two.safetensors")
    assert_refused(tmp_path, "two.safetensors", "e.single", "one.safetensors")


def test_no_files_at_all(tmp_path):
    assert_refused(tmp_path, str(tmp_path), "contains no .safetensors file")


def resident_kilobytes(path):
    """Returns the resident memory of this process that belongs to a mapped file."""
    mappings = pathlib.Path("/proc/self/smaps").read_text().split(f" {path}\n")[1:]
    return sum(int(re.search(r"^Rss: +(\d+)", part, re.MULTILINE)[1]) for part in mappings)


def test_released_views_can_be_read_again(tmp_path):
    expected = random_tensors(7, {"small": (np.uint8, (5,)), "large": (np.float32, (1 << 19, 2))})
    tensors = map_folder(write(tmp_path, expected))
    assert_same_tensors(tensors, expected)
    large = tensors["large"]
    for view in (large, large[1000:300000], large.T, large[7:8], large[:0], tensors["small"]):
        release_pages(view)
        assert_same_tensors(tensors, expected)
    # Other arrays are not changed.
    release_pages(np.ones(5000))


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_released_memory_goes_back(tmp_path):
    path = write(tmp_path, random_tensors(8, {"t": (np.float32, (1 << 20,))})) / "model.safetensors"
    tensors = map_folder(tmp_path)
    assert tensors["t"].view(np.uint8).max() == 255
    assert resident_kilobytes(path) > 4000
    release_pages(tensors["t"])
    assert resident_kilobytes(path) < 100
