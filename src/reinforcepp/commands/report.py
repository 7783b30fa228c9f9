"""The command and function `report`: read the runs and write the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from reinforcepp.config import ReportConfig
from reinforcepp.errors import ConfigError, setting
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.monitoring.doctor import diagnose
from reinforcepp.monitoring.run_record import find_run, read_run
from reinforcepp.reports.html import GENERATOR
from reinforcepp.reports.reward_model import reward_report
from reinforcepp.reports.run import summary
from reinforcepp.reports.run.page import report_page
from reinforcepp.run_dir import REWARD_CARD
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import echo

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """A page on one or several trainings, or on a reward model, that opens offline. A notebook shows it.

    Attributes:
        html: The page.
        verdicts: The verdict on each run or output, by the name that the page gives it.
    """

    html: str
    verdicts: Mapping[str, str]

    def save(self, output: str | Path) -> Path:
        """Write the page to ``output`` and return its path.

        Raises:
            ConfigError: The file can't be written, or it exists and isn't a report.
        """
        path = _check_page(str(output))
        with whole_file(path) as file:
            file.write(self.html)
        return path

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 800px; border: 0"></iframe>'


def report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    samples: int = ReportConfig.samples,
) -> Report:
    """Return a page with the results of a training, or of several overlaid, or of a reward model.

    Example:
        >>> from reinforcepp import report
        >>> page = report("runs/train")
        >>> page.verdicts["train"].partition(":")[0]
        'Improved'

    Args:
        runs: Output folders of training runs or demos, or one folder of a reward model.
        output: File for the page. Default: none is written; :meth:`Report.save` writes it.
        samples: Completions shown per section: start, middle, end, highest-reward; 0: none.

    Raises:
        ConfigError: A folder isn't a run or is listed twice, a log is damaged, or the page can't be written.
    """
    names = [runs] if isinstance(runs, (str, Path)) else runs
    config = ReportConfig(runs=tuple(map(str, names)), output=None if output is None else str(output), samples=samples)
    if config.output is not None:
        _check_page(config.output)  # before the work
    with silence():
        page = _read(config)
    if config.output is not None:
        page.save(config.output)
    return page


def run_report(config: ReportConfig) -> None:
    """Write the page that ``config`` describes and print the verdicts and its path.

    Raises:
        ConfigError: A folder isn't a run or is listed twice, a log is damaged, or the page can't be written.
    """
    default = str(Path(config.runs[0]).expanduser() / PAGE) if len(config.runs) == 1 else PAGE
    _folders(config)  # a folder that isn't a run comes before a page that can't be written
    output = _check_page(config.output if config.output is not None else default)
    page = _read(config)
    page.save(output)
    for name, text in page.verdicts.items():
        echo((f"{name}: " if len(config.runs) > 1 else "") + text)
    echo(f"Saved the report to {output} ({output.stat().st_size / 1e6:.1f} MB). Open it in a browser.", "green")


def _folders(config: ReportConfig) -> list[Path] | None:
    """Return the folders of the runs, or None for a single reward model."""
    if len(config.runs) == 1 and (Path(config.runs[0]).expanduser() / REWARD_CARD).is_file():
        return None
    return [find_run(name) for name in config.runs]


def _read(config: ReportConfig) -> Report:
    folders = _folders(config)
    if folders is not None:
        return read_report(folders, config.samples)
    folder = Path(config.runs[0]).expanduser()
    html, verdict = reward_report(folder)
    return Report(html, {folder.name: verdict})


def read_report(folders: Sequence[Path], samples: int = ReportConfig.samples) -> Report:
    """Return the report of the runs in ``folders``.

    Raises:
        ConfigError: A folder is listed twice or its log is damaged.
    """
    runs = {name: read_run(folder) for name, folder in zip(names_of(folders), folders, strict=True)}
    html = report_page(runs, samples, {name: diagnose(record).findings for name, record in runs.items()})
    return Report(html, {name: summary.verdict(record).text for name, record in runs.items()})


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
        raise ConfigError(f"{name}: the file exists and isn't a report. Choose another {setting('output')}.")
    return output
