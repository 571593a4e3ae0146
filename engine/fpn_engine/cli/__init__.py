"""The ``fpn-engine`` command. Heavy imports live inside the subcommands, so that --help is quick."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from fpn_engine.cli.build import build
from fpn_engine.cli.console import fail
from fpn_engine.cli.doctor import doctor
from fpn_engine.cli.eval import evaluate
from fpn_engine.cli.export import export
from fpn_engine.cli.infer import infer
from fpn_engine.cli.info import info
from fpn_engine.errors import FpnEngineError

EPILOG = "Exit codes: 0 done, 1 error, 2 wrong usage, 3 some images failed, 4 all images failed, 130 interrupted."

app = typer.Typer(
    name="fpn-engine",
    help="Run Feature Pyramid Network detectors fast.\n\n"
    "1. `fpn-engine export model.pth` turns a trained checkpoint into ONNX\n"
    "2. `fpn-engine build model.onnx` turns that into a plan for this machine\n"
    "3. `fpn-engine infer image.jpg` detects",
    rich_markup_mode="markdown",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(no_args_is_help=True)(export)
app.command(no_args_is_help=True)(build)
app.command(no_args_is_help=True, epilog=EPILOG)(infer)
app.command(name="eval", no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(info)
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


def main() -> NoReturn:
    """Run the command line: errors that users can cause become one sentence and an exit code."""
    # Threads that wait must not spin: on a busy machine each small op would then last a scheduler's time slice
    # (measured: 1000 ms of NMS for 20). Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about corrupt EXIF data, which we ignore
    try:
        app()
    except FpnEngineError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:
        if os.environ.get("FPN_ENGINE_DEBUG"):
            raise
        fail(f"internal error: {type(error).__name__}: {error}; FPN_ENGINE_DEBUG=1 shows where, please report it")
    sys.exit(0)


def _exit_on_sigterm(number: int, frame: object) -> NoReturn:
    """Unwind like an interrupt, so that half-written files are removed."""
    raise SystemExit(128 + number)
