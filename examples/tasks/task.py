"""What the tasks share: arguments, a progress bar for each model, saved weights, the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time

from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from examples import report
from examples.model import Batch, Rates, train

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """One model: its seed, where the data lies (nowhere if quick), where it is saved."""

    name: str
    seed: int
    data: Path | None
    out: Path

    @property
    def quick(self) -> bool:
        """Whether only to see that it runs, on made-up data."""
        return self.data is None

    def bar(self, total: int) -> tqdm:
        """A progress bar for the steps of this model."""
        return tqdm(total=total, desc=f"{self.name}, seed {self.seed}", leave=False, position=1)

    def train(
        self,
        model: nn.Module,
        draw: Callable[[], Batch],
        steps: int,
        rate: float | Rates,
        *,
        smoothing: float = 0.0,
        decay: float = 0.01,
    ) -> None:
        """`examples.model.train` with a progress bar; two steps if quick."""
        steps = 2 if self.quick else steps
        with self.bar(steps) as bar:

            def counted() -> Batch:
                bar.update()
                return draw()

            train(model, counted, steps, rate, smoothing=smoothing, decay=decay)

    def save(self, model: nn.Module) -> None:
        """Keep the parameters as `name`-`seed`.safetensors, beside the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
        save_file(tensors, self.out / f"{self.name}-{self.seed}.safetensors")


@dataclass(frozen=True)
class Task:
    """A task: how one model is learned and measured, and what others reached.

    document: of the script; its first line is the title of the page
    ours: the model in words; learn: a job to its measures, in the order of their names, of which
        the first is compared with `published`: (model, result, source)
    found: what came out, in words
    """

    name: str
    document: str
    where: str
    ours: str
    learn: Callable[[Job], list[float]]
    measures: tuple[str, ...]
    published: tuple[tuple[str, str, str], ...]
    found: str = ""
    seeds: int = 3

    def main(self, given: list[str] | None) -> None:
        """Train a model for each seed, and write the page."""
        parser = report.arguments(self.document, self.seeds)
        parser.add_argument("--data", type=Path, help=self.where)
        options = report.parse(parser, given, RESULTS)
        free = options.quick or options.redraw
        if not free and (options.data is None or not options.data.exists()):
            raise SystemExit(
                f"--data is {options.data}; it must be the path of {self.where}. --quick needs "
                "none, and says nothing."
            )
        data = None if free else options.data
        jobs = [Job(self.name, seed, data, options.out) for seed in range(options.seeds)]
        results = report.run(self._measured, jobs, self.name, options)
        report.write(options.out, self.name, *self._page(results, options.conditions))

    def _measured(self, job: Job) -> list[float]:
        """The measures of one model and the minutes of a processor that it took."""
        before = process_time()
        found = self.learn(job)
        return [*found, (process_time() - before) / 60]

    def _page(self, results: list[list[float]], conditions: str) -> tuple[str, ...]:
        title, _, about = self.document.partition("\n")
        columns = [report.spread(numbers) for numbers in zip(*results, strict=True)]
        ours = (f"**{self.ours}**", f"**{columns[0]}**", f"this page, seeds: {len(results)}")
        more = ("minutes of one core for each model", *self.measures[1:])
        command = f"python -m examples.tasks.{self.name} --data DATA --seeds {len(results)}"
        return (
            f"# {title.rstrip(chr(46))}",
            about.strip(),
            f"`{command}`: {conditions} DATA is {self.where}.",
            report.table(("model", self.measures[0], "source"), [ours, *self.published]),
            "Mean ± standard deviation over seeds; also measured:",
            report.table(more, [(columns[-1], *columns[1:-1])]),
            *([self.found] if self.found else []),
        )
