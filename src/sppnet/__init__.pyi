from .boxes import Detection as Detection
from .boxes import Detections as Detections
from .boxes import Target as Target
from .classification.classifier import Classifier as Classifier
from .datasets.image_folder import read_image_folder as read_image_folder
from .datasets.reading import read_dataset as read_dataset
from .datasets.records import Sample as Sample
from .detection.detector import Detector as Detector
from .detection.ensemble import Ensemble as Ensemble
from .errors import SppnetError as SppnetError
from .features.backbone import Backbone as Backbone
from .features.encoded import EncodedImage as EncodedImage
from .features.windows import WindowPooling as WindowPooling
from .images import read_image as read_image
from .pooling.layer import SpatialPyramidPooling as SpatialPyramidPooling
from .pooling.pyramid import spatial_pyramid as spatial_pyramid
from .pooling.regions import pool_regions as pool_regions
from .retrieval.embedder import Embedder as Embedder
from .retrieval.index import Index as Index

__version__: str
