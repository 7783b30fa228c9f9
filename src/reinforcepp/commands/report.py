"""The command `report`: read the runs and write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reinforcepp.config import ReportConfig
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.monitoring import echo
from reinforcepp.monitoring.doctor import diagnose
from reinforcepp.monitoring.run_record import RunRecord, find_run, read_run
from reinforcepp.reports.html import GENERATOR
from reinforcepp.reports.reward_model import write_reward_report
from reinforcepp.reports.run import summary
from reinforcepp.reports.run.page import report_page
from reinforcepp.run_dir import REWARD_CARD

PAGE = "report.html"


def run_report(config: ReportConfig) -> None:
    """Write the page that ``config`` describes and print its path.

    Raises:
        ConfigError: A folder isn't a run or is listed twice, a log is damaged, or the page can't be written.
    """
    if len(config.runs) == 1 and (Path(config.runs[0]).expanduser() / REWARD_CARD).is_file():
        _report_reward_model(config)
        return
    default = str(Path(config.runs[0]).expanduser() / PAGE) if len(config.runs) == 1 else PAGE
    folders = [find_run(name) for name in config.runs]
    output = _check_page(config.output if config.output is not None else default)
    for name, record in write_report(folders, output, config.samples).items():
        echo((f"{name}: " if len(folders) > 1 else "") + summary.verdict(record).text)
    echo(f"Saved the report to {output} ({output.stat().st_size / 1e6:.1f} MB). Open it in a browser.", "green")


def _report_reward_model(config: ReportConfig) -> None:
    folder = Path(config.runs[0]).expanduser()
    output = _check_page(config.output if config.output is not None else str(folder / PAGE))
    echo(write_reward_report(folder, output))
    echo(f"Saved the report to {output}. Open it in a browser.", "green")


def write_report(folders: Sequence[Path], output: Path, samples: int = ReportConfig.samples) -> dict[str, RunRecord]:
    """Write the report of the runs in ``folders`` to ``output`` and return the runs by their names on the page.

    Raises:
        ConfigError: A folder is listed twice or its log is damaged.
    """
    runs = {name: read_run(folder) for name, folder in zip(names_of(folders), folders, strict=True)}
    text = report_page(runs, samples, {name: diagnose(record).findings for name, record in runs.items()})
    with whole_file(output) as file:
        file.write(text)
    return runs


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest distinct name of each folder: its own name, with as many parents as needed.

    Raises:
        ConfigError: A folder is listed twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"{folder}: the run is listed twice. Pass each run once.")
    # Every demo's run folder is called policy, so its parent is part of the name.
    lengths = [2 if path.name == "policy" else 1 for path in paths]
    while True:
        names = ["/".join(path.parts[-length:]) for path, length in zip(paths, lengths, strict=True)]
        clashing = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not clashing:
            return names
        for i in clashing:
            lengths[i] += 1


def _check_page(name: str) -> Path:
    """Return the path of the page; an existing file must be an earlier report."""
    output = check_output_file(name)
    if output.exists() and GENERATOR not in output.read_bytes()[:2000].decode(errors="replace"):
        raise ConfigError(f"{name}: the file exists and isn't a report. Choose another --output.")
    return output
