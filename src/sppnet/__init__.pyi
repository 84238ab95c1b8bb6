from .boxes import Detections as Detections
from .boxes import Target as Target
from .classification.file import load_network as load_network
from .classification.file import save_network as save_network
from .classification.network import NetworkSettings as NetworkSettings
from .classification.network import SPPNet as SPPNet
from .classification.network import build as build
from .classification.views import probabilities as probabilities
from .datasets import Dataset as Dataset
from .datasets import Sample as Sample
from .datasets import read_dataset as read_dataset
from .datasets.image_folder import LabelledImages as LabelledImages
from .datasets.image_folder import read_image_folder as read_image_folder
from .detection.detector import Detector as Detector
from .detection.ensemble import Ensemble as Ensemble
from .features.backbone import Backbone as Backbone
from .features.encoded import EncodedImage as EncodedImage
from .features.windows import WindowPooling as WindowPooling
from .images import read_image as read_image
from .pooling import SpatialPyramidPooling as SpatialPyramidPooling
from .pooling import pool_region_chunks as pool_region_chunks
from .pooling import pool_regions as pool_regions
from .retrieval.embedder import Embedder as Embedder
from .retrieval.index import Index as Index
from .retrieval.vectors import VectorTable as VectorTable
from .retrieval.vectors import read_vectors as read_vectors

__version__: str
