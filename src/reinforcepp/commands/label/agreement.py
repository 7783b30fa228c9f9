"""The command ``label agreement``: print how good the votes are, and write it to a file."""

from __future__ import annotations

from contextlib import closing

from rich.table import Column, Table

from reinforcepp.config import LabelAgreementConfig
from reinforcepp.data.feedback import Store
from reinforcepp.errors import DataError
from reinforcepp.files import check_output_file, write_json
from reinforcepp.labeling.admin import LABELER_TITLES, labeler_row, share, shown
from reinforcepp.labeling.quality import ALL, measure
from reinforcepp.runtime.terminal import Console, echo, print_output


def run_agreement(config: LabelAgreementConfig) -> None:
    """Print the measurements of each labeler, of each topic, and of judges compared with people.

    Raises:
        ReinforceError: The database can't be read or has no votes, or the file can't be written.
    """
    output = check_output_file(config.output) if config.output is not None else None
    with closing(Store(config.database, create=False)) as store:
        quality = measure(store)
    if not quality.labelers:
        raise DataError(f"database: {config.database} has no votes. Collect some with reinforcepp label.")
    table = Table(Column(LABELER_TITLES[0], overflow="fold"), *LABELER_TITLES[1:], box=None, pad_edge=False)
    for each in quality.labelers:
        table.add_row(*labeler_row(each))
    Console().print(table)
    for name, value in quality.alpha.items():
        if value is None and name != ALL:  # nobody labeled the same unit of the topic
            continue
        about = "all units" if name == ALL else f"topic {name}"
        print_output(f"Krippendorff's alpha of people, {about}: {shown(value)}")
    for name, counts in quality.judges.items():
        same = f"has the preference of the people in {share(counts)} of the units"
        print_output(f"Judge {name} {same if counts.total else 'has no units with votes of people'}")
    if output is not None:
        write_json(output, quality.record())
        echo(f"Wrote {output}", "green")
