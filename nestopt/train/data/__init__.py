"""Where training text comes from, and how it becomes batches."""

from nestopt.train.data.dataset import Dataset, DocumentDataset, DocumentSet
from nestopt.train.data.task import Examples, Task

__all__ = ["Dataset", "DocumentDataset", "DocumentSet", "Examples", "Task"]
