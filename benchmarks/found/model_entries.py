"""Entries about model folders, model families, adapters, and saved files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from found.inputs import (
    CHATML,
    FIXED,
    REFUSED,
    accepted,
    command,
    copied,
    edited,
    entry,
    error_of,
    expect,
    refused,
    rows_file,
    saved,
    supervised,
    tokenizer,
    train,
)
from reinforcepp.errors import ReinforceError
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Prompt, Sampling

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4000000\n"


@entry("F1", "generation config with greedy decoding and a temperature", "the model is saved with a repaired config")
def invalid_generation_config(folder: Path) -> str:
    base = edited(saved(folder / "m"), "generation_config.json", do_sample=False, temperature=0.7, top_p=0.5)
    accepted(train(base, folder))
    accepted(supervised("sft", base, folder))
    return accepted(command("export", base, "--output_dir", folder / "export"))


def largest_gap(policy: PreTrainedModel, folder: Path) -> float:
    """Return how far sampled log-probabilities are from those of unpadded forward passes without a cache."""
    engine = TransformersEngine(policy, load_tokenizer(str(folder)), batch_size=4)
    prompts = [Prompt("", tuple(range(30, 30 + n)), i, {}) for i, n in enumerate((4, 9, 21))]
    gap = 0.0
    for completion in engine.generate(prompts, Sampling(16, num_samples=2, seed=3)):
        ids, start = [*completion.prompt.ids, *completion.ids], len(completion.prompt.ids)
        with torch.no_grad():
            logprobs = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        true = logprobs[torch.arange(start - 1, len(ids) - 1), torch.tensor(completion.ids)]
        gap = max(gap, float((true - torch.tensor(completion.logprobs)).abs().max()))
    return gap


def family(folder: Path, name: str, **changes: object) -> str:
    """Check that training such a model either samples its distribution or is refused."""
    base = saved(folder / name, family=name, **changes)
    ran = train(base, folder / name)
    if ran.code:
        return refused(ran)
    return expect((gap := largest_gap(load_policy(str(base)), base)) < 1e-3, f"{name}: {gap:.2g} nats")


@entry("F2", "recurrent models: Mamba, Mamba2, RecurrentGemma", "the model's own distribution, or a refusal")
def recurrent_models(folder: Path) -> str:
    verdicts = {
        family(folder, "Mamba", state_size=8),
        family(folder, "Mamba2", state_size=8, num_heads=4, head_dim=32, n_groups=1, chunk_size=16),
        family(
            folder, "RecurrentGemma", lru_width=64, attention_window_size=16, block_types=["recurrent", "attention"]
        ),
    }
    return REFUSED if REFUSED in verdicts else FIXED


@entry(
    "F3", "a hybrid of convolutions and attention (LFM2), two samples per prompt", "works, or a refusal before step 1"
)
def hybrid_models(folder: Path) -> str:
    return family(folder, "Lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)


@entry("F5", "OPT with projected embeddings, and Granite, as reward models", "the written folder loads and scores")
def heads_of_other_shapes(folder: Path) -> str:
    from reinforcepp import load_reward_model

    opt = {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    for name, changes in (("OPT", opt), ("Granite", {"logits_scaling": 4.0})):
        base = saved(folder / name, family=name, **changes)
        accepted(supervised("reward", base, folder / name))
        load_reward_model(str(folder / name / "reward"))
    return FIXED


@entry("F7", "a base model whose tokenizer adds BOS, without a template", "prompts begin with one BOS")
def bos_of_base_models(folder: Path) -> str:
    from reinforcepp.models.tokenization import encode_example, encode_prompt

    tok = load_tokenizer(str(saved(folder / "m", tokenizer(bos="<bos>"))))
    for ids in (encode_prompt(tok, "Why?"), encode_example(tok, "Why?", "So.")):
        expect(ids[0] == tok.bos_token_id and list(ids).count(tok.bos_token_id) == 1, ids)
    return FIXED


@entry("F8", "a tokenizer with an image placeholder beyond the vocabulary", "accepted, because text can't yield it")
def placeholder_beyond_vocabulary(folder: Path) -> str:
    tok = tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return accepted(train(saved(folder / "m", tok, vocab=len(tok) - 1), folder))


@entry("F9", "folders with quantized weights, and a pad id beyond the vocabulary", "one sentence that names the reason")
def quantized_weights(folder: Path) -> str:
    base = saved(folder / "m")
    methods: list[dict[str, object]] = [
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
        {"quant_method": "hqq"},
        {"quant_method": "eetq"},
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "something_new"},
    ]
    for i, method in enumerate(methods):
        refused(train(edited(copied(base, folder / f"q{i}"), "config.json", quantization_config=method), folder))
    ran = train(edited(copied(base, folder / "pad"), "config.json", pad_token_id=400), folder / "pad")
    return REFUSED if ran.code == 0 else refused(ran)


@entry(
    "F10", "a tokenizer with several named chat templates", "default or tool_use is used, the folder counts as a run"
)
def several_templates(folder: Path) -> str:
    tok = tokenizer(CHATML)
    tok.chat_template = {"default": CHATML, "tool_use": "tools" + CHATML}  # type: ignore[assignment]
    base = saved(folder / "m", tok)
    accepted(supervised("sft", base, folder))
    accepted(supervised("sft", base, folder, "--overwrite"))
    tok.chat_template = {"rag": CHATML, "other": CHATML}  # type: ignore[assignment]
    ran = supervised("sft", saved(folder / "n", tok), folder, "--overwrite")
    return FIXED if ran.code == 0 else (refused(ran) and FIXED)


def adapter_of(base: Path, folder: Path) -> Path:
    """Save a trained LoRA adapter of ``base`` in ``folder``."""
    tuned = get_peft_model(load_policy(str(base)), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    return folder


def logits(name: Path) -> torch.Tensor:
    """Return the logits of the policy that is loaded from a folder."""
    policy = load_policy(str(name))
    plain = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
    with torch.no_grad():
        return plain(input_ids=torch.tensor([[30, 40, 50]])).logits


@entry("F11", "a merged model with leftover adapter files", "the full weights are used as they are")
def leftover_adapter_files(folder: Path) -> str:
    base = saved(folder / "m")
    adapter = adapter_of(base, folder / "a")
    accepted(command("export", adapter, "--output_dir", folder / "merged"))
    expected = logits(folder / "merged")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "merged" / file).write_bytes((adapter / file).read_bytes())
    return expect(torch.allclose(logits(folder / "merged"), expected, atol=1e-5), "the adapter was applied twice")


@entry("F11b", "an adapter with config.json, without a tokenizer, or as .bin", "the base is used; .bin is refused")
def odd_adapter_folders(folder: Path) -> str:
    base = saved(folder / "m")
    adapter = adapter_of(base, folder / "a")
    expected = logits(adapter)
    both = copied(adapter, folder / "both")
    (both / "config.json").write_bytes((base / "config.json").read_bytes())
    expect(torch.allclose(logits(both), expected, atol=1e-5), "config.json next to the adapter changes the model")
    bare = copied(adapter, folder / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    expect(len(load_tokenizer(str(bare))) == len(load_tokenizer(str(base))))
    pickled = copied(adapter, folder / "bin")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    expect("safetensors" in error_of(lambda: load_policy(str(pickled))))
    return FIXED


@entry("F12", "Git LFS pointers in place of weights and tokenizer", "the error names Git LFS")
def lfs_pointers(folder: Path) -> str:
    for file in ("model.safetensors", "tokenizer.json"):
        base = saved(folder / file)
        (base / file).write_text(POINTER)
        ran = refused(train(base, folder), "LFS")
    return ran


@entry("F14", "two runs in one folder at the same time", "the second ends with a message")
def two_runs_in_one_folder(folder: Path) -> str:
    code = (
        "import sys; from reinforcepp.run_dir import claim_output\n"
        "lock = claim_output(sys.argv[1], overwrite=True); print(1, flush=True); input()"
    )
    (folder / "run").mkdir()
    base = saved(folder / "m")
    words = [sys.executable, "-c", code, str(folder / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        expect(other.stdout.readline().strip() == "1", "the first run couldn't claim the folder")
        ran = train(base, folder)
        other.stdin.write("\n")
        other.stdin.flush()
    return refused(ran)


@entry("K-C", "a Llama tokenizer with legacy: true", "the saved tokenizer encodes texts as before")
def legacy_tokenizers(folder: Path) -> str:
    return resaved(folder, tokenizer_class="LlamaTokenizer", legacy=True)


@entry("K-F", "a byte-level tokenizer declared as LlamaTokenizerFast", "spaces and Chinese text stay")
def wrongly_declared_tokenizers(folder: Path) -> str:
    return resaved(folder, tokenizer_class="LlamaTokenizerFast")


def resaved(folder: Path, **settings: object) -> str:
    """Check that loading and saving a tokenizer with such settings keeps the ids of its file, or is refused."""
    from tokenizers import Tokenizer

    from reinforcepp.models.tokenizer_files import save_tokenizer

    base = edited(saved(folder / "m"), "tokenizer_config.json", **settings)
    raw = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = ["[INST] a b", "  two  spaces", "水的化学式", "END. <|end|>"]
    try:
        tok = load_tokenizer(str(base))
        save_tokenizer(tok, folder)
    except ReinforceError:
        return REFUSED
    again = load_tokenizer(str(copied(base, folder / "again")))
    for text in texts:
        expected = raw.encode(text, add_special_tokens=False).ids
        for loaded in (tok, again):
            expect(loaded(text, add_special_tokens=False)["input_ids"] == expected, text)
    return FIXED


@entry("K-E", "a true Gemma 3 vocabulary with one token more than the embedding", "accepted")
def gemma_vocabulary(folder: Path) -> str:
    return placeholder_beyond_vocabulary(folder)


@entry("K-6", "a reward model whose pad token is EOS", "plain transformers computes the same scores")
def pad_is_eos(folder: Path) -> str:
    from reinforcepp import load_reward_model
    from reinforcepp.models.tokenization import encode_example

    tok = tokenizer(CHATML, eos="<|im_end|>", special=("<|im_start|>", "<|im_end|>"))
    tok.pad_token = tok.eos_token
    accepted(supervised("reward", saved(folder / "m", tok), folder))
    reward = load_reward_model(str(folder / "reward"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    ids = encode_example(load_tokenizer(str(folder / "reward")), "Why?", "So.")
    with torch.no_grad():
        score = float(plain(input_ids=torch.tensor([ids])).logits[0, 0])
    (own,) = reward(["Why?"], ["So."])
    return expect(abs(own - score) < 1e-3, f"{own} against {score}")


@entry("K-10", "a multimodal Gemma with --rollout vllm", "the error gives the real reason")
def multimodal_with_vllm(folder: Path) -> str:
    from reinforcepp.rollout.selection import choose_engine

    config = transformers.Gemma3Config()
    config.architectures = ["Gemma3ForConditionalGeneration"]
    choice = choose_engine("auto", config, torch.float32)
    return expect(choice.name == "vllm" or "patching" not in choice.reason, choice.reason)


@entry("R1", "reward training with default settings", "no loss above 1.5")
def default_reward_training(folder: Path) -> str:
    accepted(
        command(
            "reward", "--model", "builtin:tiny", "--data", "example_feedback_diverse.csv", "--output_dir", folder / "r"
        )
    )
    lines = (folder / "r" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    return expect(losses and max(losses) <= 1.5, losses)


@entry("R4", "checkpoints of a short run", "their size is printed before training, and none is left")
def announced_checkpoints(folder: Path) -> str:
    ran = train(saved(folder / "m"), folder, "--save_every", 1, data=rows_file(folder / "p.jsonl"))
    accepted(ran)
    kept = [path for path in (folder / "run" / "checkpoints").glob("*") if path.is_dir()]
    return expect("heckpoint" in ran.err and not kept, f"{len(kept)} checkpoints kept; {ran.err}")
