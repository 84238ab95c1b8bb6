"""Data sets: detection data as labelling tools write it, and labelled images for classification.

The formats' own conventions end here: what comes out has 0-based half-open boxes (see docs/conventions.md).
What is wrong in a data set is an error that names file and line; what is merely odd is put right, counted and
told in `notes`. Nothing is skipped silently.
"""

from sppnet.datasets.image_folder import LabelledImages, image_folder_splits, read_image_folder
from sppnet.datasets.predictions import Prediction, write_counts, write_predictions
from sppnet.datasets.reading import dataset_splits, read_dataset
from sppnet.datasets.records import Contents, Dataset, Sample
from sppnet.datasets.results import read_results
from sppnet.datasets.splits import default_training_split
from sppnet.datasets.writing import Written, convert, write_dataset

__all__ = [
    "Contents",
    "Dataset",
    "LabelledImages",
    "Prediction",
    "Sample",
    "Written",
    "convert",
    "dataset_splits",
    "default_training_split",
    "image_folder_splits",
    "read_dataset",
    "read_image_folder",
    "read_results",
    "write_counts",
    "write_dataset",
    "write_predictions",
]
