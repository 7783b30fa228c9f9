"""Find, check and load models.

A model's name is ``builtin:tiny``, a local folder, or a name on the Hugging Face Hub; a folder takes precedence over the
Hub. Errors that the small files show (a missing folder, a tokenizer larger than the vocabulary, a reward model without
its score head) are raised before weights are read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.data import builtin
from reinforcepp.errors import ConfigError, ModelError, nearest
from reinforcepp.models.lora import (
    ADAPTER_CONFIG,
    AdapterDisabled,
    base_model_name,
    full_weights,
    has_adapter,
    is_adapter_dir,
    merge_adapter,
)
from reinforcepp.models.tokenization import end_token_id, plain_template
from reinforcepp.models.tokenizer_files import choose_template, keep_settings, read_tokenizer
from reinforcepp.runtime import is_main, look_for_hub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_REMOTE_CODE = {"trust_remote_code": False}  # by default, transformers asks on the terminal
SAFETENSORS_ONLY = {"use_safetensors": True, **NO_REMOTE_CODE}
PROGRESS_BAR_BYTES = 500 << 20
"""Size of weights from which a progress bar is shown."""

HUB_FIX = (
    "Give the path of a model folder, or 'builtin:tiny', the small model in this package. To download a model: "
    "hf download {name} --local-dir {name}"
)


# --- names and small files ------------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """Return the argument of ``from_pretrained`` for ``name``: a model folder, or a name on the Hub.

    Raises:
        ModelError: ``name`` is a path without a model, or an unknown built-in model.
    """
    if name.startswith("builtin:"):
        if name != builtin.MODEL_NAME:
            raise ModelError(f"{name}: built-in model not found. Use {builtin.MODEL_NAME}.")
        return str(builtin.model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file() or is_adapter_dir(folder):
            return str(folder)
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        fix = f"Give the path of a model inside: {', '.join(inside)}." if inside else "Give a model folder."
        raise ModelError(f"{name}: the folder is not a model, because it has no config.json. {fix}")
    if folder.is_file():
        raise ModelError(f"{name}: a file, not a model. Give the folder that holds config.json and the weights.")
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(f"{name}: model folder not found.{nearest(folder.name, siblings)}")
    return name


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn exceptions of the libraries into a ModelError with a fix."""
    from safetensors import SafetensorError

    folder = Path(resolve(name))
    if not folder.is_dir():
        look_for_hub()
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: the model needs its own code, which is never run. Use a model that transformers supports."
            ) from error
        if "pytorch_model" in str(error) or (any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))):
            raise ModelError(
                f"{name}: no safetensors weights. Pickled weights are never loaded, because a pickle can run any code. If you "
                "trust the model, load it with transformers and call save_pretrained; otherwise use another model."
            ) from error
        if folder.is_dir():
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{name}: the model folder can't be loaded: {first}") from error
        raise ModelError(
            f"{name}: model folder not found, and it can't be downloaded from the Hub. {HUB_FIX.format(name=name)}"
        ) from error


def load_config(name: str) -> PreTrainedConfig:
    """Load a model's configuration without its weights."""
    from transformers import AutoConfig

    if (base := base_of_adapter(name)) is not None:
        config = load_config(base)
        config.name_or_path = resolve(name)  # the tokenizer is in the adapter's folder
        return config
    with _load_errors(name):
        return AutoConfig.from_pretrained(resolve(name), **NO_REMOTE_CODE)


def base_of_adapter(name: str) -> str | None:
    """Return the name of an adapter's base model; None if ``name`` isn't an adapter.

    Raises:
        ModelError: the base model is missing.
    """
    folder = Path(resolve(name))
    if not is_adapter_dir(folder):
        return None
    base = base_model_name(folder)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(
            f"{name}: the adapter's base model {base} not found. Restore it, or set base_model_name_or_path in "
            f"{folder / ADAPTER_CONFIG} to its path."
        )
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and prepare it by :func:`prepare_tokenizer`."""
    with _load_errors(name):
        tokenizer = read_tokenizer(resolve(name))
    return prepare_tokenizer(tokenizer, load_config(name), name)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str
) -> PreTrainedTokenizerBase:
    """Check the tokenizer of the model ``name``; add a missing pad token (EOS) and chat template (``PLAIN_TEMPLATE``).

    Raises:
        ModelError: the tokenizer is missing, has no EOS, or has more tokens than the model.
    """
    if tokenizer.vocab_size < 2:  # transformers returns an empty one for a folder without tokenizer files
        raise ModelError(f"{name}: no tokenizer. Copy its files (tokenizer.json) from the original model.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no EOS token, so no completion can finish. Set eos_token in its files."
        )
    keep_settings(tokenizer)
    choose_template(tokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model only {vocabulary}. Copy the tokenizer files "
            "from the original model, or resize the model's embeddings."
        )
    return tokenizer


def tokenizer_for(config: PreTrainedConfig, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Return a prepared copy of ``given``, or load the tokenizer of the model of ``config``.

    Raises:
        ConfigError: none is given, and the model wasn't loaded from a folder.
    """
    name = str(config.name_or_path)
    if given is not None:
        return prepare_tokenizer(copy.deepcopy(given), config, name or "the given model")
    if not name:
        raise ConfigError(
            "processing_class: missing, but a model created in memory has no tokenizer. Pass the tokenizer."
        )
    return load_tokenizer(name)


def architecture(config: PreTrainedConfig) -> str:
    """Return the name of the model class; a configuration created in code has none, so its type decides."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    return str(names[0])


def parameter_count(config: PreTrainedConfig) -> int:
    """Return the number of parameters of the model, without its output layer."""
    return int(meta_model(config, torch.float32, "AutoModel").num_parameters())


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model can attend to, if its configuration has it."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(length) if length else None


def check_context(config: PreTrainedConfig, max_prompt_length: int, max_new_tokens: int) -> None:
    """Raise a ConfigError if prompt and response exceed the model's context."""
    limit = context_length(config)
    if limit is not None and max_prompt_length + max_new_tokens > limit:
        raise ConfigError(
            f"max_prompt_length {max_prompt_length} + max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{limit} tokens. Lower one of the two."
        )


def weight_bytes(name: str) -> int:
    """Return the size of the model's weights on disk; 0 if they would have to be downloaded."""
    return sum(path.stat().st_size for path in Path(resolve(name)).glob("*.safetensors"))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return all token ids that finish a completion: of the tokenizer, its chat template and the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    with suppress(ModelError):  # a template that can't format an answer can still format prompts
        ids = [*ids, end_token_id(tokenizer)]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *ids] if i is not None)


# --- causal language models -----------------------------------------------------------------------------------------


def load_policy(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, because dropout would make the policy ratio differ from 1.

    An adapter is merged into its base model. ``settings`` go to ``from_pretrained``.

    Raises:
        ModelError: the model can't be loaded.
        ConfigError: an adapter can't be loaded in 4 bits.
    """
    from transformers import AutoModelForCausalLM

    if (base := base_of_adapter(name)) is not None:
        if "quantization_config" in settings:
            raise ConfigError(
                f"load_in_4bit: {name} is an adapter, which can't be quantized. Merge it first: "
                f"reinforcepp export {name} --output_dir merged"
            )
        model = merge_adapter(load_policy(base, dtype, **settings), Path(resolve(name))).eval()
        model.config.name_or_path = resolve(name)
        return model
    return load_weights(AutoModelForCausalLM, name, dtype=dtype, **settings).eval()


def load_weights(
    auto_class: Any,
    name: str,
    *,
    new: str | None = None,
    initialize: Callable[[PreTrainedModel], None] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load weights, and check that all match the configuration, because transformers initializes missing ones at random.

    Only weights with the prefix ``new`` can be missing; if they are, ``initialize`` is called.

    Raises:
        ModelError: weights are missing or have another shape.
    """
    with _load_errors(name), _bars_if_large(name), _without_report():
        model, found = auto_class.from_pretrained(
            resolve(name), output_loading_info=True, ignore_mismatched_sizes=True, **SAFETENSORS_ONLY, **settings
        )
    mismatched = {key for key, *_ in found["mismatched_keys"]}
    missing = {key for key in found["missing_keys"] if new is None or not key.startswith(new)}
    if wrong := sorted(mismatched | missing):
        raise ModelError(
            f"{name}: the weights don't match config.json; {len(wrong)} tensors are missing or have another shape "
            f"({wrong[0]}, for example). Copy the folder from its origin again, or give a causal language model."
        )
    if initialize is not None and found["missing_keys"]:
        initialize(model)
    return _with_fused_gelu(model)


def _with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's GELU, which makes eight passes over memory each way, by torch's fused one."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, auto_class: str = "AutoModelForCausalLM"
) -> PreTrainedModel:
    """Return the model of ``config`` on the meta device: shapes without memory.

    Raises:
        ModelError: transformers has no such model for this configuration.
    """
    import transformers

    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(config, dtype=dtype, **NO_REMOTE_CODE)
    except ValueError as error:
        raise ModelError(
            f"{config.name_or_path or 'model'}: the type {config.model_type} isn't a causal language model. Give one."
        ) from error
    return _with_fused_gelu(model.eval())


def weights_hash(model: PreTrainedModel) -> str:
    """Return a short hash of each tensor's name, shape, dtype and first MiB; an adapter counts as merged."""
    digest = hashlib.sha256()
    adapted = has_adapter(model) and not isinstance(model, AdapterDisabled)
    for name, tensor in full_weights(model) if adapted else model.state_dict().items():
        head = tensor.detach().flatten()[: (1 << 20) // tensor.element_size()]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(head.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- output of transformers -------------------------------------------------------------------------------------------


def _bars_if_large(name: str) -> AbstractContextManager[None]:
    return progress_bars(not Path(resolve(name)).is_dir() or weight_bytes(name) >= PROGRESS_BAR_BYTES)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of transformers."""
    from transformers.utils import logging

    if not (shown and is_main()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the warning about missing weights, because :func:`load_weights` raises for those that matter."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
