"""Find, check and load models.

A model's name is ``builtin:tiny``, a local folder, or a name on the Hugging Face Hub; a folder takes precedence over the
Hub. Errors that the small files show (a missing folder, a tokenizer larger than the vocabulary, a reward model without
its score head) are raised before weights are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from reinforcepp.data import builtin
from reinforcepp.errors import ConfigError, ModelError, ReinforceError, nearest, option, useful_line
from reinforcepp.files import lfs_pointer
from reinforcepp.models.encoders import add_missing_parts, check_generates, is_encoder, skipped_positions
from reinforcepp.models.folder_checks import CONVERT, HUB_FILES, NO_PICKLES, check_links, check_weights
from reinforcepp.models.lora import (
    ADAPTER_CONFIG,
    AdapterDisabled,
    adapter_vocabulary,
    base_model_name,
    check_no_cycle,
    full_model_folder,
    full_weights,
    has_adapter,
    is_adapter_dir,
    merge_adapter,
)
from reinforcepp.models.prompt_format import plain_template
from reinforcepp.models.remote_code import remote_code, uses_remote_code
from reinforcepp.models.tokenization import end_token_id
from reinforcepp.models.tokenizer_files import choose_template, has_tokenizer, keep_settings, read_tokenizer
from reinforcepp.runtime.process import is_main, is_silent, look_for_hub
from reinforcepp.runtime.terminal import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""Exceptions by which the libraries report a folder that they can't load."""
DEQUANTIZED = ("fp8", "mxfp4")
"""Quantization methods whose weights transformers converts to floating point without a GPU that supports them."""
PROGRESS_BAR_BYTES = 500 << 20
"""Size of weights from which a progress bar is shown."""

DUPLICATES = ("consolidated*.safetensors", "*/*.safetensors")
"""Files of a model on the Hub with weights that its main files hold, too."""
CLASSIFIER = "AutoModelForSequenceClassification"
USUAL_CONTEXT = 4096
"""Context of a model whose configuration states none."""
NO_TOKENIZER = "{name}: tokenizer not found. Copy its files (tokenizer.json) from the original model."
HUB_FIX = (
    "Give the path of a model folder, or 'builtin:tiny', the small model in this package. To download a model: "
    "hf download {name} --local-dir {name}"
)


# --- names and small files ------------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """Return the argument of ``from_pretrained`` for ``name``: a model folder, or a name on the Hub.

    Raises:
        ModelError: ``name`` is a path without a model, an unknown built-in model, or a folder with a link to a foreign file.
    """
    if name.startswith("builtin:"):
        if name != builtin.MODEL_NAME:
            raise ModelError(f"{name}: built-in model not found. Use {builtin.MODEL_NAME}.")
        return str(builtin.model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file() or is_adapter_dir(folder):
            check_links(folder, name)
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


def local_folder(name: str) -> Path:
    """Return the folder of the model ``name``; one of the Hub is downloaded into the cache of the Hub's library.

    Raises:
        ModelError: the model can't be found or downloaded.
    """
    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with _load_errors(name):
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES), ignore_patterns=list(DUPLICATES)))


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn exceptions of the libraries into a ModelError with a fix."""
    folder = Path(resolve(name))
    if not folder.is_dir():
        look_for_hub()
    try:
        yield
    except ReinforceError:
        raise
    except LIBRARY_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: the model needs its own code, which runs only with trust_remote_code, a setting of train, sft, reward, "
                "generate and chat. Set it if you trust that code, or use a model that transformers supports."
            ) from error
        if "pytorch_model" in str(error) or (any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))):
            raise ModelError(f"{name}: no safetensors weights. {NO_PICKLES} {CONVERT}") from error
        if (pointer := lfs_pointer(folder)) is not None:
            raise ModelError(
                f"{name}: {pointer} is a Git LFS pointer, not the file itself. Run git lfs pull in the folder."
            ) from error
        if (method := quantization_method(folder)) is not None:
            raise ModelError(
                f"{name}: the weights are quantized ({method}) and can't be loaded: {useful_line(error)} Use the unquantized "
                "model."
            ) from error
        if isinstance(error, ImportError):
            raise ModelError(
                f"{name}: a package that the model needs isn't installed: {useful_line(error)} Install it, or use another model."
            ) from error
        if folder.is_dir():
            raise ModelError(f"{name}: the model folder can't be loaded: {useful_line(error)}") from error
        raise ModelError(
            f"{name}: model folder not found, and it can't be downloaded from the Hub. {HUB_FIX.format(name=name)}"
        ) from error


def quantization_method(folder: Path) -> str | None:
    """Return how the weights in ``folder`` are quantized, such as gptq, or None."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return str(settings.get("quant_method") or "bitsandbytes") if isinstance(settings, dict) else None


def check_trainable(name: str, *, use_peft: bool) -> None:
    """Check that the weights of the model ``name`` can be trained.

    Raises:
        ModelError: they are quantized. Weights of 4 bits by bitsandbytes can have an adapter.
    """
    folder = Path(resolve(base_of_adapter(name) or name))
    method = quantization_method(folder)
    if method is None or method in DEQUANTIZED:
        return
    in_4bit = method == "bitsandbytes" and getattr(load_config(name), "quantization_config", {}).get("load_in_4bit")
    if in_4bit and use_peft:
        return
    fix = f"Add {option('use_peft')}, or give the unquantized model." if in_4bit else "Give the unquantized model."
    raise ModelError(
        f"{name}: the weights are quantized ({method}), so they can't be trained. {fix} To save memory, train it with "
        f"{option('use_peft')} {option('load_in_4bit')}."
    )


def load_config(name: str) -> PreTrainedConfig:
    """Load a model's configuration without its weights."""
    from transformers import AutoConfig

    if (base := base_of_adapter(name)) is not None:
        config = load_config(base)
        config.name_or_path = resolve(name)  # the tokenizer is in the adapter's folder
        if (vocabulary := adapter_vocabulary(Path(resolve(name)))) is not None:
            config.get_text_config().vocab_size = vocabulary
        return config
    with _load_errors(name):
        return AutoConfig.from_pretrained(resolve(name), **remote_code(resolve(name)))


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
    check_no_cycle(folder)
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and prepare it by :func:`prepare_tokenizer`."""
    source = resolve(name)
    if (base := base_of_adapter(name)) is not None and not has_tokenizer(Path(source)):
        source = resolve(base)
    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        raise ModelError(NO_TOKENIZER.format(name=name))
    with _load_errors(name):
        tokenizer = read_tokenizer(source)
    return prepare_tokenizer(tokenizer, load_config(name), name)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str
) -> PreTrainedTokenizerBase:
    """Check the tokenizer of the model ``name``; add a missing pad token (EOS) and chat template (:func:`plain_template`).

    Raises:
        ModelError: the tokenizer is missing, has no EOS, or has more tokens than the model.
    """
    if tokenizer.vocab_size < 2:  # transformers returns an empty one for a folder without tokenizer files
        raise ModelError(NO_TOKENIZER.format(name=name))
    if is_encoder(config):
        add_missing_parts(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no EOS token, so no completion can finish. Set eos_token in its files."
        )
    keep_settings(tokenizer)
    choose_template(tokenizer, name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str) -> None:
    """Accept special tokens without an embedding, such as image placeholders, because no text contains them.

    A pad token among them is unset, because the model would look up its embedding.

    Raises:
        ModelError: the model has no embedding of a token that a text can contain, or of EOS.
    """
    beyond = sorted(index for index in tokenizer.get_vocab().values() if index >= vocabulary)
    if not beyond:
        return
    added = tokenizer.added_tokens_decoder
    if tokenizer.eos_token_id in beyond or any(index not in added or not added[index].special for index in beyond):
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model only {vocabulary}. Copy the tokenizer files "
            "from the original model, or resize the model's embeddings."
        )
    if tokenizer.pad_token_id in beyond:
        tokenizer.pad_token = None
    names = ", ".join(added[index].content for index in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    warn_once(
        f"{name}: the model has no embedding for {len(beyond)} special tokens of the tokenizer ({names}), so they are unused."
    )


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
    return int(length) - skipped_positions(config) if length else None


def prompt_limit(
    config: PreTrainedConfig, max_prompt_length: int | None, max_new_tokens: int, max_length: int | None = None
) -> int:
    """Return the most tokens of a prompt: by default, what the model's context leaves for it next to a response.

    Args:
        config: of the model.
        max_prompt_length: the setting, if there is one.
        max_new_tokens: of a response.
        max_length: most tokens of both together, if the context isn't shorter.

    Raises:
        ConfigError: prompt and response exceed the context.
        ModelError: the model can't generate.
    """
    check_generates(config)
    context = context_length(config)
    if max_prompt_length is None:
        limit = min(context or USUAL_CONTEXT, max_length or context or USUAL_CONTEXT) - max_new_tokens
        if limit < 1:
            raise ConfigError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context of {context} tokens. "
                "Lower it."
            )
        return limit
    if context is not None and max_prompt_length + max_new_tokens > context:
        raise ConfigError(
            f"max_prompt_length {max_prompt_length} + max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context} tokens. Lower one of the two."
        )
    return max_prompt_length


def weight_bytes(name: str) -> int:
    """Return the size of the model's weights on disk, or its base's for an adapter; 0 if they would have to be downloaded."""
    folder = Path(resolve(base_of_adapter(name) or name))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return all token ids that finish a completion: of the tokenizer, its chat template and the generation config."""
    return end_ids(model.generation_config.eos_token_id if model.generation_config else None, tokenizer)


def end_ids(
    configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase, *, template: bool = True
) -> frozenset[int]:
    """Return the token ids that finish a completion: ``configured`` ones, EOS, and the end of turn of the ``template``."""
    ids = configured if isinstance(configured, list) else [configured]
    if template:
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
    check_generates(load_config(name))
    return load_weights(AutoModelForCausalLM, name, dtype=dtype, **settings).eval()


def load_weights(
    auto_class: Any,
    name: str,
    *,
    new: Callable[[str], bool] | None = None,
    initialize: Callable[[PreTrainedModel, set[str]], None] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load weights, and check that all match the configuration, because transformers initializes missing ones at random.

    Only weights whose names ``new`` accepts can be missing; ``initialize`` is called with the model and their names.

    Raises:
        ModelError: weights are missing or have another shape.
    """
    source = resolve(name)
    if _has_invalid_pad_id(load_config(name)):
        settings = {"pad_token_id": None, **settings}  # the embedding would reject it, and padding is masked anyway
    with _load_errors(name), _bars_if_large(name), _without_report(), safe_folder(name) as folder:
        model, found = auto_class.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **remote_code(source),
            **settings,
        )
    model.name_or_path = model.config.name_or_path = source
    mismatched = {key for key, *_ in found["mismatched_keys"]}
    missing = {key for key in found["missing_keys"] if new is None or not new(key)}
    if wrong := sorted(mismatched | missing):
        raise ModelError(
            f"{name}: the weights don't match config.json; {len(wrong)} tensors are missing or have another shape "
            f"({wrong[0]}, for example). Copy the folder from its origin again, or give a causal language model."
        )
    if initialize is not None:
        initialize(model, set(found["missing_keys"]))
    return with_fused_gelu(model)


@contextmanager
def safe_folder(name: str) -> Iterator[str]:
    """Yield the folder from which libraries can load the full model ``name``: without pickled weights and adapters.

    A model of the Hub whose own code the user allows is yielded by its name, because its code isn't downloaded here.

    Raises:
        ModelError: the folder has no safetensors weights, or names files outside.
    """
    source = resolve(name)
    if not Path(source).is_dir() and remote_code(source)["trust_remote_code"]:
        yield source
        return
    folder = local_folder(name)
    check_weights(folder, name)
    with full_model_folder(folder) as full:
        yield str(full)


def with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Make GPT-2's GELU, eight passes over memory each way, torch's fused one, in place, so hooks on it still run."""
    from transformers.activations import NewGELUActivation

    for module in model.modules():
        if type(module) is NewGELUActivation:
            module.__class__, module.approximate = torch.nn.GELU, "tanh"
    return model


def _has_invalid_pad_id(config: PreTrainedConfig) -> bool:
    text = config.get_text_config()
    pad_id = getattr(text, "pad_token_id", None)
    return pad_id is not None and not 0 <= pad_id < text.vocab_size


def meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, auto_class: str = "AutoModelForCausalLM"
) -> PreTrainedModel:
    """Return the model of ``config`` on the meta device: shapes without memory.

    Raises:
        ModelError: transformers has no such model for this configuration.
    """
    import transformers

    if auto_class == "AutoModel" and uses_remote_code(config) and auto_class not in config.auto_map:
        return cast("PreTrainedModel", meta_model(config, dtype).base_model)
    if _has_invalid_pad_id(config):
        config = copy.deepcopy(config)
        config.get_text_config().pad_token_id = None
    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(
                config, dtype=dtype, **remote_code(str(config.name_or_path))
            )
    except ValueError as error:
        kind = "reward model" if auto_class == CLASSIFIER else "causal language model"
        raise ModelError(
            f"{config.name_or_path or 'model'}: transformers has no {kind} of the type {config.model_type}. Give another model."
        ) from error
    return with_fused_gelu(model.eval())


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
    """Hide the progress bars of transformers in this block, unless ``shown``."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown or is_silent() or not is_main():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
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
