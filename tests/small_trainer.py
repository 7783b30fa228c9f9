"""A trainer of a tiny model, for tests of the trainer object."""

from reinforcepp import ReinforceConfig, ReinforceTrainer

PROMPTS = [{"prompt": f"Why is host {i} up?"} for i in range(5)]


def spread(completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def trainer(base, folder, reward=spread, data=PROMPTS, *others, arguments=None, **settings):
    usual = {
        "output_dir": str(folder),
        "max_new_tokens": 4,
        "max_prompt_length": 40,
        "batch_size": 2,
        "max_steps": 2,
        "mixed_precision": "no",  # the tests compare exact numbers
    }
    args = ReinforceConfig(**(usual | {"rollout": "transformers", "learning_rate": 1e-3} | settings))
    return ReinforceTrainer(base, reward, args, data, *others, **(arguments or {}))
