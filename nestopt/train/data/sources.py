"""Make the source of the data that a configuration names."""

from __future__ import annotations

from nestopt.config import Config, ConfigError
from nestopt.train.data.builtin import Files
from nestopt.train.data.dataset import Dataset, DocumentDataset, DocumentSet
from nestopt.train.data.documents import PackedDocuments
from nestopt.train.data.source import Source
from nestopt.train.data.task import Made, Task
from nestopt.train.data.windows import Windows


def dataset_of(config: Config) -> Dataset:
    """Return the dataset that a configuration names: `data.path` goes before `data.dataset`.

    Raises:
        ConfigError: it names none, or a task.
    """
    data = config.data
    if isinstance(data.task, Task):
        raise ConfigError.refuse("data.task", data.task.label, "text is needed here; give data.dataset or data.path")
    if data.path:
        return Files(data.path)
    if not isinstance(data.dataset, Dataset):
        raise ConfigError.refuse("data.dataset", None, "give a dataset, or data.path")
    return data.dataset


def documents(config: Config) -> DocumentSet | None:
    """Return the documents that a configuration names, or None where it names text as bytes.

    What is found at their start, such as where in each shard what is, takes requests of a hub: one process can ask, and
    pickle the answer for the others.

    Raises:
        ConfigError: it names neither, nor a task, which has no documents.
        CorpusError: they can't be read.
    """
    if isinstance(config.data.task, Task):
        return None
    dataset = dataset_of(config)
    return dataset.documents() if isinstance(dataset, DocumentDataset) else None


def make(config: Config, rank: int = 0, world: int = 1, given: DocumentSet | None = None) -> Source:
    """Make the source that the section `data` of a configuration describes, for the process `rank` of `world`.

    Args:
        config: of the run.
        rank, world: this process's number and the number of processes.
        given: what `documents` found, in this process or another; None finds it here.

    Raises:
        ConfigError: no dataset is given, its tokens are more than `model.vocab`, or a number does not fit.
        CorpusError: the data can't be read.
    """
    data = config.data
    dataset = data.task if isinstance(data.task, Task) else dataset_of(config)
    if data.batch % world:
        raise ConfigError.refuse("data.batch", data.batch, f"give a multiple of {world}, the number of processes")
    rows = data.batch // world
    source: Source
    if isinstance(dataset, Task):
        vocab = max(dataset.vocab, config.model.vocab)
        source = Made(dataset, batch=data.batch, seed=config.train.seed, vocab=vocab, rank=rank, world=world)
        needs = f"{dataset.label} has tokens and targets up to {source.vocab - 1}: give {source.vocab} or more"
    elif isinstance(dataset, DocumentDataset):
        if data.workers > rows:
            raise ConfigError.refuse("data.workers", data.workers, f"give at most {rows}, the rows of a process")
        source = PackedDocuments(
            dataset.documents() if given is None else given,
            batch=data.batch,
            window=data.window,
            seed=config.train.seed,
            rank=rank,
            world=world,
            workers=data.workers,
        )
        needs = f"{dataset.label} has tokens up to {source.vocab - 1}: give {source.vocab} or more"
    else:
        if data.workers:
            raise ConfigError.refuse("data.workers", data.workers, "it is for documents; text as bytes needs none")
        text = dataset.load()
        if len(text.train) <= data.window:
            most = len(text.train) - 1
            raise ConfigError.refuse(
                "data.window", data.window, f"{text.name} has {most + 1} bytes to train on; give {most} or less"
            )
        source = Windows(text, batch=data.batch, window=data.window, seed=config.train.seed, rank=rank, world=world)
        needs = "bytes need 256 or more"
    if config.model.vocab < source.vocab:
        raise ConfigError.refuse("model.vocab", config.model.vocab, needs)
    return source
