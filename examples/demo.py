"""The whole story on real input, told by using the product: `make demo`.

One frozen base; two adapters trained on it, evaluated, promoted and served; a bad candidate refused by the gate; all
of them in one batch; the live version flipped under a running stream and rolled back; a load test that checks every
digest. Each stage has a budget and says what it took. What an earlier demo made is found again and not made twice.

    python examples/demo.py [--home DIR | --fresh] [--quick] [--base NAME|DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
# The load tester and this folder are not installed; they are used from where they lie.
sys.path.insert(0, str(ROOT))

from adapters.home import Home  # noqa: E402
from examples.demo_product import CommandFailed, Product, whole  # noqa: E402
from examples.demo_screen import ClaimFailed, Screen  # noqa: E402
from examples.demo_story import FULL, QUICK, Settings, Story  # noqa: E402
from loadtests.processes import ServerFailed, interruptible  # noqa: E402

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Tell the story; returns the exit code: 0 all of it held, 1 something did not, 130 interrupted."""
    options = _options(argv)
    screen = Screen.of_terminal()
    try:
        with interruptible(), _home(options.home, options.fresh) as home:
            settings: Settings = QUICK if options.quick else FULL
            with whole(Product(home)) as product:
                Story(product, screen, settings, options.base, kept=not options.fresh).tell()
    except KeyboardInterrupt:
        screen.say("stopped; nothing was left running. `make demo` goes on where this one ended.", "yellow")
        return INTERRUPTED
    except (ClaimFailed, CommandFailed, ServerFailed, LookupError, OSError, RuntimeError, httpx.HTTPError) as error:
        screen.say(f"the story broke off: {error}", "bold red")
        return 1
    return 0


@contextmanager
def _home(chosen: Path | None, fresh: bool) -> Iterator[Home]:
    if not fresh:
        yield Home.find(chosen)
        return
    with tempfile.TemporaryDirectory(prefix="loraplane-demo-") as folder:
        yield Home.find(folder)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.partition("\n")[0])
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--home", type=Path, help="default $LORAPLANE_HOME or ~/.loraplane")
    place.add_argument("--fresh", action="store_true", help="a home of its own, removed at the end")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows only: its figures prove nothing")
    parser.add_argument("--base", default="smollm2-135m", help="what to pull: smollm2-135m or a folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
