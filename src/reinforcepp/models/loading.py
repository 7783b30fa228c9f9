"""Find, check, load and save models: policy, reference and reward model.

A model is named by ``builtin:tiny``, a local folder, or a name on the Hugging Face hub; a folder wins over the hub.
Everything that can be refused from the small files alone (a missing folder, a tokenizer that is larger than the
vocabulary, a reward model without its head) is refused before any weight is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.data import builtin
from reinforcepp.errors import ConfigError, ModelError, nearest
from reinforcepp.files import PARTIAL, disk_errors, flush
from reinforcepp.models.lora import ADAPTER_CONFIG, base_model_name, has_adapter, is_adapter_dir, merge_adapter
from reinforcepp.models.tokenization import PLAIN_TEMPLATE
from reinforcepp.runtime import is_main, look_for_hub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_REMOTE_CODE = {"trust_remote_code": False}  # said aloud, or the library would ask on the terminal
SAFETENSORS_ONLY = {"use_safetensors": True, **NO_REMOTE_CODE}
PROGRESS_BAR_BYTES = 500 << 20  # bytes of weights from which loading takes long enough to show progress

HUB_FIX = (
    "Give the path of a model folder, or 'builtin:tiny', the small model that ships with this package and needs no "
    "network; to fetch a model once where there is a network: hf download {name} --local-dir {name}"
)


# --- names and small files ------------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """What ``from_pretrained`` is to be given for ``name``: a folder that is a model, or a hub name."""
    if name.startswith("builtin:"):
        if name != builtin.MODEL_NAME:
            raise ModelError(f"There is no built-in model {name!r}: the only one is {builtin.MODEL_NAME!r}.")
        return str(builtin.model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file() or is_adapter_dir(folder):
            return str(folder)
        beside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        inside = f" It holds {', '.join(beside)}: give its path." if beside else ""
        raise ModelError(f"The folder {name} is not a model: it has no config.json.{inside}")
    if folder.is_file():
        raise ModelError(f"{name} is a file, not a model: give the folder that holds config.json and the weights.")
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(f"There is no model folder {name}.{nearest(folder.name, siblings)}")
    return name


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise for a model that can't be had into one sentence with the cure."""
    from safetensors import SafetensorError

    folder = Path(resolve(name))
    if not folder.is_dir():
        look_for_hub()
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"The model {name} brings code of its own, which is never run here: take a model that transformers knows."
            ) from error
        if "pytorch_model" in str(error) or (any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))):
            raise ModelError(
                f"{name} holds no safetensors weights, and nothing else is loaded, because a pickle can run any code: convert "
                "it where you trust it (load it with transformers, call save_pretrained), or take another model."
            ) from error
        if folder.is_dir():
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"The model folder {name} can't be loaded: {first}") from error
        raise ModelError(
            f"There is no model folder {name!r} here, and it can't be fetched from the hub. {HUB_FIX.format(name=name)}"
        ) from error


def load_config(name: str) -> PreTrainedConfig:
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    if (base := base_of_adapter(name)) is not None:
        config = load_config(base)
        config.name_or_path = resolve(name)  # where its tokenizer is
        return config
    with _load_errors(name):
        return AutoConfig.from_pretrained(resolve(name), **NO_REMOTE_CODE)


def base_of_adapter(name: str) -> str | None:
    """The model that an adapter's folder belongs to; None if ``name`` is no adapter."""
    folder = Path(resolve(name))
    if not is_adapter_dir(folder):
        return None
    base = base_model_name(folder)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(
            f"The adapter in {name} belongs to the model {base}, which isn't there: put it back, or set "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG} to where it is."
        )
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, made ready by :func:`prepare_tokenizer`."""
    from transformers import AutoTokenizer

    with _load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **NO_REMOTE_CODE)
    return prepare_tokenizer(tokenizer, load_config(name), name)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str
) -> PreTrainedTokenizerBase:
    """See that the tokenizer has EOS, pad token and chat template and no more tokens than the model ``name``.

    Without a pad token EOS serves; without a chat template the plain frame does, and is saved along.
    """
    if tokenizer.vocab_size < 2:  # what the library makes of a folder without tokenizer files
        raise ModelError(f"{name} holds no tokenizer: copy its files (tokenizer.json) from the model's origin.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {name} has no EOS token, so no answer could end: set eos_token in its files."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, but the model only {vocabulary}: they don't belong "
            "together; copy the tokenizer files from the model's origin or resize the model's embeddings."
        )
    return tokenizer


def tokenizer_for(config: PreTrainedConfig, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that a caller gave, made ready, or the one that belongs to the model of ``config``."""
    name = str(config.name_or_path)
    if given is not None:
        return prepare_tokenizer(given, config, name or "the given model")
    if not name:
        raise ConfigError("A model that was made in memory brings no tokenizer: give one as processing_class.")
    return load_tokenizer(name)


def architecture(config: PreTrainedConfig) -> str:
    """Name of the model class; a configuration made in code names none, and then it is that of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    return str(named[0])


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens the model can attend to, where its configuration says so."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(length) if length else None


def check_context(config: PreTrainedConfig, max_prompt_length: int, max_new_tokens: int) -> None:
    """Refuse limits that the model's context can't hold."""
    limit = context_length(config)
    if limit is not None and max_prompt_length + max_new_tokens > limit:
        raise ConfigError(
            f"max_prompt_length {max_prompt_length} + max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{limit} tokens: lower one of the two."
        )


def weight_bytes(name: str) -> int:
    """Size on disk of the model's weights, as far as it can be told without fetching them; else 0."""
    return sum(path.stat().st_size for path in Path(resolve(name)).glob("*.safetensors"))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end an answer: the tokenizer's and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None)


# --- causal language models -----------------------------------------------------------------------------------------


def load_policy(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode: dropout would make the policy ratio differ from 1.

    An adapter is merged into its model. ``settings`` are further arguments of ``from_pretrained``.
    """
    from transformers import AutoModelForCausalLM

    if (base := base_of_adapter(name)) is not None:
        if "quantization_config" in settings:
            raise ConfigError(
                f"load_in_4bit can't round an adapter: export {name} to a plain model first, and give that."
            )
        model = merge_adapter(load_policy(base, dtype, **settings), Path(resolve(name))).eval()
        model.config.name_or_path = resolve(name)
        return model
    return load_weights(AutoModelForCausalLM, name, dtype=dtype, **settings).eval()


def load_weights(auto_class: Any, name: str, *, fresh: str | None = None, **settings: Any) -> PreTrainedModel:
    """Load weights that fit their configuration; but for those under ``fresh``, none may be missing.

    The library would initialise what is missing at random and go on.
    """
    with _load_errors(name), _bars_if_large(name), _without_report():
        model, found = auto_class.from_pretrained(
            resolve(name), output_loading_info=True, ignore_mismatched_sizes=True, **SAFETENSORS_ONLY, **settings
        )
    mismatched = {key for key, *_ in found["mismatched_keys"]}
    missing = {key for key in found["missing_keys"] if fresh is None or not key.startswith(fresh)}
    if unfit := sorted(mismatched | missing):
        raise ModelError(
            f"The weights of {name} don't fit its config.json: {len(unfit)} tensors are missing or of another shape "
            f"({unfit[0]}, for example); copy the folder from its origin again, or give a model of a causal language type."
        )
    return _with_fused_gelu(model)


def _with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Exchange GPT-2's activation, eight passes over memory each way, for torch's own of the same function."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, auto_class: str = "AutoModelForCausalLM"
) -> PreTrainedModel:
    """The model that :func:`load_policy` would load, with shapes and no contents: it takes no memory.

    Raises:
        ModelError: transformers has no model of the wanted class for such a configuration.
    """
    import transformers

    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(config, dtype=dtype, **NO_REMOTE_CODE)
    except ValueError as error:
        raise ModelError(
            f"{config.name_or_path or 'The model'} is of the type {config.model_type}, which is no causal language model: "
            "give one that is."
        ) from error
    return _with_fused_gelu(model.eval())


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as safetensors, configuration, tokenizer and chat template; each file appears whole or not at all.

    Of a model with an adapter the adapter alone is saved.
    """
    partial = folder / f"model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    with _bars(sum(p.nbytes for p in model.parameters()) >= PROGRESS_BAR_BYTES), disk_errors():
        if has_adapter(model):
            model.save_pretrained(partial, save_embedding_layers=False)
            (partial / "README.md").unlink()  # a template with nothing filled in
        else:
            model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in sorted(partial.iterdir()):
        flush(path)
        path.replace(folder / path.name)
    partial.rmdir()
    flush(folder)


def weights_hash(model: PreTrainedModel) -> str:
    """One short word for a model's weights: each tensor's name, shape and first mebibyte."""
    seen = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        head = tensor.detach().flatten()[: (1 << 20) // tensor.element_size()]
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        seen.update(head.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


# --- what the library shows meanwhile ---------------------------------------------------------------------------------


def _bars_if_large(name: str) -> AbstractContextManager[None]:
    return _bars(not Path(resolve(name)).is_dir() or weight_bytes(name) >= PROGRESS_BAR_BYTES)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The library's progress bars, for models that take long enough to need one."""
    from transformers.utils import logging

    if not (shown and is_main()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Without the library's table of what was missing, as a fresh head always is: that is told in a sentence or not."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
