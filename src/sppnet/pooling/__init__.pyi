from .bins import bin_bounds as bin_bounds
from .bins import pyramid_length as pyramid_length
from .bins import valid_levels as valid_levels
from .layer import SpatialPyramidPooling as SpatialPyramidPooling
from .pyramid import spatial_pyramid as spatial_pyramid
from .regions import pool_region_chunks as pool_region_chunks
from .regions import pool_regions as pool_regions
