r"""Make the built-in data, tokenizer and language model from the authored facts.

    python scripts/make_builtin.py                     # everything; about half an hour on two cores
    python scripts/make_builtin.py --steps 200 --out /tmp/trial
    python scripts/make_builtin.py --data-only         # only the two preference files

The same seed, steps, versions and number of threads reproduce the files, unless ``--minutes`` limits the training.
The model is a small GPT-2, trained from scratch on ``Question: {prompt}\nAnswer: {answer}<|endoftext|>``. Prompt and answer are
tokenized separately, as in inference. Only answer tokens contribute to the loss: question wordings are random, and predicting
them would cost capacity without improving answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from reinforcepp.data.builtin import data_paths, model_path
from reinforcepp.data.builtin.corpus import csv_text, load_facts, preference_rows, pretraining_rows
from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1500
POSITIONS = 512
WIDTH, LAYERS, HEADS = 192, 4, 6
MAX_NEW_TOKENS = 64
GOOD_SHARE = 0.5


def main() -> None:
    """Parse the command line, write the files, and print the metrics of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this time (default: none)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and sampling (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; floating-point sums depend on it (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=model_path(), help="folder of the model (default: in the package)")
    parser.add_argument("--data-only", action="store_true", help="write the preference files and stop")
    options = parser.parse_args()

    for path, split in zip(data_paths(), ("train", "heldout"), strict=True):
        rows = preference_rows(split)
        path.write_text(csv_text(rows), encoding="utf-8", newline="")
        print(f"{path.name}: {len(rows)} pairs")
    if options.data_only:
        return

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(options.seed)
    model = new_model(tokenizer)
    print(f"model: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    steps = train(model, tokenizer, options)
    save(model, tokenizer, options.out)
    metrics = evaluate(model, tokenizer, options.seed)
    record = {
        "seed": options.seed,
        "steps": steps,
        "threads": options.threads,
        "batch_size": options.batch_size,
        "learning_rate": options.lr,
        "good_share": GOOD_SHARE,
        "parameters": model.num_parameters(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "heldout": metrics,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on the model's texts, with EOS and padding tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = itertools.islice(pretraining_rows(seed, GOOD_SHARE), 20_000)
    core.train_from_iterator((f"Question: {prompt}\nAnswer: {answer}" for prompt, answer in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=QUESTION_ANSWER_TEMPLATE,
        model_max_length=POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 with tied embeddings, sized for two CPU cores."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return ``Question: {prompt}`` and ``Answer:`` on the next line, by the chat template."""
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield endless ``(input_ids, labels)`` batches of rows of similar length; labels are -100 outside the answer."""
    rng = random.Random(seed)
    rows = pretraining_rows(seed, GOOD_SHARE)
    while True:
        chunk = []
        texts = list(itertools.islice(rows, batch_size * 32))
        prompt_ids = tokenizer([f"Question: {prompt}\nAnswer:" for prompt, _ in texts])["input_ids"]
        answer_ids = tokenizer([f" {answer}" for _, answer in texts])["input_ids"]
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True):
            chunk.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
        chunk.sort(key=lambda row: len(row[0]))
        grouped = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(grouped)
        for group in grouped:
            longest = max(len(ids) for ids, _ in group)
            input_ids = torch.full((len(group), longest), tokenizer.pad_token_id)
            labels = torch.full((len(group), longest), -100)
            for row, (ids, prompt_length) in enumerate(group):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            yield input_ids, labels


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> int:
    """Train with AdamW, a short warmup and a cosine schedule to zero; return the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    model.train()
    started, running, step = time.monotonic(), 0.0, 0
    for input_ids, labels in batches(tokenizer, options.batch_size, options.seed):
        elapsed = (time.monotonic() - started) / 60
        # With a time limit, the schedule follows the budget that ends first, so that the learning rate still ends at zero.
        progress = max(step / options.steps, elapsed / options.minutes)
        if progress >= 1.0:
            break
        rate = options.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = answer_loss(model, input_ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            elapsed = (time.monotonic() - started) / 60
            done = max(step / options.steps, elapsed / options.minutes)
            left = elapsed * (1 / done - 1)
            print(f"step {step:5d}  loss {running:.3f}  {elapsed:.1f} min, {left:.1f} min left", flush=True)
    model.eval()
    return step


def answer_loss(model: GPT2LMHeadModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the answer tokens; only their positions are projected onto the vocabulary."""
    # Padding is on the right, which causal attention never reads, so no mask is needed.
    hidden = model.transformer(input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Every version of transformers knows this class name, so the file doesn't depend on the version that wrote it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], count: int) -> list[str]:
    """Return ``count`` completions per prompt, sampled from the full distribution; EOS stays in the text."""
    texts = []
    for start in range(0, len(prompts), 32):
        formatted = [render_prompt(tokenizer, prompt) for prompt in prompts[start : start + 32]]
        inputs = tokenizer(formatted, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(
            **inputs, do_sample=True, top_k=0, num_return_sequences=count, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [text.replace(PAD, "") for text in texts]


def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 16) -> dict:
    """Return gold scores and shares of authored answers for sampled answers to the held-out questions."""
    torch.manual_seed(seed)
    judge = GoldJudge()
    rows = preference_rows("heldout")
    texts = sample(model, tokenizer, [row.prompt for row in rows], count)
    answers = [text.removesuffix(EOS).strip() for text in texts]
    gold = [judge.score(rows[i // count].prompt, answer) for i, answer in enumerate(answers)]
    best = [max(gold[i : i + count]) for i in range(0, len(gold), count)]
    authored = {fact.id: {*fact.good, *fact.bad.values()} for fact in load_facts()}
    topics = [rows[i // count].topic for i in range(len(answers))]
    verbatim = [answer in authored[topic] for answer, topic in zip(answers, topics, strict=True)]
    # A universal answer would show up here, as an answer of one topic given to another.
    topic_of = {answer: topic for topic, known in authored.items() for answer in known}
    misplaced = [topic_of.get(answer, topic) != topic for answer, topic in zip(answers, topics, strict=True)]
    print("\nTopics with the lowest gold scores:")
    by_topic: dict[str, list[float]] = defaultdict(list)
    for topic, score in zip(topics, gold, strict=True):
        by_topic[topic].append(score)
    for topic, scores in sorted(by_topic.items(), key=lambda item: sum(item[1]))[:5]:
        print(f"  {topic}: {sum(scores) / len(scores):.2f}")
    for i in range(0, len(answers), len(answers) // 8):
        print(f"\n{rows[i // count].prompt}\n  {gold[i]:.2f}  {answers[i]}")
    return {
        "prompts": len(rows),
        "samples_per_prompt": count,
        "gold_mean": round(sum(gold) / len(gold), 4),
        "gold_best_of_samples": round(sum(best) / len(best), 4),
        "ended_by_eos": round(sum(text.endswith(EOS) for text in texts) / len(texts), 4),
        "authored_answer_of_the_topic": round(sum(verbatim) / len(verbatim), 4),
        "authored_answer_of_another_topic": round(sum(misplaced) / len(misplaced), 4),
    }


if __name__ == "__main__":
    main()
