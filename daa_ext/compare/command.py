"""`daa compare experiment.yaml`."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from daa_ext.compare.campaign import Campaign
from daa_ext.compare.experiment import Experiment
from daa_ext.compare.host import refuse_unknown_keys
from daa_ext.compare.plan import Planner
from daa_ext.compare.reading import read_experiment
from daa_ext.compare.report import write_report
from daa_ext.compare.scoring import check
from daa_ext.compare.table import Table


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment file; see docs/compare.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, put into the experiment.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything and list the runs.")] = False,
    report_only: Annotated[bool, typer.Option(help="Write the report of what is done.")] = False,
) -> None:
    """Run every method of an experiment, score it, and write the table. Continues where it was."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the running process ends
    try:
        settings = read_experiment(experiment, overrides or [])
        campaign = prepare(settings)
        if dry_run:
            for run in [*campaign.planner.first(), *campaign.planner.grid()]:
                state = "done" if campaign.result(run) else "to do"
                console.print(f"{state:6} {run.id}", highlight=False)
            return
        if not report_only:
            campaign.run()
        table = Table(settings, campaign.planner.rows, campaign.results())
        written = write_report(table, campaign.root)
    except ValueError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error
    failed = [result for result in table.results if result["status"] != "done"]
    for result in failed:
        words = f"{result['id']}: {result['status']}: {result['reason']}"
        console.print(words, style="yellow", highlight=False, markup=False)
    console.print(f"Report: {written}", highlight=False)


def prepare(settings: Experiment) -> Campaign:
    """Check all that can be checked before the first run.

    Raises:
        ValueError: names what is missing, unknown, or other than when this folder was begun.
    """
    refuse_unknown_keys(dict(settings.yaml_keys()))
    check([each.job(settings.dataset_dir) for each in settings.all_sets()])
    root = Path(settings.output)
    root.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(settings, Planner(settings, root))
    campaign.refuse_changes([*campaign.planner.first(), *campaign.planner.grid()])
    return campaign
