"""Read and write tokenizers so that they encode every text as their files say.

Transformers rebuilds some tokenizers by the rules of their class instead of reading ``tokenizer.json``. A wrong class in
``tokenizer_config.json`` then changes token ids, and so can saving, because some settings aren't written.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.errors import ModelError
from reinforcepp.files import sha256
from reinforcepp.models.remote_code import remote_code
from reinforcepp.runtime.terminal import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_PATTERNS = (TOKENIZER_FILE, TOKENIZER_CONFIG, "tekken.json", "vocab*", "*.model", "*.spm", "*.tiktoken")
"""Files of which a tokenizer has at least one."""
TEMPLATES = "additional_chat_templates"
"""Folder of the named chat templates of a tokenizer that has several."""
OTHER_TEMPLATES = "other_chat_templates"
"""Attribute of a tokenizer for the named chat templates that aren't in use."""
CHECKED = "checked_files"
"""Attribute of a tokenizer for the hash of its saved files, if they are known to encode texts equally."""
PREFERRED_TEMPLATES = ("default", "tool_use")

PROBES = (
    "How do I list all files? Use `ls -la`, then  read\tthe first\n\n    line.",
    "It's 12345 + 67.89 = 12412.89, isn't it?",
    "你好,世界!これはテストです。안녕하세요",
    "Größe, naïve café, Привет мир, مرحبا 🙂👩‍💻",
    "[INST] Name three colors. [/INST] red, green, blue",
    " leading and trailing space ",
    "def f(x):\n    return x**2  # CamelCase snake_case",
)
"""Texts that different tokenizers encode differently."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether ``folder`` holds the files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_PATTERNS)


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a name on the Hub, as ``tokenizer.json`` describes it if its class is wrong."""
    from transformers import AutoTokenizer

    return _as_in_its_file(AutoTokenizer.from_pretrained(path, **remote_code(path)), path)


def _as_in_its_file(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Return ``tokenizer``, or the one that ``tokenizer.json`` describes if the class in the configuration is wrong."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = Path(path) / TOKENIZER_FILE
    rebuilt = isinstance(tokenizer, PreTrainedTokenizerFast) and "__init__" in vars(type(tokenizer))
    if not rebuilt or not file.is_file():
        return tokenizer
    raw = Tokenizer.from_file(str(file))
    if all(raw.encode(text, add_special_tokens=False).ids == _ids(tokenizer, text) for text in PROBES):
        return tokenizer
    described = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
    if all(_ids(described, text) == _ids(tokenizer, text) for text in PROBES):
        return tokenizer  # settings of tokenizer_config.json differ from tokenizer.json, which every class respects
    if not _is_byte_level(raw) and _lost(tokenizer) <= _lost(described):
        return tokenizer  # SentencePiece vocabularies differ in the space after a special token
    warn_once(
        f"{path}: the class {type(tokenizer).__name__} in {TOKENIZER_CONFIG} encodes texts differently than {TOKENIZER_FILE}. "
        f"Using {TOKENIZER_FILE}."
    )
    return described


def _is_byte_level(raw: Any) -> bool:
    return "ByteLevel" in str(raw.pre_tokenizer)


def _lost(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of probe texts that differ after encoding and decoding."""
    decoded = (str(tokenizer.decode(_ids(tokenizer, text), clean_up_tokenization_spaces=False)) for text in PROBES)
    return sum(text.strip() != after.strip() for text, after in zip(PROBES, decoded, strict=True))


def keep_settings(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``save_pretrained`` write the settings of the tokenizer's class, such as ``legacy``, which it would omit."""
    for name in inspect.signature(type(tokenizer).__init__).parameters:
        value = getattr(tokenizer, name, None)
        if name not in tokenizer.init_kwargs and isinstance(value, bool | int | str):
            tokenizer.init_kwargs[name] = value


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Use one chat template of several; the others are saved with the tokenizer.

    Raises:
        ModelError: none is called default or tool_use.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return
    chosen = next((key for key in PREFERRED_TEMPLATES if key in templates), None)
    if chosen is None:
        raise ModelError(
            f"{name}: the tokenizer has the chat templates {', '.join(sorted(templates))}, but none called default. Rename "
            f"one in {TOKENIZER_CONFIG}, or remove the others."
        )
    warn_once(f"{name}: using the chat template {chosen!r} of {', '.join(sorted(templates))}.")
    tokenizer.chat_template = templates[chosen]
    setattr(tokenizer, OTHER_TEMPLATES, {key: text for key, text in templates.items() if key != "default"})


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save ``tokenizer`` and its chat templates, and check that the saved one encodes texts equally.

    Raises:
        ModelError: it doesn't, and copying the files of the original tokenizer doesn't help.
    """
    tokenizer.save_pretrained(folder)
    for name, text in getattr(tokenizer, OTHER_TEMPLATES, {}).items():
        (folder / TEMPLATES).mkdir(exist_ok=True)
        (folder / TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8")
    content = _hash_of(folder)
    if getattr(tokenizer, CHECKED, None) == content:
        return  # reading the tokenizer of every checkpoint would take seconds each time
    saved = read_tokenizer(str(folder))
    if _is_same(tokenizer, saved):
        setattr(tokenizer, CHECKED, content)
        return
    source = Path(str(tokenizer.name_or_path))
    if (source / TOKENIZER_FILE).is_file() and source.resolve() != folder.resolve():
        _copy_files(source, folder)
        copied = read_tokenizer(str(folder))
        if _is_same(tokenizer, copied) or _encodes_equally(tokenizer, copied):
            return
        tokenizer.save_pretrained(folder)
    if not _encodes_equally(tokenizer, saved):
        raise ModelError(
            f"{tokenizer.name_or_path or 'the given tokenizer'}: after saving, the tokenizer encodes texts differently, so the "
            "trained model would be useless. Check that each special token (pad_token, for example) is an added token."
        )


def _hash_of(folder: Path) -> str:
    """Return a hash of all files but the weights, because config.json can decide which class reads the tokenizer."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"]
    digests = [(path.name, sha256(path)) for path in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _copy_files(source: Path, folder: Path) -> None:
    """Copy ``tokenizer.json``, and add the settings that the saved configuration lacks."""
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    if not (source / TOKENIZER_CONFIG).is_file():
        return
    original, saved = (json.loads((path / TOKENIZER_CONFIG).read_text(encoding="utf-8")) for path in (source, folder))
    added = {key: value for key, value in original.items() if key not in ("chat_template", "auto_map")}
    text = json.dumps({**added, **saved}, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two tokenizers have the same backend, so that they encode every text equally."""
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if None in backends:
        return _encodes_equally(one, other)
    return len({backend.to_str() for backend in backends if backend is not None}) == 1


def _encodes_equally(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers have the same special tokens, and encode probe texts and special tokens equally."""
    if one.special_tokens_map != other.special_tokens_map or len(one) != len(other):
        return False
    return all(
        _ids(one, text) == _ids(other, text) and one(text)["input_ids"] == other(text)["input_ids"]
        for text in _texts_with_special_tokens(one)
    )


def _texts_with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from PROBES
    for token in tokenizer.all_special_tokens:
        yield f"{token}[INST] word  {token}\nword{token} word"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
