"""Token ids of conversations against the chat templates of real tokenizers.

    python benchmarks/conversations.py --tokenizers FOLDER [FOLDER ...] --pairs FILE

Every pair's prompt and both answers, and some conversations with tools, whitespace and other scripts, are encoded by
``encode_prompt`` and ``encode_answer``. A row is a mismatch if the ids differ from those of ``apply_chat_template``, up to
the token that ends the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from results import write_result

Row = tuple[list[dict[str, Any]], str]

WRITTEN: list[Row] = [
    ([{"role": "user", "content": "  Two lines,\n\nand spaces  "}], "\n\n  indented\n\n"),
    ([{"role": "user", "content": "def f(x):\n\treturn x"}], "    return x + 1"),
    ([{"role": "system", "content": "\nBe brief. "}, {"role": "user", "content": "Why?"}], " So. "),
    ([{"role": "user", "content": "请解释一下默认路由。"}], "默认路由把数据包发往网关。"),
    ([{"role": "system", "content": "أجب بإيجاز"}, {"role": "user", "content": "ما هو التوجيه؟"}], "إرسال الحزم."),
    ([{"role": "user", "content": "Grüße 👩‍💻 e\u0301"}], "🎉\u200d ok\u00a0"),
    (
        [
            {"role": "user", "content": "17 * 3?"},
            {"role": "assistant", "content": "<think>\n17 * 3 = 51\n</think>\n\n51"},
            {"role": "user", "content": "And 17 * 4?"},
        ],
        "<think>\n51 + 17\n</think>\n\n68",
    ),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "\nb \n"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "\n"},
        ],
        "d",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="folders of tokenizers with chat templates")
    parser.add_argument("--pairs", required=True, help="preference file with conversations")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    rows = [*WRITTEN, *rows_of(given.pairs)]
    found = []
    for folder in given.tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        different = [row for row in rows if not matches(tokenizer, *row)]
        for prompt, answer in different[:5]:
            print(f"{folder}: {prompt!r:.200} {answer!r:.100}")
        found.append({"tokenizer": Path(folder).name, "rows": len(rows), "mismatches": len(different)})
        print(found[-1], flush=True)
    write_result("conversations", {"tokenizers": found})


def rows_of(pairs: str) -> Iterator[Row]:
    from reinforcepp.data import load_preferences
    from reinforcepp.models.conversations import as_messages

    for pair in load_preferences(pairs, heldout_fraction=0, seed=0)[0].rows:
        messages = [dict(message) for message in as_messages(pair.conversation)]
        yield from ((messages, answer) for answer in (pair.chosen, pair.rejected))


def matches(tokenizer: Any, prompt: list[dict[str, Any]], answer: str) -> bool:
    from reinforcepp import encode_answer, encode_prompt
    from reinforcepp.models.tokenization import end_token_id

    def templated(messages: Sequence[dict[str, Any]], **settings: Any) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=True, **settings)["input_ids"]
        return ids

    whole = templated([*prompt, {"role": "assistant", "content": answer}])
    whole = whole[: len(whole) - whole[::-1].index(end_token_id(tokenizer))]
    same_prompt = encode_prompt(tokenizer, prompt) == templated(prompt, add_generation_prompt=True)
    return same_prompt and encode_answer(tokenizer, prompt, answer) == whole


if __name__ == "__main__":
    main()
