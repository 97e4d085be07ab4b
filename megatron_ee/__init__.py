"""Early-exit language models: training through a pipeline, and decoding at the speed that exits promise."""

__version__ = "0.1.0"
