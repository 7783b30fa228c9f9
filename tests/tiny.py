"""Tiny, randomly initialized models and a tokenizer, built in the process, so that tests need no download."""

import string
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

TEXT = [
    "How do I check the IP address of my Linux machine?",
    "Run ip addr show and read the inet line of each interface.",
    "Why can't this host resolve names? Look at resolvectl status and try dig.",
    "Question: Answer: restart ping the gateway, then trace the route to the server.",
]


HEADS: dict[str, object] = {"head_dim": 32}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEADS),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 128}),
    "phi": ("Phi", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {}),
}
"""Class name and settings of each family apart from GPT-2, whose settings have other names."""


@cache
def _backend(vocab_size: int, special: tuple[str, ...] = ("<|endoftext|>",)) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of GPT-2: byte-level, one special token, no pad token, no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocab_size)), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def sentencepiece_tokenizer(template: str | None, *, space: str = "first") -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of Llama 2, which puts a space before the ``first`` text, or before ``each`` one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if space == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*TEXT, "[INST] [/INST] <>_|.,!\n", string.ascii_letters], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PREFILLED = (  # as DeepSeek-R1-Distill: opens a thought, and removes thoughts from answers
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
EMPTY_THOUGHT = (  # as Nemotron 3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and '</think>' not in "
    "m['content'] %}<think></think>{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
BRACKETS = (  # as Llama-2-chat: no system role, and turns must alternate
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML


def chat_tokenizer(
    template: str | None = CHATML,
    *,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|User|>", "<|Assistant|>"),
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens of chat models; it adds ``bos`` to texts, if given."""
    backend = Tokenizer.from_str(_backend(320, (*special, *([bos] if bos else []))))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    built = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>", bos_token=bos)
    built.chat_template = template
    return built


def model(
    family: str = "gpt2", *, tied: bool = True, vocab_size: int = 320, seed: int = 0, **changes
) -> PreTrainedModel:
    """Return a causal language model with random weights and heads of size 32, which every engine supports."""
    torch.manual_seed(seed)
    if family == "gpt2":
        settings = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
        config = GPT2Config(**(settings | changes), vocab_size=vocab_size, eos_token_id=0, bos_token_id=0)
        config.tie_word_embeddings = tied
        built = GPT2LMHeadModel(config)
    else:
        settings = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": tied,
        }
        name, own = FAMILIES[family]
        config_class, model_class = (getattr(transformers, name + part) for part in ("Config", "ForCausalLM"))
        ends = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
        built = model_class(config_class(**(settings | own | changes), vocab_size=vocab_size, **ends))
    with torch.no_grad():  # wider than the default initialization, so that sampled tokens aren't near-ties
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return built.eval()


def train(trainer) -> list[dict[str, float]]:
    """Train, and return the metrics of every step of the run."""
    from reinforcepp.monitoring import read_metrics

    trainer.train()
    return read_metrics(trainer.folder)


def save(folder: Path, family: str = "gpt2", **settings) -> Path:
    """Write a model folder that ``from_pretrained`` reads."""
    model(family, **settings).save_pretrained(folder)
    tokenizer(settings.get("vocab_size", 320)).save_pretrained(folder)
    return folder
