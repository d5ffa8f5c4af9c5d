"""`daa newsqa build`: the options, the progress, the table at the end."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from daa_ext.newsqa.articles import iso_date
from daa_ext.newsqa.build import Asking, Choosing, build
from daa_ext.newsqa.generate import Endpoint, Generator, LocalModel, Sampling

newsqa_app = typer.Typer(
    help="True/false questions about your own news articles.", no_args_is_help=True
)
console = Console()


@newsqa_app.callback()
def group() -> None:
    """True/false questions about your own news articles."""


@newsqa_app.command("build")
def build_command(
    articles: Annotated[Path, typer.Argument(help="JSON Lines: title, text, (date), (id).")],
    out: Annotated[Path, typer.Option(help="Folder to write; one begun earlier is continued.")],
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible base URL, as http://localhost:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's name of the model.")] = None,
    local_model: Annotated[
        str | None, typer.Option(help="Instead of an endpoint: a transformers model.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key; unset: no key.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, help="Further tries of a failed request.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one try.")] = 120.0,
    attempts: Annotated[int, typer.Option(min=1, help="Answers before giving an article up.")] = 3,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Unset: the endpoint's own; local: greedy.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Unset: the endpoint's own; local: 512.")
    ] = None,
    max_chars: Annotated[int, typer.Option(min=1, help="Of an article, from its start.")] = 12000,
    after: Annotated[str | None, typer.Option(help="ISO date: of this day or later.")] = None,
    before: Annotated[str | None, typer.Option(help="ISO date: earlier than this day.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many articles.")] = None,
    duplicate: Annotated[float, typer.Option(help="Similarity that is the same article.")] = 0.8,
    related: Annotated[float, typer.Option(help="Similarity that binds to one side.")] = 0.2,
    test_share: Annotated[float, typer.Option(help="Part of the articles for testing.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Ask again about articles given up before.")
    ] = False,
) -> None:
    """Three questions per article, split for training and testing, ready for LLaMA-Factory."""
    try:
        choosing = Choosing(
            after and iso_date(after, "--after"), before and iso_date(before, "--before"),
            limit, duplicate, related, test_share, seed,
        )  # fmt: skip
        sampling = Sampling(temperature, max_tokens)
        generator: Generator
        if local_model is not None:
            if endpoint or model or api_key_env:
                raise ValueError(
                    f"local-model={local_model}: goes without --endpoint, --model, --api-key-env."
                )
            asking = Asking(local_model, "local", temperature, max_tokens, max_chars, attempts)
            generator = LocalModel(local_model, sampling)
        elif endpoint and model:
            asking = Asking(model, "endpoint", temperature, max_tokens, max_chars, attempts)
            generator = Endpoint(endpoint, model, sampling, api_key_env, retries, timeout)
        else:
            raise ValueError(
                f"endpoint={endpoint}, model={model}: name the model that writes the questions, by "
                "--endpoint URL and --model NAME, or by --local-model PATH."
            )
        columns = TextColumn("articles"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("articles", total=None)
            report = build(
                articles, out, generator, asking, choosing, concurrency, retry_rejected,
                lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error
    _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    table = Table(show_header=False, title=escape(str(out)), title_justify="left")
    for name, count in report["counts"].items():
        table.add_row(name, f"{count:,}")
    for side, found in report["sides"].items():
        table.add_row(
            side,
            f"{found['questions']:,} questions about {found['articles']:,} articles, "
            f"{found['share_true']:.0%} true",
        )
    console.print(table)
