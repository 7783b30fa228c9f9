"""Find the score head among the weights of a classifier of any origin, and check that no part of it is missing.

Transformers calls the head of a language model ``score``. TRL's value models call it ``v_head.summary``, OpenRLHF
``value_head``, others ``classifier`` or ``reward_head``. Transformers would ignore a head with another name and draw a new one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reinforcepp.errors import ModelError
from reinforcepp.models.folder_checks import CONVERT, NO_PICKLES
from reinforcepp.models.lora import ADAPTER_PREFIX, is_adapter_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_OUTPUTS = 256
"""Most outputs of a layer that is taken for a score head."""
OTHER_LAYERS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|mtp|rotary_emb|position_ids)\b")
"""Weights next to the pretrained layers that a classifier doesn't use, such as the output layer of a language model."""
SAVED_MODULE = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


@dataclass(frozen=True)
class StoredHead:
    """The last layer of a score head in a folder's weights.

    Attributes:
        name: of the layer in the weights.
        outputs: number of scores.
        has_bias: whether the layer has a bias.
        is_standard: whether transformers finds the layer by itself.
        prefix: of the pretrained layers in the weights, if transformers doesn't expect it.
    """

    name: str
    outputs: int
    has_bias: bool
    is_standard: bool
    prefix: str | None = None


def score_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the layer whose output is the score, and its name: ``score`` in language models, the last layer of encoders."""
    inside = set(model.base_model.modules())
    layers = [
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear) and part not in inside
    ]
    return layers[-1]


def stored_shapes(folder: Path) -> dict[str, tuple[list[int], Path]]:
    """Return the shape and the file of each tensor in the weights of ``folder``, without the prefixes that peft adds.

    Raises:
        ModelError: there are no safetensors weights, or they are damaged.
    """
    own = "adapter*.safetensors" if is_adapter_dir(folder) else "model*.safetensors"
    shapes: dict[str, tuple[list[int], Path]] = {}
    for file in [*sorted(folder.glob(own)), *sorted(folder.glob("*head*.safetensors"))]:
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    shapes[plain_name(key)] = list(weights.get_slice(key).get_shape()), file
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged ({error}). Copy the folder from its origin again.") from error
    if not shapes:
        pickled = any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder}: no safetensors weights, so it isn't a reward model. "
            + (f"{NO_PICKLES} {CONVERT}" if pickled else "Train one: reinforcepp reward")
        )
    return shapes


def plain_name(key: str) -> str:
    """Return the name of a tensor without the prefixes that peft adds."""
    return SAVED_MODULE.sub("", key.removeprefix(ADAPTER_PREFIX))


def find_head(folder: Path, skeleton: PreTrainedModel) -> StoredHead:
    """Return the score head in the weights of ``folder``. The adapter of a classifier can lack one: see :func:`has_head`.

    Args:
        folder: of a classifier, or of an adapter with a head.
        skeleton: classifier of the same architecture on the meta device, with any number of outputs.

    Raises:
        ModelError: a part of the head is missing, or several layers could be the head.
    """
    shapes = {key: shape for key, (shape, _) in stored_shapes(folder).items() if "lora_" not in key}
    name, layer = score_head(skeleton)
    adapter = is_adapter_dir(folder)
    prefix = None if adapter else _prefix(shapes, skeleton)
    if not adapter:
        _check_other_layers(folder, shapes, skeleton, name)
    if f"{name}.weight" in shapes:
        found, standard = name, True
    else:
        found, standard = _renamed_head(folder, shapes, skeleton, prefix), False
    shape, has_bias = shapes[f"{found}.weight"], f"{found}.bias" in shapes
    if len(shape) != 2 or shape[1] != layer.in_features:
        raise ModelError(
            f"{folder}: the score head {found} has shape {shape}, but the model needs [outputs, {layer.in_features}]. Train the "
            "reward model again."
        )
    if layer.bias is not None and not has_bias:
        raise _missing(folder, [f"{found}.bias"])
    standard = standard and has_bias == (layer.bias is not None)
    return StoredHead(found, shape[0], has_bias, standard, prefix)


def has_head(folder: Path, skeleton: PreTrainedModel) -> bool:
    """Return whether the adapter in ``folder`` holds a score head, so that it doesn't use the one of its base model."""
    layers = {key for key in stored_shapes(folder) if "lora_" not in key and key.endswith(".weight")}
    inside = f"{skeleton.base_model_prefix}."
    return any(not key.startswith(inside) and not OTHER_LAYERS.search(key) for key in layers)


def read_head(folder: Path, head: StoredHead) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a score head."""
    files = {key: file for key, (_, file) in stored_shapes(folder).items()}

    def tensor(key: str) -> Tensor:
        with safe_open(files[key], framework="pt") as weights:
            stored = next(name for name in weights.keys() if plain_name(name) == key)  # noqa: SIM118
            found: Tensor = weights.get_tensor(stored)
            return found

    return tensor(f"{head.name}.weight"), tensor(f"{head.name}.bias") if head.has_bias else None


def _check_other_layers(folder: Path, shapes: dict[str, list[int]], skeleton: PreTrainedModel, last: str) -> None:
    """Check that the weights hold the layers between the pretrained layers and the last one, such as a pooler."""
    base = f"{skeleton.base_model_prefix}."
    needed = [
        key
        for key, _ in skeleton.named_parameters()
        if (not key.startswith(base) or key.startswith(f"{base}pooler.")) and key.rpartition(".")[0] != last
    ]
    missing = [key for key in needed if key not in shapes and key.removeprefix(base) not in shapes]
    if missing:
        raise _missing(folder, [f"{last}.weight", *missing] if f"{last}.weight" not in shapes else missing)


def _renamed_head(folder: Path, shapes: dict[str, list[int]], skeleton: PreTrainedModel, prefix: str | None) -> str:
    """Return the name of the only layer that can be the head."""
    name, layer = score_head(skeleton)
    vocabulary = skeleton.config.get_text_config().vocab_size
    outside = {
        key: shape
        for key, shape in shapes.items()
        if not key.startswith(prefix or f"{skeleton.base_model_prefix}.")
        and key not in skeleton.state_dict()
        and f"{skeleton.base_model_prefix}.{key}" not in skeleton.state_dict()
        and not OTHER_LAYERS.search(key)
        and shape[:1] != [vocabulary]
    }
    matrices = {key.removesuffix(".weight"): shape for key, shape in outside.items() if len(shape) == 2}
    heads = [key for key, shape in matrices.items() if shape[0] <= MAX_OUTPUTS and shape[1] == layer.in_features]
    wanted = getattr(skeleton.config, "value_head_prefix", None)  # OpenRLHF
    if wanted in heads:
        heads = [wanted]
    elif len(matrices) > 1:
        raise ModelError(
            f"{folder}: the score head can't be read, because it has several layers ({', '.join(sorted(matrices))}). Give a "
            "classifier with one linear layer as its head."
        )
    if not heads:
        raise _missing(folder, [f"{name}.weight"])
    return heads[0]


def _missing(folder: Path, names: list[str]) -> ModelError:
    return ModelError(
        f"{folder}: no score head ({', '.join(names)}). It isn't a reward model, and a newly initialized head scores at random. "
        "Train a reward model: reinforcepp reward"
    )


def _prefix(shapes: dict[str, list[int]], skeleton: PreTrainedModel) -> str | None:
    """Return the prefix of the pretrained layers in the weights; None if transformers finds them by itself."""
    base = f"{skeleton.base_model_prefix}."
    first = next(key for key, _ in skeleton.named_parameters() if key.startswith(base)).removeprefix(base)
    prefixes = {key.removesuffix(first) for key in shapes if key == first or key.endswith(f".{first}")}
    if prefixes & {"", base} or len(prefixes) != 1:
        return None
    return prefixes.pop()


def declared_labels(folder: Path, outputs: int) -> list[str]:
    """Return the labels of the outputs in the configuration, or their numbers if it has none."""
    try:
        labels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    except (OSError, ValueError, AttributeError):
        labels = {}
    found = [str(labels.get(str(i), i)) for i in range(outputs)] if isinstance(labels, dict) else []
    return found if len(set(found)) == outputs else [str(i) for i in range(outputs)]
