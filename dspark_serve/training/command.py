"""`dspark-serve graft` and `dspark-serve calibrate`: from a model's name to a head on disk.

The target writes in a process of its own while the head trains in this one: two single-threaded processes lose nothing
to each other. Must not know: argument parsing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import torch

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.models.loader import read_config, resolve
from dspark_serve.text import Tokenizer
from dspark_serve.training.device import training_device
from dspark_serve.training.graft import BEST, CHECKPOINT, Grafter, TrainOptions
from dspark_serve.training.parallel import Group, joined
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.progress import bar
from dspark_serve.training.records import MANIFEST, RecordReader
from dspark_serve.training.report import calibrate_head
from dspark_serve.training.synthesize import SynthesisOptions, synthesize
from dspark_serve.training.target import TargetWeights

RECORDS, LOG = "records", "write.log"
Say = Callable[[str], None]


@dataclass(frozen=True)
class HeadShape:
    """What of a head can be chosen. None: derived from the target."""

    variant: str = "dspark"  # or "dflash": no Markov head, no confidence head
    layers: int = 2
    markov_rank: int = 64
    block_size: int = 5
    taps: tuple[int, ...] | None = None
    kv_heads: int | None = None  # as many as query heads
    draft_vocab: int | None = 4096  # 0 or None: the whole vocabulary
    mask_token_id: int | None = None


@dataclass(frozen=True)
class GraftOptions:
    model: str
    out: Path
    train: TrainOptions
    shape: HeadShape = field(default_factory=HeadShape)
    records: Path | None = None  # of an earlier or another run; None: a directory within `out`
    write: bool = True  # let the target write while the head trains
    data: Path | None = None  # prompts for it, instead of its own
    first_tokens: int = 20_000  # answer tokens that must be there before training begins
    rows: int = 96
    device: str = "auto"  # see training_device


def graft(options: GraftOptions, say: Say) -> Path:
    """Train, or go on training, and calibrate; returns the directory of the best head.

    Raises ValueError, or the loader's LoadError, with one sentence.
    """
    torch.set_num_threads(1)
    device = training_device(options.device)
    directory = resolve(options.model).path
    weights = TargetWeights.load(directory, options.shape.layers, device)
    config = head_config(options.shape, weights, directory)
    records = options.records or options.out / RECORDS
    with _stopping() as stop, joined(device) as group:
        here = options.write and group.is_first
        with _writer(options, config, records, device if here else None) as is_writing:
            if group.is_first:
                _wait_for_text(records, options, lambda: stop() or not is_writing(), say)
            # The first process speaks for all; where the writer has failed, an error comes from the context.
            if group.total([float(stop() or (here and not is_writing()))])[0] > 0:
                return options.out
            source = PassageSource(records, weights, config.taps)
            grafter = begin(options, source, weights, config, group, say)
            grafter.run(options.out, stop, say)
        if stop() or not group.is_first or not (options.out / BEST).exists():
            return options.out
    calibrate_head(options.out / BEST, source, weights, say)
    return options.out / BEST


def begin(
    options: GraftOptions, source: PassageSource, weights: TargetWeights, config: HeadConfig, group: Group, say: Say
) -> Grafter:
    """A new run, or the one of the checkpoint. Further processes start from the first one's checkpoint."""
    out = options.out
    if not group.is_first:
        group.wait()
        return Grafter.resume(options.train, source, weights, out, group)
    resumed = (out / CHECKPOINT).exists()
    if resumed:
        grafter = Grafter.resume(options.train, source, weights, out, group)
    else:
        grafter = Grafter.create(options.train, source, weights, config, group)
    say(f"{'going on' if resumed else 'starting'} at update {grafter.update} with {len(source.training)} texts")
    if group.size > 1:
        grafter.write_checkpoint(out)
        group.wait()
    return grafter


def recalibrate(model: str, head: Path, records: Path, say: Say, device: str = "auto") -> None:
    """The last part alone: fit a head's calibration to held-out text again and write it beside the head."""
    torch.set_num_threads(1)
    place = training_device(device)
    weights = TargetWeights.load(resolve(model).path, device=place)
    config = HeadConfig.parse(read_config(head))
    calibrate_head(head, PassageSource(records, weights, config.taps), weights, say)


def head_config(shape: HeadShape, weights: TargetWeights, directory: Path) -> HeadConfig:
    """The config of a head for this target. Raises HeadError or ValueError where the shape is not possible."""
    if shape.variant not in ("dspark", "dflash"):
        raise ValueError(f"variant {shape.variant!r} is neither dspark nor dflash")
    c, plain = weights.config, shape.variant == "dflash"
    rank = 0 if plain else shape.markov_rank
    config = HeadConfig(
        architecture="Qwen3DSparkModel",
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=shape.layers,
        heads=c.heads,
        kv_heads=shape.kv_heads or c.heads,
        head_dim=c.head_dim,
        norm_eps=c.norm_eps,
        max_positions=c.max_positions,
        rope=dict(c.rope),
        num_target_layers=c.num_layers,
        taps=shape.taps or default_taps(c.num_layers),
        block_size=shape.block_size,
        mask_token_id=_mask_token(shape, weights, directory),
        markov_rank=rank,
        confidence=not plain,
        confidence_with_markov=rank > 0,
        draft_vocab_size=min(shape.draft_vocab, c.vocab_size) if shape.draft_vocab else None,
    )
    config.check_target(c.vocab_size, c.hidden_size, c.num_layers)
    return config


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Five layers from early to late; the newest is the last that a head may read, for planting needs it."""
    return tuple(sorted({int(num_layers * share) for share in (0.14, 0.4, 0.67, 0.87)} | {num_layers - 2}))


def _mask_token(shape: HeadShape, weights: TargetWeights, directory: Path) -> int:
    """A token that no text contains: an id past the tokenizer's, else a special token that no chat uses."""
    if shape.mask_token_id is not None:
        return shape.mask_token_id
    tokenizer = Tokenizer.load(directory)
    if tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer to choose a mask token by; give one")
    if tokenizer.vocab_size < weights.config.vocab_size:
        return tokenizer.vocab_size
    used = set(tokenizer.encode_chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]))
    config = weights.raw_config
    used |= {config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    free = sorted(tokenizer.special_ids - used)
    if not free:
        raise ValueError("every special token of this model is in use; give a mask token id")
    return free[0]


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come; a second SIGINT ends the program as usual."""
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = True

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _writer(
    options: GraftOptions, config: HeadConfig, records: Path, device: torch.device | None
) -> Iterator[Callable[[], bool]]:
    """A child process in which the target writes into `records`, as long as the context lasts; whether it still does.

    It shares the device of this process; None: another one of the group writes, or none. Raises ValueError when it has
    failed.
    """
    if device is None:
        yield lambda: False
        return
    synthesis = SynthesisOptions(
        model=options.model,
        layers=(*config.taps, config.num_target_layers - 1),
        seed=options.train.seed,
        rows=options.rows,
        data=options.data,
        device=str(device),
    )
    process: BaseProcess = multiprocessing.get_context("spawn").Process(target=write, args=(synthesis, records))
    process.start()
    try:
        yield process.is_alive
    finally:
        failed = process.exitcode  # None while it runs
        process.terminate()
        process.join()
    if failed:
        raise ValueError(f"the target could not write (exit code {failed}); {records / LOG} and stderr say why")


def write(options: SynthesisOptions, records: Path, max_tokens: int | None = None) -> None:
    """The writing half alone, in this process, until a signal comes; its progress goes to `records`/write.log."""
    torch.set_num_threads(1)
    os.nice(5)  # training is the half that must not wait
    records.mkdir(parents=True, exist_ok=True)
    with _stopping() as stop, (records / LOG).open("a", encoding="utf-8", buffering=1) as log:
        parent = os.getppid()

        def say(line: str) -> None:
            log.write(f"{time.strftime('%H:%M:%S')} {line}\n")

        synthesize(options, records, lambda: stop() or os.getppid() != parent, say, max_tokens)


def _wait_for_text(records: Path, options: GraftOptions, stop: Callable[[], bool], say: Say) -> None:
    """Until there is enough to start from, or `stop`. A directory that nobody writes to is taken as it is."""
    began, told, before = time.monotonic(), 0.0, -1
    with bar("first text") as drawn:
        while options.write and not stop():
            tokens = 0
            if (records / MANIFEST).exists():
                tokens = sum(len(c.answer) for c in RecordReader(records).conversations)
            if tokens >= options.first_tokens:
                return
            drawn.update(tokens / options.first_tokens - drawn.n)
            now, before = time.monotonic(), tokens if before < 0 else before
            if drawn.disable and now - told > 30:
                have = f"{tokens} of {options.first_tokens} answer tokens before training begins"
                say(f"the target writes: {have}, {(tokens - before) / max(now - began, 1.0):.0f} tokens/s")
                told = now
            time.sleep(1)
