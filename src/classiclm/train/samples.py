"""What a model writes while it learns: RUN/samples/step-00000250.txt, a text for every so many steps and the last one.

Samples follow from weights and settings alone, and leave no trace in the run: the random state, the mode and the
weights of the model are after one what they were before. Each file is there as a whole or not at all; a file that
cannot be written ends the run (exit 4), as a row of metrics.jsonl that cannot be does: the next checkpoint would go to
the same disk. What a signal has cut off is not kept, and is written when the run goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from classiclm.files import make_folder, write_file, writing
from classiclm.nn.base import EncoderDecoder
from classiclm.train.distributed import World
from classiclm.train.machine import Plan, autocast
from classiclm.train.settings import TrainConfig

FOLDER = "samples"
_PREFIX = "step-"

Write = Callable[[Any], str]  # a model -> what it writes


class Samples:
    """The files of a run."""

    def __init__(self, run: Path):
        self.folder = run / FOLDER

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"{_PREFIX}{step:08d}.txt"

    def steps(self) -> list[int]:
        """The steps that have one, in order."""
        names = [path.stem.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*.txt")]
        return sorted(int(name) for name in names if name.isdecimal())

    def cut_behind(self, step: int) -> None:
        """Delete the samples of steps that will be done again. Raises Error (exit 4)."""
        for later in (s for s in self.steps() if s > step):
            with writing(self.path(later)):
                self.path(later).unlink(missing_ok=True)

    def add(self, step: int, text: str) -> None:
        """Publish one, in UTF-8. Raises Error (exit 4)."""
        make_folder(self.folder)
        write_file(self.path(step), text.encode("utf-8", errors="replace"))

    def rows(self) -> list[dict[str, Any]]:
        """As trackers take them: {"step": 250, "sample": "..."}."""
        steps = [step for step in self.steps() if self.path(step).is_file()]
        return [{"step": s, "sample": self.path(s).read_text(encoding="utf-8", errors="replace")} for s in steps]


class Sampler:
    """Writes the samples of one run, every `config.sample_every` steps; without that or a way to `write`, never.

    Where the weights are shared out, all processes have to run each forward pass, so all call it together and the first
    one writes the file.
    """

    def __init__(self, run: Path, model: nn.Module, write: Write | None, config: TrainConfig, plan: Plan, world: World):
        self.files = Samples(run)
        self.model, self.write, self.config, self.plan, self.world = model, write, config, plan, world

    def owes(self, step: int) -> bool:
        """Whether a sample of this step should be there, and is not."""
        every = self.config.sample_every if self.write else None
        if every is None or step == 0 or (step % every and step != self.config.steps):
            return False
        return self.world.any(self.world.is_main and not self.files.path(step).is_file())

    def __call__(self, step: int, asked: Callable[[], bool]) -> str | None:
        """Write the sample of this step if it is owed; the text, or None if there is no new one.

        `asked`, which is called before each token, says whether to break off; on all processes alike. Raises Error
        (exit 4) for a file that cannot be written.
        """
        text = self._text(asked) if self.owes(step) else None
        if text is not None and self.world.is_main:
            self.files.add(step, text)
        return text

    def _text(self, asked: Callable[[], bool]) -> str | None:
        assert self.write is not None
        was_training = self.model.training
        devices = [torch.cuda.current_device()] if self.plan.device == "cuda" else []
        try:
            with torch.random.fork_rng(devices), _gathered(self.model, self.plan):
                return self.write(_Asking(self.model, asked))
        except _BrokenOff:
            return None
        finally:
            self.model.train(was_training)


class _BrokenOff(Exception):
    """A signal has come before the sample was whole."""


class _Asking:
    """The model as whoever writes with it sees it; before each of its passes it asks whether to go on."""

    def __init__(self, model: nn.Module, asked: Callable[[], bool]):
        self._model, self._asked = model, asked
        self._known: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("__call__", *args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("encode", *args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass("decode", *args, **kwargs)

    def _pass(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._asked():
            raise _BrokenOff
        # FSDP makes its buffers in the first pass of all, which this may be; made in inference mode, they could not
        # be trained with.
        first = name not in self._known
        self._known.add(name)
        with torch.inference_mode(not first), torch.no_grad():
            return getattr(self._model, name)(*args, **kwargs)


@contextmanager
def _gathered(model: nn.Module, plan: Plan) -> Iterator[None]:
    """For weights that are shared out (FSDP): collect them wherever the model is called, and let go of them at the end.

    Blocks then borrow their matrices in the precision of training. A model that is whole writes in fp32, as `generate`
    does with a checkpoint.
    """
    reshard: Any = getattr(model, "reshard", None)
    if reshard is None:
        yield
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    methods = ("encode", "decode") if isinstance(model, EncoderDecoder) else ()
    for name in methods:
        register_fsdp_forward_method(model, name)
    try:
        with autocast(plan.device, plan.precision):
            yield
    finally:
        for name in methods:
            delattr(model, name)
        reshard()
