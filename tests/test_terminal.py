"""Number formats, and text that could harm a terminal."""

import math

from gptoss_jax.terminal import format_count, format_duration, format_rate, format_si, printable


def test_number_formats():
    assert [format_count(n) for n in (950, 999_950, 105_722_880, 20_914_757_184, None)] == [
        "950", "1.0M", "105.7M", "20.9B", "–",
    ]  # fmt: skip
    assert [format_duration(s) for s in (5.4, 251.6, 3723, None)] == ["0:05", "4:12", "1:02:03", "–"]
    assert [format_si(f, "FLOP/s") for f in (132.4e9, 999.9e9, 1.05e15, None)] == [
        "132 GFLOP/s", "1.00 TFLOP/s", "1.05 PFLOP/s", "–",
    ]  # fmt: skip
    assert [format_si(n, "B") for n in (22, 777, 5.3e9)] == ["22 B", "777 B", "5.30 GB"]
    assert [format_si(s, "s") for s in (0.0125, 0.0, 1.5)] == ["12.5 ms", "0.00 ms", "1.50 s"]
    assert [format_rate(r) for r in (1.2e-3, 3e-4, 0.0, math.nan)] == ["1.2e-3", "3.0e-4", "0", "nan"]


def test_printable_text():
    assert (
        printable("a\tb\r\n\x1b[31m\x07\rc\x9b\ud800\u202e") == "a   b\n\\x1b[31m\\x07\\rc\\x9b\\ud800\\u202e"
    )
    assert printable("naïve 日本 👩\u200d🚀") == "naïve 日本 👩\u200d🚀"
