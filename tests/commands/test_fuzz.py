"""A few hundred cases of benchmarks/fuzz.py."""

from scripts import result_of


def test_bad_input_gives_a_result_or_a_named_error(tmp_path):
    result = result_of("fuzz", tmp_path, "--cases", "50")
    assert result["tracebacks"] == result["hangs"] == 0, result["failures"]
    assert result["cases"] >= 490
    for kind in ("csv", "damaged csv", "json and parquet", "json of any shape", "settings", "rewards"):
        found = result["kinds"][kind]
        assert found["results"] and found["named_errors"], (
            f"{kind}: both outcomes must occur, or the cases are too narrow"
        )
