"""Quality of images and videos: feature extractors, exact distances between sets of images and between
paired ones, streaming accumulation."""

from aquabit.quality.accumulator import PAIRED, TEMPORAL, Quality, Source
from aquabit.quality.features import METRICS_OF, DigitsFeatures, FeatureExtractor, Features, NonFiniteImages
from aquabit.quality.meter import QualityMeter, QualityOptions
from aquabit.quality.reference import Reference, bundled_reference, held_out_digits
from aquabit.quality.user_metrics import NonFiniteValues, UserMetric

__all__ = [
    "METRICS_OF",
    "PAIRED",
    "TEMPORAL",
    "DigitsFeatures",
    "FeatureExtractor",
    "Features",
    "NonFiniteImages",
    "NonFiniteValues",
    "Quality",
    "QualityMeter",
    "QualityOptions",
    "Reference",
    "Source",
    "UserMetric",
    "bundled_reference",
    "held_out_digits",
]
