"""What a run shows people: a first summary, samples, the picture of its loss, and a closing table."""

from __future__ import annotations

import functools
import re
import sys

import torch
from torch import Tensor

from nestopt.config import Config
from nestopt.config.files import replacing
from nestopt.models import HopeLM
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train.data.source import HeldOut, Source
from nestopt.train.data.task import Made
from nestopt.train.data.windows import Windows
from nestopt.train.errors import damaged, extra
from nestopt.train.folder import appending, check_file, saying
from nestopt.train.report.baselines import baselines
from nestopt.train.report.metrics import read
from nestopt.train.report.plots import loss_plot
from nestopt.train.run import Run
from nestopt.train.sampling import check_drawn, choose

with extra("train"):
    from tqdm import tqdm

PROMPT = "def "
"""What samples go on from."""

_SAMPLE = re.compile(r"^--- step (\d{1,18}) ---$", re.MULTILINE)


class Report:
    """The reporting of one run.

    Args:
        run: its folder.
        source: of its data.
        held_out: the text that is measured.
        size: how many parameters the model has.
        quiet: print nothing (files are written all the same).
    """

    def __init__(self, run: Run, source: Source, held_out: HeldOut, size: int, *, quiet: bool) -> None:
        self.run, self.source, self.held_out, self.quiet = run, source, held_out, quiet
        self._size, self.unit = size, "byte" if held_out.answers is None else "token"
        self.measure = "bits per byte" if held_out.answers is None else "bits per answer"

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """Bits per byte of simple models on the same held-out text; none where the text is not bytes."""
        if not isinstance(self.source, Windows):
            return {}
        return baselines(self.source.training, self.held_out.tokens.numpy())

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def begin(self, optimizer: Sharded, config: Config) -> None:
        """Say what is about to run."""
        bytes_ = len(self.source.training) if isinstance(self.source, Windows) else None
        text = "documents to train on" if bytes_ is None else f"{bytes_:,} bytes to train on"
        text = "examples made as it trains" if isinstance(self.source, Made) else text
        stacks = ", ".join(dict.fromkeys(optimizer.level(group).label for group in optimizer.param_groups))
        section = config.model
        mixers = " and ".join(dict.fromkeys(level.label for level in section.mixers or [section.mixer]))
        self.say(
            f"{self.source.name}: {text}, {self.held_out.bytes:,} held-out {self.unit}s to measure on\n"
            f"model: {self._size:,} parameters, {section.blocks} blocks of {mixers}, then {section.mlp.label}, "
            f"width {section.dim}; optimizer: {stacks}\n"
            f"run: {self.run.path}"
        )

    def sample(self, model: HopeLM, step: int, config: Config, *, write: bool = True) -> None:
        """Generate some text, and append it to samples.txt if it is to be written."""
        length = config.train.sample_bytes
        if not length or isinstance(self.source, Made):
            return
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(config.train.seed)
        prompt = torch.tensor([list(self.source.encode(PROMPT))], device=device)
        with tqdm(total=length, desc="writing", unit=" tokens", leave=False, disable=self.quiet or not write) as bar:

            def next_token(logits: Tensor) -> Tensor:
                bar.update()
                return choose(logits.float(), temperature=0.8, generator=generator)

            tokens, _ = model.generate(prompt, length, next_token)
        if not write:
            return
        written = tokens[0].clamp(max=self.source.vocab - 1).tolist()
        check_drawn(written)
        body = self.source.decode(written)
        path = self.run.samples_file
        with saying(path), appending(path) as file:
            file.write(f"--- step {step} ---\n{body}\n\n")

    def cut_samples(self, step: int) -> None:
        """Drop samples of later steps, which a resumed run will write again."""
        path = self.run.samples_file
        check_file(path, alone=True)
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        later = [mark.start() for mark in _SAMPLE.finditer(text) if int(mark[1]) > step]
        if later:
            with replacing(path) as temporary:
                temporary.write_text(text[: later[0]], encoding="utf-8")

    def plot(self) -> None:
        """Draw loss.png from what has been measured so far, if anything has."""
        title = f"{self.source.name}, run {self.run.path.name}"
        with damaged(self.run.metrics_file):
            if records := read(self.run.metrics_file):
                references = {name: bits for name, bits in self.baselines.items() if name != "unigram"}
                loss_plot(records, self.run.path / "loss.png", references, title=title)

    def interrupted(self, ended: str) -> None:
        self.say(f"stopped by {ended}; the checkpoint is saved. Go on with: nestopt train --resume {self.run.path}")

    def end(self, score: float, seconds: float, ended: str) -> None:
        """Draw the picture, say what `ended` the run, and print the table."""
        self.plot()
        rows = {**self.baselines, "this model": score}
        width = max(map(len, rows))
        lines = [f"  {name:<{width}}  {bits:.3f}" for name, bits in sorted(rows.items(), key=lambda row: -row[1])]
        self.say(f"the run has ended: {ended}")
        self.say(
            "\n".join(
                [
                    f"{self.measure} on {self.held_out.bytes:,} held-out "
                    f"{self.unit}s, after {seconds:.0f} s of training:",
                    *lines,
                ]
            )
        )
        self.say(f"in {self.run.path}: loss.png, samples.txt, metrics.jsonl, model.safetensors, config.yaml")
        sys.stdout.flush()
