"""What a trained model is shown to do: measurements that say how they were made, and how sure they are."""

from nestopt.evidence.forgetting import documents_in, forgetting
from nestopt.evidence.measures import Line, Look, Mean
from nestopt.evidence.reading import read, score
from nestopt.evidence.report import ForgettingReport

__all__ = ["ForgettingReport", "Line", "Look", "Mean", "documents_in", "forgetting", "read", "score"]
