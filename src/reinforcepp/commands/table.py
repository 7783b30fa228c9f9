"""The commands of ``reinforcepp``: one table for help, parsing, dispatch and documentation. Loads no command's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from reinforcepp import config

DRY_RUN = "commands.dry_run:run_dry_run"


@dataclass(frozen=True)
class Command:
    """One command of ``reinforcepp``.

    Attributes:
        name: The word after ``reinforcepp``, or two words.
        config: Class of its configuration, from which flags and their help come.
        help: One-line description for ``reinforcepp --help``.
        function: Location of the code, as ``module:function`` below ``reinforcepp``. The function takes the configuration and
            can return an exit code.
        positional: Settings whose values can follow the command without their flags, in this order.
    """

    name: str
    config: type
    help: str
    function: str
    positional: tuple[str, ...] = ()

    def load(self, settings: Any) -> Callable[[Any], Any]:
        """Import and return the function for ``settings``; with ``dry_run``, the one that only shows them.

        ``plan`` ignores ``dry_run``, which it inherits from ``train``: it never trains.
        """
        only_show = self.name != "plan" and getattr(settings, "dry_run", False)
        module, _, function = (DRY_RUN if only_show else self.function).partition(":")
        loaded: Callable[[Any], Any] = getattr(import_module(f"reinforcepp.{module}"), function)
        return loaded


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "sft",
            config.SftConfig,
            "fine-tune a language model on completions or plain text, before RL",
            "commands.supervised:run_sft",
        ),
        Command(
            "reward",
            config.RewardModelConfig,
            "train a reward model from a preference file",
            "commands.supervised:run_reward_training",
        ),
        Command(
            "train", config.TrainConfig, "train a policy with REINFORCE++ on its rewards", "commands.train:run_train"
        ),
        Command(
            "generate",
            config.GenerateConfig,
            "generate responses to prompts with a trained model",
            "commands.generate:run_generate",
        ),
        Command(
            "chat",
            config.ChatConfig,
            "chat with a trained model in the terminal, and record preferences",
            "commands.chat.command:run_chat",
            ("model",),
        ),
        Command(
            "serve",
            config.ServeConfig,
            "serve a trained model with vLLM, for OpenAI clients",
            "commands.serve:run_server",
            ("model",),
        ),
        Command(
            "export",
            config.ExportConfig,
            "write a trained model to a folder, with a model card",
            "commands.export.command:run_export",
            ("model",),
        ),
        Command(
            "push",
            config.PushConfig,
            "export a trained model and upload it to the Hugging Face Hub",
            "commands.export.push:run_push",
            ("model",),
        ),
        Command(
            "compare",
            config.CompareConfig,
            "compare two models' responses and write a page to judge them yourself",
            "commands.compare.command:run_compare",
            ("model_a", "model_b"),
        ),
        Command(
            "compare-algorithms",
            config.CompareAlgorithmsConfig,
            "train with every estimator and compare the results",
            "commands.compare_estimators.command:run_compare_estimators",
        ),
        Command(
            "label",
            config.LabelConfig,
            "collect human feedback on responses in a browser",
            "commands.label.command:run_label",
            ("models",),
        ),
        Command(
            "label export",
            config.LabelExportConfig,
            "write the votes of a feedback database to a file",
            "commands.label.transfer:run_export",
            ("output",),
        ),
        Command(
            "label import",
            config.LabelImportConfig,
            "add the votes in a file to a feedback database",
            "commands.label.transfer:run_import",
            ("data",),
        ),
        Command(
            "label agreement",
            config.LabelAgreementConfig,
            "measure how much labelers and judges agree",
            "commands.label.agreement:run_agreement",
        ),
        Command(
            "plan",
            config.PlanConfig,
            "estimate memory and time of a training before loading a model",
            "planner.command:run_plan",
        ),
        Command(
            "lint",
            config.LintConfig,
            "find problems in a data file and fix them",
            "commands.lint.command:run_lint",
            ("data",),
        ),
        Command(
            "doctor",
            config.DoctorConfig,
            "diagnose problems of a training from its metrics",
            "commands.doctor:run_doctor",
            ("run",),
        ),
        Command(
            "report",
            config.ReportConfig,
            "show the results of one training, or of several, on a page",
            "commands.report:run_report",
            ("runs",),
        ),
        Command(
            "serve-reward",
            config.ServeRewardConfig,
            "serve a reward model's scores over HTTP",
            "commands.reward_server:serve",
            ("model",),
        ),
        Command(
            "migrate",
            config.MigrateConfig,
            "translate a training of TRL, OpenRLHF or verl",
            "commands.migrate.command:run_migrate",
            ("file",),
        ),
        Command(
            "recipes",
            config.RecipesConfig,
            "list, show and copy the configuration files of the package",
            "commands.recipes:run_recipes",
            ("action", "name", "file"),
        ),
        Command(
            "demo",
            config.DemoConfig,
            "run every stage offline on the built-in model and data",
            "commands.demo:run_demo",
        ),
    )
}


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command at the beginning of ``words``, which can be unknown, and its arguments."""
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in COMMANDS else (words[0], list(words[1:]))
