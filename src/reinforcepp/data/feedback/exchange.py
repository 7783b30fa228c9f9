"""Votes as records of Argilla and Label Studio, and from them and from the page of ``compare``.

    Argilla         {"fields": {"prompt", "response_1", ...}, "responses": {QUESTION: [{"value", "user_id"}]}}
    Label Studio    {"data": {"prompt", "answer1", ...}, "annotations": [{"result": [{"type", "from_name", "value"}]}]}
    compare         {"prompt", "answer_a", "answer_b", "model_a", "model_b", "temperature", "vote": "A", "B" or "tie"}

Records of other projects are read if they follow the same pattern: a prompt, responses whose names begin alike, and questions
for a choice, a ranking, or a rating per response.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reinforcepp.data.columns import PROMPTS
from reinforcepp.data.feedback.preferences import Cast
from reinforcepp.data.feedback.records import TEMPLATE_COLUMNS, Answer, NewUnit, Unit
from reinforcepp.data.feedback.votes import Choice, Edit, Ranking, Ratings, Skip, Vote, parse_vote
from reinforcepp.data.messages import UnusableCell, conversation_text, parse_content
from reinforcepp.errors import DataError
from reinforcepp.types import Conversation

Imported = tuple[NewUnit, str, Vote, float]
"""A unit, the name of the labeler, the vote and its time in seconds."""
USERS = uuid.UUID("5f1c0f8e-8a35-4b8e-9d7c-3c2b8a1d9e60")
"""Namespace of the users' ids in Argilla, which derive from their names."""
_NUMBERED = re.compile(r"(?:response|answer|completion|generation|text)[_\- ]?([1-9]|[ab])", re.IGNORECASE)
_RATED = re.compile(_NUMBERED.pattern + r"[_\- ]?(\w*)", re.IGNORECASE)
_SIDES = {"left": 1, "right": 2, "a": 1, "b": 2}
TIES = {"both good": "good", "both bad": "bad", "tie": "good", "both_good": "good", "both_bad": "bad"}
MUCH = "much better"
MAX_NAME_CHARACTERS = 100


# --- Argilla ----------------------------------------------------------------------------------------------------------


def to_argilla(unit: Unit, casts: Sequence[Cast]) -> dict[str, Any]:
    """Return the record of a unit, as ``dataset.records.to_json`` writes it and ``from_json`` reads it."""
    responses: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cast in casts:
        for question, value in _argilla_values(cast.vote).items():
            responses[question].append({"value": value, "user_id": str(uuid.uuid5(USERS, cast.labeler))})
    return {
        "id": str(unit.id),
        "fields": {"prompt": unit.prompt, **{f"response_{i}": each.text for i, each in enumerate(unit.answers, 1)}},
        "metadata": _metadata(unit, casts),
        "suggestions": {},
        "responses": dict(responses),
        "vectors": {},
        "status": "completed" if responses else "pending",
        "_server_id": None,
    }


def _metadata(unit: Unit, casts: Sequence[Cast]) -> dict[str, Any]:
    """Return what the tools keep without reading it: numbers and texts by name."""
    values: dict[str, Any] = {"topic": unit.topic} if unit.topic else {}
    values |= {name: json.dumps(value) for name, value in unit.variables.items()}
    for i, answer in enumerate(unit.answers, 1):
        values |= {f"model_{i}": answer.model} if answer.model else {}
        values |= {f"temperature_{i}": answer.sampling["temperature"]} if "temperature" in answer.sampling else {}
        values |= {f"truncated_{i}": "true"} if answer.truncated else {}
    values |= {f"labeler_{uuid.uuid5(USERS, cast.labeler)}": cast.labeler for cast in casts}
    return values | {f"seconds_{uuid.uuid5(USERS, cast.labeler)}": cast.seconds for cast in casts}


def _argilla_values(vote: Vote) -> dict[str, Any]:
    if isinstance(vote, Choice):
        strength = {"strength": "much_better"} if vote.strength > 1 else {}
        return {"preference": f"both_{vote.tie}" if vote.better is None else f"response_{vote.better + 1}", **strength}
    if isinstance(vote, Ranking):
        return {"ranking": [{"value": f"response_{i}", "rank": rank} for i, rank in enumerate(vote.ranks, 1)]}
    if isinstance(vote, Ratings):
        return {f"response_{i}_{name}": n for i, each in enumerate(vote.ratings, 1) for name, n in each.items()}
    return {"preference": f"response_{vote.better + 1}", "edited": vote.text} if isinstance(vote, Edit) else {}


def from_argilla(record: Mapping[str, Any], labeler: str) -> Iterator[Imported]:
    """Yield the votes in a record; ``labeler`` is the name of users without one."""
    fields, metadata = record.get("fields") or {}, record.get("metadata") or {}
    prompt, answers = _texts(fields, metadata)
    by_user: dict[str, dict[str, Any]] = defaultdict(dict)
    for question, responses in (record.get("responses") or {}).items():
        for each in responses if isinstance(responses, list) else ():
            by_user[str(each.get("user_id") or "")][question] = each.get("value")
    for user, values in by_user.items():
        found = _vote(len(answers), _from_argilla_values(values, len(answers)))
        if found is not None:
            task, vote = found
            name = metadata.get(f"labeler_{user}") or (f"{labeler} {user[:8]}" if user else labeler)
            unit = NewUnit(task, prompt, answers, *_topic_and_columns(metadata))
            yield unit, _name(name), vote, _seconds(metadata.get(f"seconds_{user}"))


def _from_argilla_values(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the parts of a vote: ``better``, ``tie``, ``strength``, ``ranks``, ``ratings``, ``text``."""
    parts: dict[str, Any] = {"ratings": [{} for _ in range(count)]}
    for question, value in values.items():
        rated = _RATED.fullmatch(question)
        if isinstance(value, int) and rated and _number(rated[1]) <= count:
            parts["ratings"][_number(rated[1]) - 1][rated[2] or "quality"] = value
        elif isinstance(value, list) and all(isinstance(each, Mapping) and "rank" in each for each in value):
            ranks = {_number_of(each.get("value")): each["rank"] for each in value}
            parts["ranks"] = [ranks.get(i) for i in range(1, count + 1)]
        elif question in ("edited", "edit", "corrected", "correction") and isinstance(value, str):
            parts["text"] = value
        elif isinstance(value, str):
            _read_choice(parts, value)
    return parts


# --- Label Studio -----------------------------------------------------------------------------------------------------


def to_label_studio(unit: Unit, casts: Sequence[Cast]) -> dict[str, Any]:
    """Return the task of a unit with its annotations, as Label Studio exports and imports them (JSON)."""
    text = unit.prompt if isinstance(unit.prompt, str) else conversation_text(unit.prompt)
    return {
        "id": unit.id,
        "data": {"prompt": text, **{f"answer{i}": each.text for i, each in enumerate(unit.answers, 1)}},
        "meta": {"messages": unit.prompt if not isinstance(unit.prompt, str) else None, **_metadata(unit, ())},
        "annotations": [
            {
                "result": [{"id": f"{unit.id}-{i}", **result} for i, result in enumerate(_results(cast.vote))],
                "was_cancelled": isinstance(cast.vote, Skip),
                "lead_time": cast.seconds,
                "completed_by": {"email": cast.labeler},
            }
            for cast in casts
        ],
    }


def _results(vote: Vote) -> Iterator[dict[str, Any]]:
    better = vote.better if isinstance(vote, (Choice, Edit)) else None
    if better is not None:
        selected = {"selected": ("left", "right")[better]}
        yield {"type": "pairwise", "from_name": "preference", "to_name": "answer1,answer2", "value": selected}
    if isinstance(vote, Choice) and (vote.tie or vote.strength > 1):
        choice = MUCH if vote.tie is None else f"both {vote.tie}"
        yield {"type": "choices", "from_name": "degree", "to_name": "prompt", "value": {"choices": [choice]}}
    if isinstance(vote, Ranking):
        # A bucket per rank, because ranks can be equal.
        by_rank: dict[str, list[str]] = {str(rank): [] for rank in sorted(vote.ranks)}
        for i, rank in enumerate(vote.ranks, 1):
            by_rank[str(rank)].append(f"answer{i}")
        yield {"type": "ranker", "from_name": "rank", "to_name": "prompt", "value": {"ranker": by_rank}}
    for i, ratings in enumerate(vote.ratings if isinstance(vote, Ratings) else (), 1):
        for name, number in ratings.items():
            named = {"from_name": f"answer{i}_{name}", "to_name": f"answer{i}"}
            yield {"type": "rating", **named, "value": {"rating": number}}
    if isinstance(vote, Edit):
        to_name = f"answer{vote.better + 1}"
        yield {"type": "textarea", "from_name": "edited", "to_name": to_name, "value": {"text": [vote.text]}}


def from_label_studio(task: Mapping[str, Any], labeler: str) -> Iterator[Imported]:
    """Yield the votes in a task's annotations, skipped ones not included; ``labeler`` names users without an address."""
    meta = task.get("meta") or {}
    prompt, answers = _texts(task.get("data") or {}, meta)
    prompt = meta.get("messages") or prompt
    for annotation in task.get("annotations") or ():
        parts: dict[str, Any] = {"ratings": [{} for _ in answers]}
        for result in annotation.get("result") or ():
            _read_result(parts, result, len(answers))
        found = None if annotation.get("was_cancelled") else _vote(len(answers), parts)
        if found is not None:
            user = annotation.get("completed_by")
            name = labeler if user is None else f"{labeler} {user}"
            if isinstance(user, Mapping):
                name = user.get("email") or user.get("id") or labeler
            unit = NewUnit(found[0], prompt, answers, *_topic_and_columns(meta))
            yield unit, _name(name), found[1], _seconds(annotation.get("lead_time"))


def _read_result(parts: dict[str, Any], result: Mapping[str, Any], count: int) -> None:
    value, kind = result.get("value") or {}, result.get("type")
    rated = _RATED.fullmatch(str(result.get("from_name")))
    if kind == "pairwise":
        _read_choice(parts, str(value.get("selected")))
    elif kind == "choices":
        for choice in value.get("choices") or ():
            _read_choice(parts, str(choice))
    elif kind == "rating" and rated and _number(rated[1]) <= count:
        parts["ratings"][_number(rated[1]) - 1][rated[2] or "quality"] = value.get("rating")
    elif kind == "ranker":
        lists = {name: each for name, each in (value.get("ranker") or {}).items() if isinstance(each, list)}
        if all(name.isdecimal() for name in lists):  # a list per rank
            ranks = {_number_of(name): int(rank) for rank, names in lists.items() for name in names}
        else:  # one list, best first
            ranks = {_number_of(name): rank for rank, name in enumerate(next(iter(lists.values())), 1)}
        parts["ranks"] = [ranks.get(i) for i in range(1, count + 1)]
    elif kind == "textarea":
        parts["text"] = "\n".join(map(str, value.get("text") or ()))
        parts.setdefault("better", _number_of(result.get("to_name")))


# --- the page of compare ----------------------------------------------------------------------------------------------


def from_compare(record: Mapping[str, Any], labeler: str) -> Iterator[Imported]:
    """Yield the vote in a record that the page of ``compare`` saved."""
    better = {"A": 0, "B": 1, "tie": None}.get(str(record.get("vote")), -1)
    if better != -1:
        texts = {f"answer_{number}": record[f"answer_{side}"] for number, side in enumerate("ab", 1)}
        metadata = {
            f"{name}_{number}": record[f"{name}_{side}"]
            for number, side in enumerate("ab", 1)
            for name in ("model", "truncated")
            if f"{name}_{side}" in record
        }
        if "temperature" in record:
            metadata |= dict.fromkeys(("temperature_1", "temperature_2"), record["temperature"])
        prompt, answers = _texts({"prompt": record["prompt"], **texts}, metadata)
        vote = Choice(better, tie=None if better is not None else "good")
        yield NewUnit("pair", prompt, answers, *_topic_and_columns(record)), labeler, vote, 0.0


# --- parts ------------------------------------------------------------------------------------------------------------


def _texts(fields: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[Conversation, tuple[Answer, ...]]:
    """Return the prompt and the responses of a record.

    Raises:
        DataError: It has no prompt or fewer than one response.
    """
    numbered = {
        number: cell
        for name, cell in fields.items()
        if (match := _NUMBERED.fullmatch(name)) and ((number := _number(match[1])) <= 2 or cell)
    }  # A response can be empty, but an empty third one means that there are two.
    cell = next((fields[name] for name in ("prompt", *PROMPTS) if fields.get(name)), None)
    try:
        content = parse_content(cell, "prompt")
    except UnusableCell as error:
        raise DataError(str(error)) from None
    prompt = content if isinstance(content, str) else [message.as_dict() for message in content]
    if not prompt or not numbered:
        raise DataError(f"a record has no prompt or no responses, only the fields {', '.join(fields) or 'none'}.")
    sampling = {i: {"temperature": metadata[f"temperature_{i}"]} for i in numbered if f"temperature_{i}" in metadata}
    models = {i: str(metadata[f"model_{i}"]) for i in numbered if metadata.get(f"model_{i}")}
    return prompt, tuple(
        Answer(str(numbered[i]), models.get(i), sampling.get(i, {}), metadata.get(f"truncated_{i}") in (True, "true"))
        for i in sorted(numbered)
    )


def _topic_and_columns(metadata: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the topic and the variables of the chat template."""
    columns = {name: metadata[name] for name in TEMPLATE_COLUMNS if metadata.get(name)}
    columns = {name: json.loads(value) if isinstance(value, str) else value for name, value in columns.items()}
    return str(metadata["topic"]) if metadata.get("topic") else None, columns


def _name(labeler: Any) -> str:
    return " ".join(str(labeler).split())[:MAX_NAME_CHARACTERS]


def _seconds(value: Any) -> float:
    seconds = float(value or 0.0)
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _read_choice(parts: dict[str, Any], value: str) -> None:
    """Read a tie, a strength, or the name of the better response into ``parts``."""
    plain = value.strip().lower()
    if plain in TIES:
        parts["tie"] = TIES[plain]
    elif plain.replace("_", " ") == MUCH:
        parts["strength"] = 2
    elif (number := _number_of(plain)) is not None:
        parts["better"] = number


def _vote(count: int, parts: Mapping[str, Any]) -> tuple[Any, Vote] | None:
    """Return the task and the vote that ``parts`` describe, or None."""
    better = parts["better"] - 1 if parts.get("better") is not None else None
    candidates: list[tuple[str, Any]] = [
        ("edit", {"better": better, "text": parts.get("text")}),
        ("pair", {"tie": parts["tie"]} if "tie" in parts else {"better": better, "strength": parts.get("strength", 1)}),
        ("rank", {"ranks": parts.get("ranks")}),
        ("rate", {"ratings": parts["ratings"]}),
    ]
    for task, value in candidates:
        try:
            return task, parse_vote(task, count, value)
        except DataError:
            continue
    return None


def _number_of(name: Any) -> int | None:
    """Return the number of a response by its name: ``response_2``, ``answer2``, ``2``, ``right`` or ``B``."""
    text = str(name).strip().lower()
    match = _NUMBERED.fullmatch(text)
    if match or text in _SIDES or (text.isdecimal() and len(text) == 1):
        return _number(match[1] if match else text)
    return None


def _number(text: str) -> int:
    return _SIDES.get(text.lower()) or int(text)
