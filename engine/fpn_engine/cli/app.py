"""The subcommands put together. Their heavy imports live inside them, so that --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from fpn_engine.cli.bench import bench
from fpn_engine.cli.build import build
from fpn_engine.cli.demo import demo
from fpn_engine.cli.doctor import doctor
from fpn_engine.cli.eval import evaluate
from fpn_engine.cli.export import export
from fpn_engine.cli.infer import infer
from fpn_engine.cli.info import info
from fpn_engine.cli.quantize import quantize
from fpn_engine.cli.scenes import scenes
from fpn_engine.cli.train import train
from fpn_engine.cli.verify import verify

CODES = "Exit codes: 0 done, 1 error, 2 wrong usage, 3 some images failed, 4 all images failed, "
KILLED = "130 interrupted, 143 terminated."
EPILOG = f"{CODES}5 verify finds a difference, {KILLED}"
INFER_EPILOG = CODES + KILLED
VERIFY_EPILOG = "Exit codes: 0 they agree, 1 error, 2 wrong usage, 3 some images failed, 4 all failed, 5 they disagree."

app = typer.Typer(
    name="fpn-engine",
    help="Run Feature Pyramid Network detectors fast.\n\n"
    "1. `fpn-engine export model.pth` turns a trained checkpoint into ONNX\n"
    "2. `fpn-engine build model.onnx` turns that into a plan for this machine\n"
    "3. `fpn-engine infer image.jpg` detects\n\n"
    "`fpn-engine demo` shows what comes out, with a model that is there already.",
    rich_markup_mode="markdown",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command(no_args_is_help=True)(export)
app.command(no_args_is_help=True)(quantize)
app.command(no_args_is_help=True)(build)
app.command(no_args_is_help=True, epilog=INFER_EPILOG)(infer)
app.command(name="eval", no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True, epilog=VERIFY_EPILOG)(verify)
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(scenes)
app.command(no_args_is_help=True)(info)
app.command()(bench)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        import fpn_engine

        typer.echo(f"fpn-engine {fpn_engine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
