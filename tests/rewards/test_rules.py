"""Rules: goldens for each, the bounds on both sides, and one sentence for every mistake."""

import re
import warnings

import pytest
import trl.rewards

from reinforcepp.config.reward_rules import comparable, make_rule, matches
from reinforcepp.errors import ConfigError


def scores(rule, *texts, **columns):
    return make_rule(rule)([""] * len(texts), list(texts), **columns)


@pytest.mark.parametrize(
    ("rule", "lengths", "expected"),
    [
        ("length?min=4&max=8", [0, 2, 4, 8, 12, 16, 99], [0, 0.5, 1, 1, 0.5, 0, 0]),
        ("length?max=4", [0, 4, 5], [1, 1, 0.75]),
        ("length?min=4", [1, 400], [0.25, 1]),
        ("length", [0, 7], [1, 1]),
    ],
)
def test_length_is_1_within_its_bounds_and_falls_evenly_outside(rule, lengths, expected):
    given = {"completion_ids": [[5] * n for n in lengths]}
    assert scores(rule, *["a b"] * len(lengths), **given) == pytest.approx(expected)


def test_length_counts_in_the_unit_that_is_asked_for():
    assert scores("length?min=4&unit=words", "a bb", "a b c d") == [0.5, 1]
    assert scores("length?min=4&unit=characters", "a bb", "ab") == [1, 0.5]


def test_regex_finds_its_pattern_anywhere_and_takes_it_as_it_stands():
    assert scores(r"regex?pattern=\d+ ms", "it took 12 ms", "it took long") == [1, 0]
    assert scores("regex?pattern=a+b", "aab", "a+b") == [1, 0]
    assert scores("regex?pattern=^So.$", " So.\n", "Is it So.") == [1, 0]
    assert scores("regex?pattern=^(?i)x$".replace("^(?i)", "(?i)^"), "X", "xx") == [1, 0]
    assert scores("regex?pattern=a=1&b%20", "a=1&b%20", "a=1&b ") == [1, 0]
    assert make_rule("regex?name=numbers&pattern=&name&").name == "numbers"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("x_{i}", "x_{i} x_a"),  # in regex, any insertions
        ("(?:cat){e}", "cat{e} dog"),  # in regex, any errors
        ("a{2}b{,1}{", "aab{ aa{"),
        ("[[:alpha:]]", "a] :] b"),  # in regex, any letter
        (r"[\[{]\{[^]{]\}", "[{a} {{b}"),
        (r"\N{BULLET}{1}", "\u2022"),
        ("(?i)straße", "STRASSE Straße"),
    ],
)
def test_patterns_have_the_syntax_of_re(pattern, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of [[
        found = [match.span() for match in re.finditer(pattern, text)]
        assert found and [match.span() for match in matches("regex", pattern, text)] == found


def test_format_wants_its_tags_in_order_once_with_something_inside():
    good = "<think>a\nb</think>\n<answer>c</answer>"
    wrong = [
        "<answer>c</answer><think>a</think>",
        f"well {good}",
        f"{good} done",
        "<think>a</think>",
        "<think> </think><answer>c</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<think>a</think><answer>c</answer><answer>d</answer>",
        "",
    ]
    assert scores("format", good, f" {good}\n", *wrong) == [1, 1] + [0] * len(wrong)
    assert scores("format?tags=plan", "<plan>x</plan>", good) == [1, 0]


def test_exact_match_compares_texts_and_numbers():
    completions = ["Paris", " paris. ", "Rome", "1,200", "1200.0", ""]
    wanted = ["paris", "Paris", "Paris", 1200, "1200", "x"]
    assert scores("exact_match", *completions, answer=wanted) == [1, 1, 0, 1, 1, 0]


def test_exact_match_takes_the_last_match_and_its_group():
    pattern = r"exact_match?column=gold&pattern=is (\d+)"
    assert scores(pattern, "it is 3, no, it is 4", "it is 4 or it is 3", "no idea", gold=[4, 4, 4]) == [1, 0, 0]
    assert scores(r"exact_match?pattern=\d+", "1 then 2", answer=["2"]) == [1]


def test_exact_match_scores_no_row_without_an_answer():
    assert scores("exact_match", "a", "b", "c", answer=[None, "b", " "]) == [None, 1, None]
    with pytest.raises(ConfigError, match=r"column 'answr' not found.*answer, topic\..*'answer'"):
        scores("exact_match?column=answr", "a", answer=["a"], topic=["b"], completion_ids=[[1]], finish_reason=["stop"])
    with pytest.raises(ConfigError, match="only the prompt"):
        scores("exact_match", "a", completion_ids=[[1]])


GSM8K = "She sold 48/2 = 24 clips in May, and 24 - 6 = 18 in June.\n#### 18"


@pytest.mark.parametrize(
    ("rule", "completions", "expected"),
    [
        ("exact_match", ["18", "It is 24 - 6.\n#### 18", "#### 24", "24"], [1, 1, 0, 0]),
        (r"exact_match?pattern=####\s*(.+)", ["#### 18.0", "18", "#### 24"], [1, 0, 0]),
        (r"exact_match?pattern=-?\d+", ["It's 24, no, 18!", "24"], [1, 0]),
        (r"exact_match?pattern=<answer>(.*?)</answer>", ["<answer>18</answer>", "18"], [0, 0]),
    ],
)
def test_exact_match_reads_both_sides_alike(rule, completions, expected):
    assert scores(rule, *completions, answer=[GSM8K] * len(completions)) == expected


def test_exact_match_takes_a_value_without_the_pattern_as_it_is():
    rule = "exact_match?pattern=<answer>(.*?)</answer>"
    assert scores(rule, "<answer>18</answer>", "<answer>19</answer>", answer=["18", 18]) == [1, 0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("nan", "NaN", True), ("nan", "1", False), ("1e2", "100", True), ("-1", "1", False), ("a  b", "A b.", True)],
)
def test_what_counts_as_the_same(one, other, same):
    assert (comparable(one) == comparable(other)) is same


def test_repetition_takes_off_the_share_of_runs_said_before():
    assert scores("repetition", "a b c d", "a b c a b c", "x y", "") == pytest.approx([0, -0.25, 0, 0])
    assert scores("repetition?n=1", "a a a b") == [-0.5]


def test_soft_overlong_punishment_follows_dapo_and_trl():
    """DAPO Eq. 13 by hand: 100 - 20 = 80 tokens are free, 90 of them cost 10 / 20, 100 cost 20 / 20, more cost no more."""
    lengths, expected = [0, 80, 81, 90, 100, 101, 500], [0, 0, -0.05, -0.5, -1, -1, -1]
    ids = [[7] * n for n in lengths]
    rule = "soft_overlong_punishment?max_completion_len=100&soft_punish_cache=20"
    assert scores(rule, *[""] * len(ids), completion_ids=ids) == pytest.approx(expected)
    assert trl.rewards.get_soft_overlong_punishment(100, 20)(ids) == pytest.approx(expected)
    hard = "soft_overlong_punishment?max_completion_len=100&soft_punish_cache=0"
    assert scores(hard, *[""] * len(ids), completion_ids=ids) == [0, 0, 0, 0, 0, -1, -1]


@pytest.mark.parametrize("sentence", ["我喜欢吃苹果。", "これはテストです。", "สวัสดีครับ ", "Well done! "])
def test_repetition_needs_no_spaces_between_words(sentence):
    (repeated, once) = scores("repetition", sentence * 20, sentence)
    assert repeated < -0.9 and once == 0


def test_words_are_counted_by_unicode_word_breaks():
    assert scores("length?min=6&unit=words", "我喜欢吃苹果", "我喜欢", "one two, three!", "... !!! ???") == [
        1,
        0.5,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("lenght?min=1", "rule 'lenght' not found.*Did you mean 'length'"),
        ("length?mix=1", "rule:length.mix=1: option 'mix' not found.*Did you mean 'min'"),
        ("length?min=few", "min must be a whole number, not 'few'"),
        ("length?min=-1", "min must be at least 0"),
        ("length?max=0", "max must be at least 1"),
        ("length?min=9&max=8", "min 9 is above max 8"),
        ("length?unit=token", "unit must be one of.*Did you mean 'tokens'"),
        ("length?min=1&min=2", "min is given twice"),
        ("length?min", "'min' isn't an option"),
        ("length?min=", "'min=' isn't an option"),
        ("regex", "pattern is missing"),
        ("regex?pattern=(", "'\\(' isn't a regular expression"),
        ("regex?pattern=a{99999999999}", "isn't a regular expression"),
        ("exact_match?pattern=(", "isn't a regular expression"),
        ("format?tags=a b", "tags must be names"),
        ("repetition?n=0", "n must be at least 1"),
        ("soft_overlong_punishment?soft_punish_cache=2", "max_completion_len is missing.*max_completion_len=1024&soft"),
        ("soft_overlong_punishment?max_completion_len=8", "option soft_punish_cache is missing"),
        ("soft_overlong_punishment?max_completion_len=0&soft_punish_cache=0", "max_completion_len must be at least 1"),
        (
            "soft_overlong_punishment?max_completion_len=8&soft_punish_cache=9",
            "soft_punish_cache must be from 0 to .*8",
        ),
        ("", "rule '' not found"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_cure(rule, message):
    with pytest.raises(ConfigError, match=message):
        make_rule(rule)
