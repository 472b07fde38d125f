"""Where images come from: one module for each kind of source, each of which gives a `Dataset`."""

from experiments.runtime.sources.arrays import digits, idx
from experiments.runtime.sources.hugging_face import hugging_face
from experiments.runtime.sources.records import array_record, replace_records
from experiments.runtime.sources.splits import ArraySplit, Dataset, EncodedSplit, Sample, Split
from experiments.runtime.sources.trees import folder

__all__ = [
    "ArraySplit",
    "Dataset",
    "EncodedSplit",
    "Sample",
    "Split",
    "array_record",
    "digits",
    "folder",
    "hugging_face",
    "idx",
    "replace_records",
]
