"""Sequence classifiers of other origin as reward models: they score as plain transformers does, whatever their head is called."""

import json
from functools import cache

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from reinforcepp.commands.cli import main
from reinforcepp.commands.reward_server import score_request
from reinforcepp.config.reward_spec import parse_model, parse_source
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.reward_models import new_reward_model
from reinforcepp.rewards import foreign
from reinforcepp.rewards.foreign import CALIBRATION, FEWEST_CORRECT, PROBE_PAIRS
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import check_reward_folder, load_reward_model

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 256}
ENCODER = {**SIZE, "max_position_embeddings": 66, "pad_token_id": 0}
ENDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
DECODERS = {
    "llama": DECODER,
    "qwen2": DECODER,
    "mistral": DECODER,
    "gemma2": {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8},
    "qwen3": {**DECODER, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": {**SIZE, "max_position_embeddings": 256},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "modernbert-decoder": {**SIZE, "max_position_embeddings": 256, "pad_token_id": 0, **ENDS},
}
ENCODERS = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "type_vocab_size": 1, "pad_token_id": 0},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16},
    "modernbert": {**ENCODER, **ENDS, "global_attn_every_n_layers": 1, "reference_compile": False},
    "electra": {**ENCODER, "embedding_size": 16},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 66},
    "albert": {**ENCODER, "embedding_size": 16},
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT = "how do i see my routes run ip route show and read the inet line why restart it ? . , 1 2 3"
WORDS = TEXT.split()
QUESTION = "How do I see my routes?"
ANSWERS = ["Run ip route.", "Why? Restart it, and read the inet line 1, 2, 3. " * 2, "No"]


def classifier(family: str, *, outputs: int = 1, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """Return a classifier with random weights, wide enough that texts differ."""
    torch.manual_seed(seed)
    settings = {**DECODERS, **ENCODERS}[family] | changes
    vocab = {"vocab_size": len(SPECIAL) + len(WORDS)} if family in ENCODERS else {"vocab_size": 320}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(family, num_labels=outputs, **(vocab | settings))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            elif not parameter.any():
                parameter.normal_()
    return model.eval()


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of pairs with the types 0 and 1."""
    tokens = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def save(folder, family: str, *, tokenizer=None, **settings):
    """Write a classifier with its tokenizer."""
    model = classifier(family, **settings)
    model.save_pretrained(folder)
    (tokenizer or (encoder_tokenizer() if family in ENCODERS else tiny.chat_tokenizer())).save_pretrained(folder)
    return folder


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rename(folder, old: str, new: str) -> None:
    edit_weights(
        folder, lambda w: w.update({key.replace(old, new, 1): w.pop(key) for key in list(w) if key.startswith(old)})
    )


def template_ids(folder, answer: str) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]


@torch.no_grad()
def plain_logits(folder, *, model=None):
    """Return the logits of plain transformers for each answer alone. -> (answers, outputs)"""
    model = model or AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [model(input_ids=torch.tensor([template_ids(folder, answer)])).logits for answer in ANSWERS]
    return torch.cat(rows)


def scores(name) -> list[float]:
    return load_reward_model(str(name))([QUESTION] * len(ANSWERS), ANSWERS)


def column(logits, output: int = 0):
    return pytest.approx(logits[:, output].tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns the folder of a family's classifier; don't change it."""
    root = tmp_path_factory.mktemp("classifiers")
    return cache(lambda family, outputs=1: save(root / f"{family}-{outputs}", family, outputs=outputs))


# --- heads and pooling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_scores_as_in_plain_transformers(folder_of, family):
    folder = folder_of(family)
    assert scores(folder) == column(plain_logits(folder))
    assert len(set(load_reward_model(folder)([QUESTION] * 3, ANSWERS))) == len(ANSWERS)


@pytest.mark.parametrize("pad", [None, "eos", "other"])
@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>")])
def test_the_score_is_read_where_plain_transformers_reads_it(tmp_path, pad, template):
    """With a pad token that ends the text, without one, and with one that the text doesn't contain."""
    tokenizer = tiny.chat_tokenizer(template)
    tokenizer.pad_token = {None: None, "eos": tokenizer.eos_token, "other": "<|endoftext|>"}[pad]
    folder = save(tmp_path / "rm", "llama", tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
    assert scores(folder) == column(plain_logits(folder))


@pytest.mark.parametrize(
    "name", ["value_head", "v_head.summary", "v_head", "classifier", "reward_head", "out_proj", "module.score"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_with_another_name_is_found_and_keeps_its_bias(tmp_path, name, bias):
    folder = save(tmp_path / "rm", "llama")
    expected = plain_logits(folder)
    rename(folder, "score", name)
    if bias:
        edit_weights(folder, lambda w: w.update({f"{name}.bias": torch.tensor([0.75])}))
    assert scores(folder) == column(expected + 0.75 * bias)


def test_a_bias_next_to_the_usual_head_is_kept(tmp_path):
    folder = save(tmp_path / "rm", "qwen2")
    expected = plain_logits(folder)
    edit_weights(folder, lambda w: w.update({"score.bias": torch.tensor([-2.5])}))
    assert scores(folder) == column(expected - 2.5)


@pytest.mark.parametrize("prefix", ["", "pretrained_model.", "module."])
def test_a_language_model_with_the_value_head_of_trl_is_read(tmp_path, prefix):
    """As ``AutoModelForCausalLMWithValueHead`` saves it: a causal language model, its output layer, and ``v_head.summary``."""
    folder, plain = tmp_path / "rm", classifier("llama")
    language_model = AutoModelForCausalLM.from_config(plain.config)
    language_model.model.load_state_dict(plain.model.state_dict())
    language_model.save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)

    def change(weights):
        for key in list(weights):
            weights[prefix + key] = weights.pop(key)
        weights["v_head.summary.weight"] = plain.score.weight.detach().clone()
        weights["v_head.summary.bias"] = torch.tensor([0.5])

    edit_weights(folder, change)
    plain.config.pad_token_id = None
    assert scores(folder) == column(plain_logits(folder, model=plain) + 0.5)


@pytest.mark.parametrize("prefix", ["value_head", "score", "my_head"])
def test_a_reward_model_of_openrlhf_is_read_at_its_end_token(tmp_path, prefix):
    folder = save(tmp_path / "rm", "llama")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    rename(folder, "score", prefix)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["RewardModel"], "value_head_prefix": prefix}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [template_ids(folder, answer)[:-1] for answer in ANSWERS]  # without the line feed after <|im_end|>
    with torch.no_grad():
        expected = [plain.score(plain.model(torch.tensor([row])).last_hidden_state[0, -1]).item() for row in rows]
    assert scores(folder) == pytest.approx(expected, abs=1e-5)


def test_training_starts_from_a_head_with_another_name(tmp_path):
    folder = save(tmp_path / "rm", "llama")
    weight = load_file(folder / "model.safetensors")["score.weight"]
    rename(folder, "score", "value_head")
    assert new_reward_model(str(folder), seed=0).score.weight.equal(weight)


def test_the_separate_value_head_of_an_adapter_is_read(tmp_path):
    """As LLaMA-Factory saves it: a LoRA adapter of a causal language model, and ``value_head.safetensors``."""
    plain, folder = classifier("llama"), tmp_path / "rm"
    language_model = AutoModelForCausalLM.from_config(plain.config)
    language_model.model.load_state_dict(plain.model.state_dict())
    language_model.save_pretrained(tmp_path / "base")
    tiny.chat_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(folder)
    save_file(
        {"v_head.summary.weight": plain.score.weight.detach(), "v_head.summary.bias": torch.ones(1)},
        folder / "value_head.safetensors",
    )
    plain.model.load_state_dict(adapted.merge_and_unload().model.state_dict())
    plain.config.pad_token_id = None
    assert scores(folder) == column(plain_logits(tmp_path / "base", model=plain) + 1)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_an_encoder_scores_the_pair_as_in_plain_transformers(folder_of, family, outputs):
    """The tokenizer makes one text of the two sentences, with their types."""
    folder = folder_of(family, outputs)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), encoder_tokenizer()
    inputs = [tokenizer(QUESTION, answer, return_tensors="pt") for answer in ANSWERS]
    assert any(inputs[0]["token_type_ids"][0])
    if family in ("distilbert", "roberta"):
        inputs = [{"input_ids": row["input_ids"]} for row in inputs]
    with torch.no_grad():
        expected = torch.cat([model(**row).logits for row in inputs])
    assert scores(folder if outputs == 1 else f"{folder}?output=2") == column(expected, outputs - 1)


def test_an_encoder_with_a_chat_template_scores_the_conversation(tmp_path):
    tokenizer = encoder_tokenizer()
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}[SEP]{% endfor %}"
    folder = save(tmp_path / "rm", "bert", tokenizer=tokenizer)
    assert scores(folder) == column(plain_logits(folder))


@pytest.mark.parametrize("limit", [66, 20])
def test_a_long_pair_is_truncated_with_a_warning(tmp_path, caplog, limit):
    """To the encoder's positions, or to the limit of its tokenizer if that is lower."""
    tokenizer = encoder_tokenizer()
    if limit < 66:
        tokenizer.model_max_length = limit
    folder = save(tmp_path / "rm", "bert", tokenizer=tokenizer)
    model, answer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), "read the inet line " * 40
    inputs = tokenizer(QUESTION, answer, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.item()
    assert inputs["input_ids"].shape[1] == limit
    assert load_reward_model(str(folder))([QUESTION], [answer]) == pytest.approx([expected], abs=1e-5)
    assert f"longer than {limit} tokens are truncated" in caplog.text


def test_a_long_conversation_is_truncated_with_a_warning(folder_of, caplog):
    folder = folder_of("llama")
    reward = load_reward_model(str(folder))
    answer = "read the inet line " * 400
    kept = template_ids(folder, answer)[-256:]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert reward([QUESTION], [answer]) == pytest.approx([model(torch.tensor([kept])).logits.item()], abs=1e-5)
    assert "256 tokens are truncated at their beginning" in caplog.text


# --- outputs, precision, adapters -----------------------------------------------------------------------------------


def labelled(tmp_path):
    folder = save(tmp_path / "rm", "llama", outputs=3)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "helpful", "1": "safe", "2": "verbose"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_several_outputs_need_a_choice(tmp_path):
    folder = labelled(tmp_path)
    with pytest.raises(
        ConfigError, match=r"3 outputs \(0: helpful, 1: safe, 2: verbose\). Choose one, as in .*\?output=helpful"
    ):
        load_reward_model(str(folder))
    with pytest.raises(ConfigError, match=r"output 'save' not found.*Did you mean 'safe'"):
        check_reward_folder(f"{folder}?output=save")
    with pytest.raises(ConfigError, match="2 weights for 3 outputs"):
        check_reward_folder(f"{folder}?outputs=1,2")
    logits = plain_logits(folder)
    for output in ("2", "verbose"):
        assert scores(f"{folder}?output={output}") == column(logits, 2)
    weighted = pytest.approx((logits @ torch.tensor([0.7, 0.0, -0.3])).tolist(), abs=1e-5)
    assert scores(f"{folder}?outputs=0.7,0,-0.3") == weighted
    assert scores(f"{folder}?outputs=verbose:-0.3,helpful:0.7") == weighted


def test_an_output_can_be_a_reward_of_a_training(tmp_path):
    folder = labelled(tmp_path)
    total = load_rewards([f"0.5*{folder}?output=0", f"{folder}?output=safe", "rule:length"])
    assert total.names == ["rm?output=0", "rm?output=safe", "length"] and len(set(total.fingerprint().split())) == 3
    logits = plain_logits(folder)
    assert total.functions[1]([QUESTION] * 3, ANSWERS) == column(logits, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_weights_are_read(tmp_path, dtype):
    folder = tmp_path / "rm"
    classifier("qwen2").to(torch.bfloat16).save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    if dtype == "float32":
        assert scores(folder) == column(plain_logits(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    assert scores(f"{folder}?dtype={dtype}") == pytest.approx(plain_logits(folder, model=model)[:, 0].tolist(), abs=0.1)
    assert load_reward_model(f"{folder}?dtype={dtype}").model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_brings_its_head_or_uses_that_of_its_base(tmp_path, folder_of, family):
    base = folder_of(family)
    for with_head in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        task = {"task_type": "SEQ_CLS"} if with_head else {}
        targets = ["q_proj"] if family == "llama" else ["query"]
        adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, **task))
        folder = tmp_path / f"adapter-{with_head}"
        if with_head:
            with torch.no_grad():
                (
                    adapted.base_model.model.score if family == "llama" else adapted.base_model.model.classifier
                ).weight.add_(1)
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload().eval()
        if family == "llama":
            expected = plain_logits(base, model=merged)
        else:
            inputs = [encoder_tokenizer()(QUESTION, answer, return_tensors="pt") for answer in ANSWERS]
            with torch.no_grad():
                expected = torch.cat([merged(**row).logits for row in inputs])
        assert scores(folder) == column(expected)


def test_a_classifier_rewards_a_training(folder_of, tmp_path, capfd):
    data = tmp_path / "prompts.csv"
    data.write_text("prompt\n" + "\n".join(f"Question {i}?" for i in range(8)))
    arguments = ["--data", str(data), "--num_train_epochs", "1", "--rollout_batch_size", "4", "--max_new_tokens", "4"]
    arguments += ["--rewards", f"{folder_of('llama', 3)}?output=1", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *arguments, "--rollout", "transformers", "--heldout_fraction", "0"]) == 0, (
        capfd.readouterr().err
    )
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    outputs = {"LABEL_0": 0.0, "LABEL_1": 1.0, "LABEL_2": 0.0}
    expected = {"name": "llama-3", "public_name": "a reward model", "weight": 1.0, "card": None, "outputs": outputs}
    assert run["rewards"] == [expected]


def test_a_server_scores_formatted_conversations(folder_of):
    folder = folder_of("llama")
    reward = load_reward_model(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in messages]
    assert score_request(reward, {"query": texts}) == column(plain_logits(folder))
    queries = {"query": [QUESTION + answer for answer in ANSWERS], "prompts": [QUESTION] * 3}
    assert score_request(reward, queries) == column(plain_logits(folder))


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_scorer_of_a_pool_scores_alike(tmp_path, outputs):
    """Its model is built from the configuration, so the bias and the choice of an output must be given."""
    from reinforcepp.rollout.ray.reward_pool import Scorer, ScorerSpec
    from reinforcepp.rollout.ray.worker import pack

    folder = save(tmp_path / "rm", "llama", outputs=outputs)
    rename(folder, "score", "value_head")
    edit_weights(folder, lambda w: w.update({"value_head.bias": torch.ones(outputs)}))
    reward = load_reward_model(f"{folder}?output=0")
    model, rows = reward.model, [reward.encode(QUESTION, answer) for answer in ANSWERS]
    spec = ScorerSpec(model.config, model.dtype, reward.tokenizer, None, reward.reading, reward.output_weights)
    scorer = Scorer(spec)
    scorer.load(pack(model))
    assert scorer.process(rows, None) == pytest.approx(reward.score_rows(rows), abs=1e-6)


@pytest.mark.full
def test_4_bit_weights_score_as_in_plain_transformers(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"hidden_size": 64, "intermediate_size": 128}
    folder = save(tmp_path / "rm", "llama", **settings)
    reward = load_reward_model(f"{folder}?load_in_4bit=true")
    assert reward.model.is_loaded_in_4bit
    obtained = reward([QUESTION] * 3, ANSWERS)
    del reward.model.forward  # uncovers that of transformers
    assert obtained == column(plain_logits(folder, model=reward.model))


# --- guards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lost", "named"),
    [
        ("llama", "score", "score.weight"),
        ("bert", "classifier", "classifier.weight"),
        ("bert", "bert.pooler", "bert.pooler.dense.weight"),
        ("roberta", "classifier.dense", "classifier.dense.weight"),
        ("distilbert", "pre_classifier", "pre_classifier.weight"),
    ],
)
def test_a_missing_part_of_the_head_is_refused_by_name(tmp_path, family, lost, named):
    folder = save(tmp_path / "rm", family)
    edit_weights(folder, lambda w: [w.pop(key) for key in list(w) if key.startswith(lost)])
    with pytest.raises(ModelError, match=rf"no score head \(.*{named}.*newly initialized"):
        check_reward_folder(str(folder))


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = tiny.save(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"no score head \(score.weight\)"):
        load_reward_model(str(folder))


def test_a_head_of_several_layers_is_refused(tmp_path):
    folder = save(tmp_path / "rm", "llama")
    edit_weights(
        folder, lambda w: w.update({"score.0.weight": torch.zeros(16, 16), "score.2.weight": w.pop("score.weight")})
    )
    with pytest.raises(ModelError, match=r"several layers \(score.0, score.2\)"):
        load_reward_model(str(folder))


def test_missing_layers_below_the_head_are_refused(tmp_path):
    folder = save(tmp_path / "rm", "llama")
    edit_weights(folder, lambda w: w.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_reward_model(str(folder))


def test_the_first_use_is_reported_and_kept(tmp_path, capfd, caplog):
    folder = save(tmp_path / "rm", "llama")
    load_reward_model(str(folder))
    line = capfd.readouterr().err
    assert "scores of probe answers from" in line and f"of {len(PROBE_PAIRS)} probe pairs ranked correctly" in line
    correct = int(line.partition("; ")[2].split()[0])
    assert ("as few as by chance" in caplog.text) == (correct < FEWEST_CORRECT)
    kept = json.loads((folder / CALIBRATION).read_text())
    load_reward_model(str(folder))
    assert json.loads((folder / CALIBRATION).read_text()) == kept

    kept["scores"] = {key: [value + 1 for value in values] for key, values in kept["scores"].items()}
    (folder / CALIBRATION).write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=r"differently than at its first use \(by up to 1\).*remove"):
        load_reward_model(str(folder))
    edit_weights(folder, lambda w: w["score.weight"].mul_(2))
    load_reward_model(str(folder))
    assert "files changed since it was first used" in caplog.text


def test_a_template_with_the_date_scores_differently_on_another_day(tmp_path, monkeypatch):
    folder = save(tmp_path / "rm", "llama", tokenizer=tiny.chat_tokenizer(tiny.DATED))
    load_reward_model(str(folder))

    class Tomorrow(foreign.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(foreign, "date", Tomorrow)
    load_reward_model(str(folder))
    assert len(json.loads((folder / CALIBRATION).read_text())["scores"]) == 2


def test_a_folder_without_write_permission_uses_the_cache_of_the_user(tmp_path, monkeypatch):
    folder = save(tmp_path / "rm", "llama")
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "cache"))
    write = foreign.write_json

    def refuse(path, value):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(path, value)

    monkeypatch.setattr(foreign, "write_json", refuse)
    load_reward_model(str(folder))
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text().replace("e-0", "e+0").replace("0.", "5."))
    with pytest.raises(ModelError, match="first use"):
        load_reward_model(str(folder))


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rm?output", "option output is empty"),
        ("rm?output=1&output=2", "given twice"),
        ("rm?output=1&outputs=1,2", "both given"),
        ("rm?outptu=1", "option 'outptu' not found.*Did you mean 'output'"),
        ("rm?outputs=1,x", "'x' isn't a weight"),
        ("rm?outputs=a:inf", "'a:inf' isn't a weight"),
        ("rm?dtype=int8", "dtype must be one of float32"),
        ("rm?load_in_4bit=yes", "must be true or false"),
    ],
)
def test_invalid_options_are_errors(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_source(text)


def test_options_of_a_model_are_parsed():
    source = parse_model("org/rm?outputs=helpful:0.7,0.3&dtype=bfloat16&load_in_4bit=true")
    assert source.outputs == (("helpful", 0.7), (None, 0.3)) and source.dtype == "bfloat16" and source.load_in_4bit
    assert parse_source("0.5*org/rm?output=1").path == "org/rm" and parse_model("rm").name == "rm"


# --- the Hub --------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_read_from_the_cache_of_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "cache"))
    revision, repository = "0" * 40, tmp_path / "hub" / "models--some-org--rm"
    folder = save(repository / "snapshots" / revision, "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert scores("some-org/rm") == column(plain_logits(folder))
    assert not (folder / CALIBRATION).exists() and any((tmp_path / "cache").rglob("*.json"))
    with pytest.raises(ModelError, match="can't be downloaded from the Hub"):
        check_reward_folder("some-org/other")


def test_a_checkpoint_of_a_training_scores_as_the_training_does(tmp_path):
    """Its texts end with the end token of the answer, although it has no card."""
    folder = save(tmp_path / "rm", "llama")
    (folder / "manifest.json").write_text("{}")
    reward = load_reward_model(str(folder))
    assert reward.encode(QUESTION, ANSWERS[0]) == template_ids(folder, ANSWERS[0])[:-1]


# --- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_conversation_is_scored_as_in_plain_transformers(folder_of, family):
    """By the chat template with all its turns; as a pair, the text of the turns is the first sentence."""
    folder = folder_of(family)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Restart it."},
        {"role": "user", "content": QUESTION},
    ]
    reward = load_reward_model(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if family == "bert":
        context, answer = reward.split(turns, ANSWERS[0])
        assert answer == tokenizer("x", ANSWERS[0])["input_ids"][-len(answer) :]
        assert len(context) > len(reward.split(QUESTION, ANSWERS[0])[0])
        return
    text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": ANSWERS[0]}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    context, answer = reward.split(turns, ANSWERS[0])
    assert reward.encode(turns, ANSWERS[0]) == ids == context + answer
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert reward([turns], ANSWERS[:1]) == pytest.approx([model(torch.tensor([ids])).logits.item()], abs=1e-5)
