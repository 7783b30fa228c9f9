"""Prepare a reward model's tokenizer so that plain transformers and TRL score texts as this package does.

Transformers reads the score at the last token that isn't the pad token. If EOS pads, too, it reads one token too early. If the
chat template writes a line feed after the last turn, it reads there instead of at the end token.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from reinforcepp.models.tokenization import end_token_id, eos_token_id
from reinforcepp.runtime.terminal import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logger(__name__)

NEW_PAD_TOKEN = "<|pad|>"
PROBE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
UNUSED = re.compile(r"pad|unused|reserved", re.IGNORECASE)


def separate_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, resize: bool) -> None:
    """Set the pad token of ``model`` and ``tokenizer`` to one that never ends a text.

    It is the present pad token if that ends no text, or an unused special token, or a new token. A new token takes a spare
    row of the embeddings; if there is none, ``resize`` allows to add one.
    """
    ends = {eos_token_id(tokenizer), end_token_id(tokenizer)}
    if tokenizer.pad_token_id in ends:
        token = _unused_token(tokenizer, ends)
        rows = model.get_input_embeddings().weight.shape[0]
        if token is None and len(tokenizer) >= rows and not resize:
            log.warning(
                "The reward model pads with EOS, because the tokenizer has no unused token and an adapter can't add one. Other "
                "programs read its score one token too early; those of reinforcepp read it at EOS."
            )
            return
        tokenizer.add_special_tokens({"pad_token": token or NEW_PAD_TOKEN})
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _unused_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """Return a special token that texts don't end with: one for padding, an unused one, the unknown token, or BOS."""
    special = {
        i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in ends
    }
    named = [text for text in special.values() if UNUSED.search(text)]
    named.sort(key=lambda text: "pad" not in text.lower())
    rare = [text for text in (tokenizer.unk_token, tokenizer.bos_token) if text in special.values()]
    return next(iter([*named, *rare]), None)


def end_conversations_at_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change the chat template so that a conversation ends with the token that ends its answer, where the score is read.

    A text after that token is removed from the last answer. If the template writes no such token, it is added.
    """
    end = str(tokenizer.decode([end_token_id(tokenizer)]))
    template, whole = str(tokenizer.chat_template), str(tokenizer.apply_chat_template(PROBE, tokenize=False))
    answer, tail = str(PROBE[-1]["content"]), whole.rpartition(end)[2]
    if whole.endswith(end) or (end in whole and answer in tail):
        return
    ending = end + tail if end in whole else ""
    kept = f"conversation[:-{len(tail)}] if conversation.endswith({ending!r}) else conversation"
    tokenizer.chat_template = (
        "{% set conversation +%}"
        + template.removesuffix("\n")
        + "{%+ endset %}{% if messages[-1]['role'] != 'assistant' or add_generation_prompt %}{{ conversation }}{% else %}"
        + (f"{{{{ {kept} }}}}" if ending else f"{{{{ conversation + {end!r} }}}}")
        + "{% endif %}"
    )
    if str(tokenizer.apply_chat_template(PROBE, tokenize=False)) != (
        whole.removesuffix(tail) if ending else whole + end
    ):
        tokenizer.chat_template = template
        log.warning(
            "The chat template writes %r after the last answer. TRL reads the score there, reinforcepp at the end token %r.",
            tail,
            end,
        )
