"""Where training text comes from, and how it becomes batches."""

from nestopt.train.data.dataset import Dataset, DocumentDataset, DocumentSet

__all__ = ["Dataset", "DocumentDataset", "DocumentSet"]
