"""Where images come from: one module for each kind of source, each of which gives a `Dataset`."""

from experiments.runtime.sources.arrays import digits, idx
from experiments.runtime.sources.hugging_face import hugging_face, hugging_face_train
from experiments.runtime.sources.records import array_record, replace_records
from experiments.runtime.sources.splits import (
    ArraySplit,
    Dataset,
    EncodedSplit,
    Labelled,
    Sample,
    Split,
)
from experiments.runtime.sources.trees import files_of, folder, one_split

__all__ = [
    "ArraySplit",
    "Dataset",
    "EncodedSplit",
    "Labelled",
    "Sample",
    "Split",
    "array_record",
    "digits",
    "files_of",
    "folder",
    "hugging_face",
    "hugging_face_train",
    "idx",
    "one_split",
    "replace_records",
]
