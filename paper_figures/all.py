"""All figures of the paper, one after the other.

    python -m paper_figures.all [--quick] [--fresh] [--only fig_03_kl ...] [--out DIR]      about two minutes on one core; --quick half of one

Every figure is a file with `rows(quick)`, `measured(rows)`, `draw(rows)` and `main(out, quick)`; its docstring states the claim and the
numbers expected, and rows that say otherwise are not drawn. Finished figures are kept unless --fresh; a figure that fails does not stop
the others, and exit code 1 says so. Quick figures go into OUT/quick.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import tyro
from tqdm import tqdm

from paper_figures.house import OUT, finished

FIGURES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("fig_*.py")))


@dataclass(frozen=True)
class Settings:
    """The figures of the paper."""

    out: Path = OUT
    """Where figures and their rows go."""
    only: tuple[str, ...] = FIGURES
    """Names of figures."""
    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Draw finished figures again."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few rows, only to show that everything works; into OUT/quick."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(FIGURES)):
            raise ValueError(f"only: expected names out of {', '.join(FIGURES)}, got {', '.join(unknown)}")

    @property
    def folder(self) -> Path:
        return self.out / "quick" if self.quick else self.out


def main(settings: Settings) -> int:
    """Draw what is not there yet; the number of figures that failed."""
    failed = 0
    asked = [name for name in settings.only if settings.fresh or not finished(name, settings.folder)]
    for name in tqdm(asked, unit="figure", disable=not sys.stderr.isatty()):
        begin = time.perf_counter()
        try:
            import_module(f"paper_figures.{name}").main(settings.folder, settings.quick)
            tqdm.write(f"{name:<24} {time.perf_counter() - begin:6.1f} s", file=sys.stdout)
        except Exception as error:
            failed += 1
            tqdm.write(f"{name:<24} FAILED: {error}\n{traceback.format_exc()}", file=sys.stdout)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(tyro.cli(Settings))))
