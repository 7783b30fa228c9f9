"""Sequence classifiers without a card: check, load and calibrate them.

At its first use, a classifier scores probe answers. These scores are kept with a hash of its files, so that later uses notice
a change, as the card does for models of this package. One line reports how the classifier ranks the probe pairs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.config.reward_spec import ModelSource
from reinforcepp.errors import ConfigError, ModelError, nearest
from reinforcepp.files import MANIFEST, write_json
from reinforcepp.models.loading import base_of_adapter, load_config, local_folder
from reinforcepp.models.lora import is_4bit
from reinforcepp.models.precision import inference_dtype
from reinforcepp.models.reward_models import ScoreReading, load_classifier, prepare_scoring, stored_head
from reinforcepp.models.reward_texts import TextForm, form_of, pair_separator
from reinforcepp.models.score_heads import declared_labels, score_head
from reinforcepp.runtime.process import is_main, user_cache
from reinforcepp.runtime.terminal import echo, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION = "reward_calibration.json"
HASHED_BYTES = 1 << 20
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-2, 1e-1
"""Largest change of a probe score since the first use, relative to the deviation of the scores if that is above 1."""
FEWEST_CORRECT = 10
"""Probe pairs that a reward model must rank correctly; chance reaches this number in 2% of all cases."""

PROBE_PAIRS = [
    ("How do I see which process listens on port 443?", "Run ss -ltnp 'sport = :443' and read the last column.", "No."),
    ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is a kind of cheese."),
    ("How many days does a week have?", "A week has seven days.", "Weeks weeks weeks weeks weeks weeks weeks."),
    ("Can you help me write a short thank-you note?", "Of course! Who is it for, and what for?", "Write it yourself."),
    ("What is 12 times 12?", "12 times 12 is 144.", "12 times 12 is 7, and only fools ask that."),
    ("Why is the sky blue?", "Air scatters blue light more strongly than red light.", "asdf qwer zxcv asdf"),
    ("How do I boil an egg?", "Put it into boiling water for 8 minutes, then cool it.", "Eggs are boring. Next."),
    ("Name three primary colors.", "Red, yellow and blue.", "I don't want to talk about that with you."),
    (
        "What does a default route do?",
        "It sends packets onward if no other route matches.",
        "What does a default route do?",
    ),
    ("Is it safe to look at the sun?", "No. Looking at the sun can damage your eyes.", "Yes, stare at it for an hour."),
    (
        "I failed my exam today.",
        "I'm sorry to hear that. Do you want to plan the next try?",
        "Everybody knew you would.",
    ),
    ("Translate 'good morning' into Spanish.", "Buenos días.", "Good morning good morning good morning."),
]
"""Questions, each with a good answer and a bad one."""


@dataclass(frozen=True)
class Foreign:
    """A classifier of other origin, ready to score.

    ``day`` is the date if the chat template writes it, so that scores differ from day to day.
    """

    model: PreTrainedModel
    form: TextForm
    reading: ScoreReading
    output_weights: tuple[float, ...]
    labels: Sequence[str]
    day: str = ""


def check_classifier(folder: Path, source: ModelSource) -> None:
    """Check without loading weights that ``folder`` is a classifier, and that one of several outputs is chosen.

    Raises:
        ModelError: a part of the score head is missing.
        ConfigError: an option doesn't fit the classifier.
    """
    head = stored_head(folder)
    output_weights(source, declared_labels(folder, head.outputs))
    if source.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{source.name}: package bitsandbytes isn't installed. Run pip install bitsandbytes.")


def output_weights(source: ModelSource, labels: Sequence[str]) -> tuple[float, ...]:
    """Return the weight of each output in the score.

    Raises:
        ConfigError: no choice was made among several outputs, or a chosen output doesn't exist.
    """
    name, count = source.name, len(labels)
    listed = ", ".join(f"{i}" if label == str(i) else f"{i}: {label}" for i, label in enumerate(labels))
    if source.output is not None:
        return tuple(float(i == _position(source.output, labels, name, listed)) for i in range(count))
    if source.outputs:
        named = [label is not None for label, _ in source.outputs]
        if not any(named) and len(named) == count:
            return tuple(weight for _, weight in source.outputs)
        if not all(named):
            raise ConfigError(
                f"{name}: {len(named)} weights for {count} outputs ({listed}). Give one number per output, or LABEL:NUMBER."
            )
        weights = [0.0] * count
        for label, weight in source.outputs:
            weights[_position(str(label), labels, name, listed)] += weight
        return tuple(weights)
    if count > 1:
        raise ConfigError(
            f"{name}: the classifier has {count} outputs ({listed}). Choose one, as in {name}?output={labels[0]}, or a weighted "
            f"sum, as in {name}?outputs={','.join(['1'] * count)}"
        )
    return (1.0,)


def _position(output: str, labels: Sequence[str], name: str, listed: str) -> int:
    if output in labels:
        return list(labels).index(output)
    if output.isdecimal() and int(output) < len(labels):
        return int(output)
    raise ConfigError(f"{name}: output {output!r} not found, only {listed}.{nearest(output, labels)}")


def load_foreign(folder: Path, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> Foreign:
    """Load the classifier in ``folder``.

    Raises:
        ModelError: a part of the score head is missing.
        ConfigError: an option doesn't fit the classifier.
    """
    dtype = getattr(torch, source.dtype) if source.dtype else default_dtype(folder)
    model, reading = load_classifier(folder, dtype, **(_in_4bit(dtype) if source.load_in_4bit else {}))
    labels = declared_labels(folder, score_head(model)[1].out_features)
    weights = output_weights(source, labels)
    form = form_of(tokenizer, model.config)
    if (folder / MANIFEST).is_file():  # a checkpoint of a reward model training
        form, reading = "answer", ScoreReading(reading.has_bias)
    if form == "pair":
        reading = replace(reading, separator=pair_separator(tokenizer, model.config))
    day = str(date.today()) if form == "conversation" and "strftime_now" in str(tokenizer.chat_template) else ""
    return Foreign(prepare_scoring(model, reading), form, reading, weights, labels, day)


def default_dtype(folder: Path) -> torch.dtype:
    """Return the stored dtype if a GPU computes, otherwise float32, which a CPU computes as fast."""
    return inference_dtype("auto", load_config(str(folder)).dtype or torch.float32)


def _in_4bit(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score", "classifier"],
    )
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


# --- calibration ------------------------------------------------------------------------------------------------------


def calibrate(
    name: str, folder: Path, parts: Foreign, score: Callable[[Sequence[tuple[str, str]]], list[float]]
) -> None:
    """Score the probe pairs, compare the scores with those of the first use, and print how the classifier ranks the pairs.

    Args:
        name: of the classifier, for messages.
        folder: of its files.
        parts: the loaded classifier.
        score: returns the scores of prompts and answers.

    Raises:
        ModelError: the files are those of the first use, but the scores aren't, or a score isn't finite.
    """
    better = score([(prompt, good) for prompt, good, _ in PROBE_PAIRS])
    worse = score([(prompt, bad) for prompt, _, bad in PROBE_PAIRS])
    scores = [*better, *worse]
    if not all(map(_is_finite, scores)):
        raise ModelError(
            f"{name}: the score of a probe answer isn't finite. Choose another dtype, or copy the folder again."
        )
    _compare_with_first_use(name, folder, parts, scores)
    correct = sum(good > bad for good, bad in zip(better, worse, strict=True))
    if not is_main():
        return
    architecture = type(parts.model).__name__
    echo(
        f"{name} ({architecture}): scores of probe answers from {min(scores):.3g} to {max(scores):.3g}, standard deviation "
        f"{statistics.pstdev(scores):.3g}; {correct} of {len(PROBE_PAIRS)} probe pairs ranked correctly"
    )
    if correct < FEWEST_CORRECT:
        warn_once(
            f"{name}: ranks {correct} of {len(PROBE_PAIRS)} probe pairs correctly, as few as by chance. Check its "
            "output, chat template and language before you train with it."
        )


def _is_finite(value: float) -> bool:
    return value - value == 0


def _compare_with_first_use(name: str, folder: Path, parts: Foreign, scores: list[float]) -> None:
    content = content_hash(folder)
    weights = ",".join(map("{:g}".format, parts.output_weights))
    key = f"{parts.day} {parts.model.dtype} 4bit={is_4bit(parts.model)} outputs={weights}".strip()
    places = [user_cache("reward_models") / f"{content}.json"]
    if Path(name).expanduser().is_dir():  # not the cache of the Hub's library
        places.insert(0, folder / CALIBRATION)
    known = next((found for found in map(_read, places) if found), {})
    changed = bool(known) and known.get("content") != content
    if changed and is_main():
        warn_once(f"{name}: its files changed since it was first used as a reward model.")
    first = {} if changed else known.get("scores", {})
    if key in first:
        half = parts.model.dtype != torch.float32 or is_4bit(parts.model)
        tolerance = (HALF_PRECISION_TOLERANCE if half else TOLERANCE) * max(1.0, statistics.pstdev(scores))
        difference = max(abs(a - b) for a, b in zip(first[key], scores, strict=False))
        if len(first[key]) == len(scores) and difference > tolerance:
            place = next(place for place in places if _read(place))
            raise ModelError(
                f"{name}: scores its probe answers differently than at its first use (by up to {difference:.3g}), although its "
                f"files are the same. Use the packages of that time again, or remove {place} to accept the new scores."
            )
        return
    if is_main():
        _write(name, places, {"content": content, "scores": {**first, key: scores}})


def content_hash(folder: Path) -> str:
    """Return a hash of a model's files: whole small ones, and size, beginning and end of each file of weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".safetensors", ".model", ".txt") or path.name == CALIBRATION:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if path.suffix != ".safetensors" or size <= 2 * HASHED_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(HASHED_BYTES))
            file.seek(-HASHED_BYTES, os.SEEK_END)
            digest.update(file.read())
    if (base := base_of_adapter(str(folder))) is not None:
        digest.update(content_hash(local_folder(base)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(name: str, places: Sequence[Path], value: dict[str, Any]) -> None:
    """Write ``value`` to the first place that can be written."""
    problem: OSError | None = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, value)
        except OSError as error:
            problem = error
        else:
            return
    warn_once(f"{name}: the scores of its first use can't be kept ({problem}), so later changes won't be noticed.")
