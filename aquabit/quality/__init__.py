"""Quality of images and videos: feature extractors, exact distances between sets of images and between
paired ones, streaming accumulation."""

from aquabit.quality.accumulator import PAIRED, TEMPORAL, Quality, Source
from aquabit.quality.features import METRICS_OF, FeatureExtractor, Features, NonFiniteImages
from aquabit.quality.meter import QualityMeter, QualityOptions
from aquabit.quality.real_images import RealImages, real_images
from aquabit.quality.reference import Reference
from aquabit.quality.user_metrics import NonFiniteValues, UserMetric

__all__ = [
    "METRICS_OF",
    "PAIRED",
    "TEMPORAL",
    "FeatureExtractor",
    "Features",
    "NonFiniteImages",
    "NonFiniteValues",
    "Quality",
    "QualityMeter",
    "QualityOptions",
    "RealImages",
    "Reference",
    "Source",
    "UserMetric",
    "real_images",
]
