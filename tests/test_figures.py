"""The figures of the docs are those of benchmarks/results, and benchmarks/figures.py writes them."""

import importlib
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RECORD = {
    "date": "2026-01-02",
    "hardware": {"cpu": "Intel(R) Xeon(R) Processor @ 2.90GHz", "cores": 3, "memory": 5 << 30},
    "versions": {"jax": "0.10.2", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "rounds": 4,
}
SOURCE = "*2026-01-02; Intel Xeon, 3 cores, 5 GiB, jax 0.10.2, torch 2.13.0; 4 rounds.*"


@pytest.fixture(scope="module")
def module():
    """Imports a module of the benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def figures(module):
    return module("figures")


@pytest.fixture(scope="module")
def blocks(module):
    return module("page_blocks")


def spread(median):
    return {"median": median, "min": median - 1, "max": median + 1}


def test_the_pages_have_the_figures_of_the_results(figures):
    assert figures.differing() == [], "run: python benchmarks/figures.py --write"


def test_every_part_is_on_one_page(figures, blocks):
    names = [name for _, page in figures.pages() for name in blocks.written(page)]
    assert sorted(names) == sorted(figures.PARTS)


def test_no_table_of_performance_is_typed_by_hand(blocks):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    typed = blocks.rewritten(page, lambda name: "")
    assert [line for line in typed.splitlines() if re.match(r"\|.*\b\d", line)] == []


def test_every_benchmark_is_a_script(figures):
    for name in figures.BENCHMARKS:
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_parts_of_a_page(blocks):
    page = "a <!-- figures: one --> 5 <!-- end of figures --> b\n<!-- figures: two-x -->\n\n| 6 |\n\n"
    page += "<!-- end of figures -->\nc\n<!-- figures: new -->\n<!-- end of figures -->\n"
    assert blocks.written(page) == {"one": "5", "two-x": "| 6 |", "new": ""}
    assert blocks.rewritten(page, str.upper) == (
        "a <!-- figures: one --> ONE <!-- end of figures --> b\n<!-- figures: two-x -->\n\nTWO-X\n\n"
        "<!-- end of figures -->\nc\n<!-- figures: new -->\n\nNEW\n\n<!-- end of figures -->\n"
    )
    assert blocks.rewritten(blocks.rewritten(page, str.upper), str.upper) == blocks.rewritten(page, str.upper)


def test_tables_and_numbers(blocks):
    assert blocks.table(["a", "b"], [["x", None], ["y", "7"]]) == (
        "| a | b |\n| --- | ---: |\n| x | |\n| y | 7 |"
    )
    assert blocks.spread(spread(1234.5), 1) == "1,234.5 (1,233.5–1,235.5)"
    assert blocks.spread(spread(2), scale=1e3) == "2,000 (1,000–3,000)"
    assert blocks.number(2_345_000, 1, 1e-6) == "2.3" and blocks.share(0.567) == "57%"
    assert [show(None) for show in (blocks.number, blocks.ratio, blocks.share, blocks.spread)] == [None] * 4
    assert blocks.ratio(1.456) == "1.46"


def test_the_source_of_figures(blocks):
    assert blocks.source(RECORD) == SOURCE
    mixed = RECORD | {"rounds": 1, "results": [{"date": "2025-12-31"}, {}]}
    assert blocks.source(mixed, "more") == (
        "*2025-12-31 to 2026-01-02; Intel Xeon, 3 cores, 5 GiB, jax 0.10.2, torch 2.13.0; 1 round; more.*"
    )
    assert blocks.source({"date": "2026-01-02", "hardware": {"cpu": "x86_64", "cores": 2}}) == (
        "*2026-01-02; x86_64, 2 cores.*"
    )


def test_a_table_with_any_peers(module):
    found = [
        {
            "experts": 4,
            "top_k": 2,
            "of_peak": 0.614,
            "ratios": {"gptoss_jax": 1.0, "eager": 1.25, "new": 3.0},
        },
        {"experts": 128, "top_k": 4, "of_peak": 0.5, "ratios": {"gptoss_jax": 1.0, "new": 2.0}},
    ]
    for result in found:
        result["tokens_per_second"] = {name: spread(60 / ratio) for name, ratio in result["ratios"].items()}
    assert module("figures_speed").training(RECORD | {"results": found}).splitlines() == [
        "| experts | tokens/s, ours | transformers, eager | transformers, new | ours / the fastest "
        "| share of the matmul peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 4, top-2 | 60 (59–61) | 48 (47–49) | 20 (19–21) | 1.25 | 61% |",
        "| 128, top-4 | 60 (59–61) | | 30 (29–31) | 2.00 | 50% |",
        "",
        SOURCE,
    ]


def test_the_sentence_of_the_readme(module):
    training = {"results": [{"ratios": {"gptoss_jax": 1.0, "a": 1.31, "b": 5}}, {"ratios": {"a": 1.55}}]}
    decoding = {"results": [{"ratios": {"decode": 2.04}}, {"ratios": {"decode": 3.16}}]}
    text = " ".join(module("figures_speed").speed(training, decoding).split())
    assert text.startswith("is 1.3 to 1.6 times as fast as in transformers")
    assert text.endswith("decoding is 2.0 to 3.2 times as fast")


def test_programs_that_were_compiled_for_some_chips(module):
    common = {"date": "2026-01-02", "versions": {"jax": "0.10.2", "libtpu": "0.0.42"}, "useful_flops": None}
    rows = [
        common | {"program": "gpt-oss-20b, decoding", "chip": "v5e", "refusal": "RESOURCE_EXHAUSTED"},
        common | {"program": "gpt-oss-20b, decoding", "chip": "v6e", "arguments": 2.5e9, "temporaries": 3e8},
        common | {"program": "down", "chip": "v5p", "temporaries": 4e8, "compile_seconds": 7.4}
        | {"flops": 6.0, "useful_flops": 3.0},
    ]  # fmt: skip
    compiled = module("figures_kernels")
    assert "| decoding | does not fit | | 2.50 + 0.30 |\n" in compiled.compiled_generation(rows)
    text = compiled.compiled_kernels(rows)
    assert "| down | 2.00 | | 0.40 | | 7 |\n" in text
    assert text.endswith("\n\n*2026-01-02; jax 0.10.2, libtpu 0.0.42.*")


def test_memory_of_training(module):
    def collectives(*sent):
        kinds = ("all-gather", "ragged-all-to-all", "all-reduce")
        pairs = zip(kinds, sent, strict=True)
        return {"collectives": [{"kind": kind, "sent": 1e9 * some} for kind, some in pairs]}

    memory = {"total": 25.16e9}
    estimate = {"memory": memory, "compute_seconds": 0.256, "communication_seconds": 0.05} | collectives(
        4, 11, 6
    )
    row = {"preset": "gpt_oss_20b", "devices": "v5p:2x2x4", "mesh": "fsdp=16", "count": 16, "memory": 95e9}
    row |= {"batch_size": 16, "seq_len": 32768, "estimate": estimate, "date": "2026-01-02"}
    row |= {"versions": {"jax": "0.10.2", "libtpu": "0.0.42"}, "compiled": None}
    fits = {"fits": True, "peak": 29.72e9, "available": 102.8e9} | collectives(5.5, 30, 7)
    too_large = {"fits": False, "needed": 110e9, "available": 102.8e9, "collectives": []}
    rows = [
        row | {"estimate": estimate | {"fits": True}},
        row | {"compiled": fits},
        row | {"compiled": too_large},
    ]
    text = module("figures_kernels").training_memory([*rows, row | {"flags": "of fine-tuning"}])
    start = "| 20b | 16 (v5p:2x2x4) | `fsdp=16` | 16 × 32,768"
    assert text.splitlines()[2:] == [
        f"{start} | 95.0 | 25.2 | from shapes | yes | 0.26 + 0.05 s | 10.0 |",
        f"{start} | 102.8 | 25.2 | 29.7 | yes | 0.26 + 0.05 s | 10.0, 12.5 |",
        f"{start} | 102.8 | 25.2 | 110.0 | no | 0.26 + 0.05 s | 10.0 |",
        "",
        "*2026-01-02; jax 0.10.2, libtpu 0.0.42.*",
    ]


def test_an_unknown_part(figures):
    with pytest.raises(ValueError, match="^figures: trainig: no such part; known: speed, training, "):
        figures.make("trainig")


def test_write_and_check(figures, monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("a\n<!-- figures: new -->\n<!-- end of figures -->\nb\n")
    (tmp_path / "README.md").write_text("no figures\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "PARTS", {"new": (("some",), lambda record: f"| {record['value']} |")})
    assert figures.main(["--write", "--check"]) == 0
    assert "\n*Not measured yet: no `benchmarks/results/some.json`.*\n" in page.read_text()
    (tmp_path / "results" / "some.json").write_text(json.dumps({"value": 7}))
    assert figures.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/page.md: figures: new differ from benchmarks/results\n"
    assert figures.main(["--write", "--check"]) == 0
    assert page.read_text() == "a\n<!-- figures: new -->\n\n| 7 |\n\n<!-- end of figures -->\nb\n"
    assert capsys.readouterr().out == ""
    assert figures.main([]) == 0
    assert capsys.readouterr().out == "docs/page.md, new\n\n| 7 |\n\n"


def test_run_uses_the_environments_of_the_peers_and_goes_on_after_a_failure(figures, monkeypatch, capsys):
    commands = []

    def run(command, check):
        script = pathlib.Path(command[1]).name
        commands.append([command[0], script, *command[2:]])
        return types.SimpleNamespace(returncode=int(script == "finetune.py"))

    monkeypatch.setattr(subprocess, "run", run)
    names = ["finetune", "serve_vs_llamacpp", "remat"]
    flags = ["--python", "torch/python", "--llamacpp-python", "llama/python"]
    assert figures.main(["--run", *names, *flags]) == 1
    assert commands == [
        ["torch/python", "finetune.py"],
        [sys.executable, "serve_vs_llamacpp.py", "--peer-python", "llama/python"],
        [sys.executable, "remat.py"],
    ]
    assert capsys.readouterr().out.endswith("failed: finetune\n")
    commands.clear()
    figures.main(["--run", "all"])
    assert [command[1] for command in commands] == [f"{name}.py" for name in figures.BENCHMARKS]


def test_kept_results_have_the_date_of_their_run(module, monkeypatch, tmp_path):
    common = module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert common.previous_results("some") == []
    record = {"date": "2026-01-02", "results": [{"a": 1}, {"a": 2, "date": "2025-12-31"}]}
    (tmp_path / "some.json").write_text(json.dumps(record))
    assert common.previous_results("some") == [
        {"date": "2026-01-02", "a": 1},
        {"date": "2025-12-31", "a": 2},
    ]
